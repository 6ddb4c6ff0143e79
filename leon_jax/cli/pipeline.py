r"""Trains all models on your own images, from a folder of images to a model folder.

    leon pipeline --config=configs/own.py --data=my_cats --licence=CC-BY-4.0 --workdir=runs/cats
    leon generate --model=runs/cats/model --prompt="a grey cat"

    leon pipeline --config=configs/finetune.py --from=runs/cats/model --data=my_kittens \
        --licence=CC-BY-4.0 --workdir=runs/kittens

The first command trains a model, the last one fine-tunes it on more images.

--data is a folder of images with captions beside them, or of jsonl, tar or parquet files, or a
source of `leon prepare`, [SPLIT=]KIND:PATH; it may be repeated. --size is tiny, small or base (see
configs/own.py).

The stages are: collect the documents, train the text tokenizer, the image tokenizer and the
retrieval encoder, measure the encoder's thresholds, encode the documents, train the decoder, and
write the model folder. Each stage prints the `leon` command that it runs, and can be run alone.

Run the same command again to resume an interrupted pipeline. Finished stages are skipped.
"""

import pathlib
from typing import TYPE_CHECKING

from absl import flags

from leon_jax.cli import config_flag
from leon_jax.config import UserError

if TYPE_CHECKING:
    from leon_jax.model_folder import ModelFolder

FLAGS = flags.FlagValues()
_CONFIG = config_flag.define(FLAGS)
_DATA = flags.DEFINE_multi_string(
    "data", [], "A folder of images with captions, or [SPLIT=]KIND:PATH; may be repeated.",
    flag_values=FLAGS,
)  # fmt: skip
_FROM = flags.DEFINE_string(
    "from", None, "The model folder to fine-tune (default: the shipped model).", flag_values=FLAGS
)
_WORKDIR = flags.DEFINE_string("workdir", None, "The folder for all files.", flag_values=FLAGS)
_SIZE = flags.DEFINE_string(
    "size", None, "The size of the models: tiny, small or base.", flag_values=FLAGS
)
_LICENCE = flags.DEFINE_string(
    "licence", "", "The SPDX licence of records that have none.", flag_values=FLAGS
)
_ACCEPT = flags.DEFINE_multi_string(
    "accept", [], "An additional SPDX licence to accept; may be repeated.", flag_values=FLAGS
)
_ATTRIBUTION = flags.DEFINE_string(
    "attribution", "", "The credit line of records that have none.", flag_values=FLAGS
)


def main(argv: list[str]) -> None:
    """Runs `leon pipeline`.

    Raises:
      UserError: a flag is missing, a stage failed, or the workdir belongs to another pipeline.
    """
    del argv
    from leon_jax.pipeline import run, stages

    values = config_flag.read(_CONFIG, "configs/own.py")
    kind = values.get("kind")
    if kind not in ("pipeline", "finetune"):
        raise UserError(
            f"config.kind is {kind!r}; it must be pipeline or finetune, as in configs/own.py and "
            "configs/finetune.py"
        )
    if _FROM.value is not None and kind != "finetune":
        raise UserError("--from is for fine-tuning; use --config=configs/finetune.py")
    if not _WORKDIR.value:
        raise UserError("--workdir is missing; for example --workdir=runs/cats")
    prepare_flags = [f"--accept={licence}" for licence in _ACCEPT.value]
    for name, value in (("licence", _LICENCE.value), ("attribution", _ATTRIBUTION.value)):
        if value:
            prepare_flags.append(f"--{name}={value}")
    workdir = pathlib.Path(_WORKDIR.value)
    inputs = stages.Inputs([_source(data) for data in _DATA.value], prepare_flags, workdir)
    if kind == "pipeline":
        run.run(stages.stages(values, inputs), workdir)
        return
    from leon_jax.model_folder import ModelFolder
    from leon_jax.pipeline import finetune

    model = ModelFolder.open(_FROM.value)
    run.run(finetune.stages(values, inputs, model, _index(model)), workdir)


def _index(model: "ModelFolder") -> pathlib.Path | None:
    """Returns the documents that a model retrieves; None if it has none on this machine."""
    from leon_jax.generate import retriever

    if reason := retriever.missing_index(model):
        print(f"{reason}, so only the new images will be retrieved")
        return None
    return retriever.find_index(model)


def rewritten(arguments: list[str]) -> list[str]:
    """Returns the arguments with the value of --size as the argument of the config file."""
    sizes = [argument.partition("=")[2] for argument in arguments if argument.startswith("--size=")]
    if not sizes:
        return arguments
    return [
        f"{argument}:{sizes[-1]}"
        if argument.startswith("--config=") and ":" not in argument
        else argument
        for argument in arguments
    ]


def _source(data: str) -> str:
    """Returns a source of `leon prepare`; the kind of a folder follows from its files."""
    folder = pathlib.Path(data)
    if folder.is_dir():
        for kind, pattern in (
            ("jsonl", "*.jsonl"),
            ("webdataset", "*.tar"),
            ("parquet", "*.parquet"),
        ):
            if any(path.name != "metadata.jsonl" for path in folder.glob(pattern)):
                return f"{kind}:{data}"
        return f"folder:{data}"
    if ":" not in data:
        raise UserError(f"there is no folder {data}")
    return data
