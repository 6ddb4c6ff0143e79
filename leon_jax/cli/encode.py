r"""Encodes a documents folder with models: adds codes, vectors and neighbours.

    leon encode --folder=data/my_cats --model=models/cats
    leon encode --folder=data/my_cats --tokenizer=runs/tokenizer/export/tokenizer.safetensors \
        --encoder=runs/encoder/export/encoder.safetensors --text=runs/text/export/text.json

The result is an encoding, FOLDER/encoded/DIGEST, where DIGEST identifies the models. An encoding is
a prepared folder: the decoder trains on it and the retriever searches it. If there is only one
encoding, other commands take FOLDER in its place. The default models are those of the shipped
model. The sources of the documents are not read again. Run the same command again to resume an
interrupted run.
"""

import pathlib
import shlex
import sys
from typing import TYPE_CHECKING, Any

from absl import flags

from leon_jax import config as configs
from leon_jax import storage
from leon_jax.config import UserError

if TYPE_CHECKING:
    from leon_jax.prepare.prepare import Runner
    from leon_jax.retrieval.neighbour_selection import SelectionConfig

FLAGS = flags.FlagValues()
_FOLDER = flags.DEFINE_string("folder", None, "The documents folder.", flag_values=FLAGS)
_MODEL = flags.DEFINE_string(
    "model", None, "The model folder whose models are used (default: the shipped model).",
    flag_values=FLAGS,
)  # fmt: skip
_TOKENIZER = flags.DEFINE_string(
    "tokenizer", None, "The image tokenizer's file.", flag_values=FLAGS
)
_ENCODER = flags.DEFINE_string(
    "encoder", None, "The retrieval encoder: a file, or a folder of OpenAI's CLIP.",
    flag_values=FLAGS,
)  # fmt: skip
_TEXT = flags.DEFINE_string("text", None, "The text tokenizer's file.", flag_values=FLAGS)
_VARIANTS = flags.DEFINE_integer(
    "variants", 1, "Augmented variants to encode of each train image, for training the decoder.",
    lower_bound=1, flag_values=FLAGS,
)  # fmt: skip
_MAX_TOKENS = flags.DEFINE_integer(
    "max_tokens", 4096, "The maximum number of token ids of a document.", lower_bound=3,
    flag_values=FLAGS,
)  # fmt: skip
_NEAR = flags.DEFINE_float(
    "near", None, "Drop a train image whose similarity to an earlier one is above this.",
    0.0, 1.0, flag_values=FLAGS,
)  # fmt: skip
_EVALUATION = flags.DEFINE_float(
    "evaluation", None, "Drop a train image whose similarity to a held-out one is above this.",
    0.0, 1.0, flag_values=FLAGS,
)  # fmt: skip
_RUNNER = flags.DEFINE_string(
    "runner", None, "Encode shards with this Apache Beam runner, for example DirectRunner.",
    flag_values=FLAGS,
)  # fmt: skip
_BEAM = flags.DEFINE_string(
    "beam", "", "Options of the Beam runner, for example '--project=x --region=y'.",
    flag_values=FLAGS,
)  # fmt: skip

_FILES = {
    "tokenizer": "tokenizer.safetensors",
    "encoder": "encoder.safetensors",
    "text": "text.json",
}


def main(argv: list[str]) -> None:
    """Runs `leon encode`.

    Raises:
      UserError: a folder or file is missing or damaged, a flag is invalid, or the disk is full.
    """
    del argv
    from leon_jax.prepare.encode import EncodeConfig, encode

    if _FOLDER.value is None:
        raise UserError("--folder is missing; it names a documents folder, made by leon prepare")
    values: dict[str, Any] = {
        "variants": _VARIANTS.value,
        "max_tokens": _MAX_TOKENS.value,
        "near": _NEAR.value,
        "evaluation": _EVALUATION.value,
    }
    paths = {"tokenizer": _TOKENIZER.value, "encoder": _ENCODER.value, "text": _TEXT.value}
    files = model_files(paths, None if _MODEL.value is None else storage.path(_MODEL.value))
    if files is None:
        raise UserError("--model is missing; no shipped model is installed")
    values |= {kind: str(path) for kind, path in files.items()}
    values["selection"] = configs.to_dict(selection(files, storage.path(_FOLDER.value)))
    config = configs.build(EncodeConfig, values)
    folder, manifest = encode(_FOLDER.value, config, run=runner(_RUNNER.value, _BEAM.value))
    counts = ", ".join(f"{count} {split}" for split, count in manifest["splits"].items())
    print(f"prepared folder: {folder} ({counts})")


def model_files(
    paths: dict[str, str | None], model: pathlib.Path | None = None
) -> dict[str, pathlib.Path] | None:
    """Returns the paths of the image tokenizer, the encoder and the text tokenizer.

    Args:
      paths: files by kind, "tokenizer", "encoder" and "text"; missing ones come from `model`.
      model: a model folder; None: the shipped model.

    Returns:
      The files by kind; None if `paths` names none and no shipped model is installed.

    Raises:
      UserError: a file does not exist.
    """
    from leon_jax.model_folder import encoder_path, shipped_folder

    folder = shipped_folder() if model is None else model
    if model is not None and not folder.is_dir():
        raise UserError(f"there is no model folder {folder}")
    files = {}
    for kind, name in _FILES.items():
        path = paths.get(kind)
        files[kind] = storage.path(path) if path else folder / name
        if kind == "encoder" and not path and model is not None:
            files[kind] = encoder_path(folder)
    missing = [
        kind
        for kind, path in files.items()
        if not (path.is_file() or (kind == "encoder" and path.is_dir()))
    ]
    if not missing:
        return files
    if not any(paths.values()) and model is None:
        return None
    kind = missing[0]
    if paths.get(kind) is None:
        raise UserError(f"there is no {files[kind]}; --{kind} can name the file")
    raise UserError(f"there is no file {files[kind]}, which --{kind} names")


def selection(files: dict[str, pathlib.Path], folder: pathlib.Path) -> "SelectionConfig":
    """Returns the selection rules of an encoder: those beside it, CLIP's, or measured ones.

    Args:
      files: the model files by kind.
      folder: the documents folder on which the thresholds are measured.

    Raises:
      UserError: `folder` is not a documents folder, or a file is damaged.
    """
    import jax

    from leon_jax import sharding
    from leon_jax.data.document_folder import TRAIN, DocumentFolder
    from leon_jax.generate import retriever
    from leon_jax.retrieval import near_copies
    from leon_jax.retrieval.encoder import RetrievalEncoder
    from leon_jax.retrieval.neighbour_selection import SelectionConfig
    from leon_jax.tokenizers.text import TextTokenizer

    encoder = files["encoder"]
    if encoder.is_dir() or (encoder.parent / "selection.json").is_file():
        return retriever.selection(encoder.parent)
    documents = DocumentFolder(folder)
    if documents.splits[TRAIN] < near_copies.MIN_DOCUMENTS:
        print(
            "too few documents to measure the encoder's thresholds; those of CLIP are used",
            file=sys.stderr,
        )
        return SelectionConfig()
    with jax.set_mesh(sharding.make_mesh()):
        loaded = RetrievalEncoder.load(encoder, TextTokenizer.load(files["text"]))
        groups = [line.get("group", "") for line in documents.listing(TRAIN)]
        measured = near_copies.measure(loaded, documents.records(TRAIN), groups=groups)
    print(
        f"{encoder.parent} has no selection.json, so the encoder's thresholds were measured: "
        f"documents {measured.document}, images {measured.image}",
        file=sys.stderr,
    )
    return measured.apply(SelectionConfig())


def runner(name: str | None, options: str) -> "Runner | None":
    """Returns the Beam runner that --runner and --beam name; None encodes in this process.

    Raises:
      UserError: `options` are given without `name`, or Beam is not installed.
    """
    if name is None:
        if options:
            raise UserError("--beam needs --runner")
        return None
    from leon_jax.prepare.beam_runner import on_beam

    return on_beam(name, shlex.split(options))
