r"""Collects image-text pairs into a documents folder for training and retrieval.

    leon prepare --source=folder:my_cats --licence=CC-BY-4.0 --out=data/my_cats
    leon prepare "--source=train=webdataset:shards/*.tar" --source=test=jsonl:held_out \
        --out=data/photographs
    leon prepare

A source is [SPLIT=]KIND:PATH. KIND is folder (of images with captions beside them), jsonl,
webdataset, parquet, tfds, huggingface, emoji or emoji_designs. All splits but train are held out.
In a source without a split name, the share --held_out of the documents is held out. A config file
can name the sources and all other settings instead (see configs/prepare.py).

The tokenizers and the encoder train on the documents folder. `leon encode` then adds codes, vectors
and neighbours, which the decoder and retrieval need. With --tokenizer, --encoder or --text this
command encodes the documents too. The models that are not given are those of the shipped model.

Without --source and --config the command renders the emoji, and prepares them for the shipped model
in data/emoji_prepared.

Run the same command again to resume an interrupted run.

Two flags work on an existing documents folder and on its encodings:

    leon prepare --out=data/my_cats --audit=cats.jsonl:17
    leon prepare --out=data/my_cats --remove_keys=removed.txt

--audit prints a document's origin, contents and neighbours. --remove_keys removes documents.
"""

import dataclasses
import json
import pathlib
import sys
from typing import TYPE_CHECKING, Any

from absl import flags

from leon_jax import config as configs
from leon_jax import storage
from leon_jax.cli import config_flag
from leon_jax.cli.encode import model_files, runner, selection
from leon_jax.config import UserError

if TYPE_CHECKING:
    from leon_jax.data.sources.raw_record import SourceConfig
    from leon_jax.prepare.config import PrepareConfig
    from leon_jax.prepare.encode import EncodeConfig

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
_SIDE = flags.DEFINE_integer(
    "side", None, "The side of the stored images in pixels (default: 256).", lower_bound=1,
    flag_values=FLAGS,
)  # fmt: skip
_HELD_OUT = flags.DEFINE_float(
    "held_out", None, "The share of documents to hold out of sources without a split (default: "
    "0.05).", lower_bound=0.0, upper_bound=0.99, flag_values=FLAGS,
)  # fmt: skip
_TOKENIZER = flags.DEFINE_string(
    "tokenizer", None, "The image tokenizer's file.", flag_values=FLAGS
)
_ENCODER = flags.DEFINE_string(
    "encoder", None, "The retrieval encoder: a file, or a folder of OpenAI's CLIP.",
    flag_values=FLAGS,
)  # fmt: skip
_TEXT = flags.DEFINE_string("text", None, "The text tokenizer's file.", flag_values=FLAGS)
_OUT = flags.DEFINE_string("out", None, "The documents folder; replaced if outdated (default: "
                           "data/emoji_prepared, for the emoji).", flag_values=FLAGS)  # fmt: skip
_REPLACE = flags.DEFINE_bool(
    "replace", True, "Replace a folder of other inputs or settings; --noreplace stops instead.",
    flag_values=FLAGS,
)  # fmt: skip
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
    "audit", None, "Print what the documents folder has under this key.", flag_values=FLAGS
)
_REMOVE_KEYS = flags.DEFINE_string(
    "remove_keys", None, "Remove the documents whose keys this file lists, one a line.",
    flag_values=FLAGS,
)  # fmt: skip


def main(argv: list[str]) -> None:
    """Runs `leon prepare`.

    Raises:
      UserError: a file is missing or damaged, a flag is invalid, or a folder cannot be written.
    """
    del argv
    import leon_jax.datasets.demo  # noqa: F401  # registers the source kind of the emoji
    from leon_jax.prepare import licences
    from leon_jax.prepare import prepare as preparing
    from leon_jax.prepare.encode import encode

    if _AUDIT.value is not None or _REMOVE_KEYS.value is not None:
        if not _OUT.value:
            raise UserError("--out is missing; it names the documents folder")
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
    if demonstration or _DATASET_ONLY.value:
        _prepare_emoji()
        return
    if _OUT.value is None:
        raise UserError("--out is missing; for example --out=data/my_cats")
    config, encode_config, encoder_files = _configurations()
    run = runner(_RUNNER.value, _BEAM.value)
    manifest = preparing.prepare(config, _OUT.value, run=run, replace=_REPLACE.value)
    _report("documents folder", _OUT.value, manifest)
    if encode_config is not None:
        if encoder_files is not None:
            rules = selection(encoder_files, storage.path(_OUT.value))
            encode_config = dataclasses.replace(encode_config, selection=rules)
        folder, manifest = encode(_OUT.value, encode_config, run=run)
        _report("prepared folder", folder, manifest)


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


def _prepare_emoji() -> None:
    """Renders the emoji and, unless --dataset_only is set, prepares them for the shipped model."""
    from leon_jax.data import image_files
    from leon_jax.datasets import demo
    from leon_jax.generate import retriever
    from leon_jax.prepare import prepare as preparing

    out = _OUT.value or str(retriever.DEFAULT_FOLDER)
    files = None if _DATASET_ONLY.value else model_files(_model_paths({}))
    image_files.check_folder(_DATA_DIR.value)
    if files is not None:
        image_files.check_folder(out)
    demo.make_dataset(_DATA_DIR.value)
    print(f"dataset: {_DATA_DIR.value}")
    if _DATASET_ONLY.value:
        return
    if files is None:
        print("nothing was encoded: no model files were given and no shipped model is installed")
        return
    values: dict[str, Any] = {kind: str(path) for kind, path in files.items()}
    if _VARIANTS.value is not None:
        values["variants"] = _VARIANTS.value
    values["selection"] = retriever.selection(files["encoder"].parent)
    config = demo.prepare_config(_DATA_DIR.value, **values)
    _report(
        "prepared folder",
        out,
        preparing.prepare(
            config, out, run=runner(_RUNNER.value, _BEAM.value), replace=_REPLACE.value
        ),
    )


def _report(name: str, folder: "str | pathlib.Path", manifest: dict[str, Any]) -> None:
    """Prints how many documents a folder holds, where its card is, and what was rejected."""
    from leon_jax.prepare import reject_summary

    counts = ", ".join(f"{count} {split}" for split, count in manifest["splits"].items())
    rejected = sum(sum(c["rejected"].values()) for c in manifest["counts"].values())
    print(f"{name}: {folder} ({counts}; {rejected} records rejected)")
    print(f"contents and reasons for rejection: {storage.path(folder) / 'card.md'}")
    for line in reject_summary.lines(folder, manifest):
        print(line, file=sys.stderr)


def _configurations() -> (
    "tuple[PrepareConfig, EncodeConfig | None, dict[str, pathlib.Path] | None]"
):
    """Returns the configurations of the documents and of their encoding.

    The second is None if no models are given. The third has the model files if the selection rules
    are not configured, but those of the encoder.
    """
    from leon_jax.prepare.config import LICENCES, PrepareConfig
    from leon_jax.prepare.encode import EncodeConfig

    values: dict[str, Any] = {}
    if _CONFIG.present:
        values = config_flag.read(_CONFIG, "configs/prepare.py")
    encoding: dict[str, Any] = {
        name: values.pop(name) for name in ("max_tokens", "selection", "variants") if name in values
    }
    rules = dict(values.pop("duplicates", {}))
    encoding |= {name: rules.pop(name) for name in ("near", "evaluation") if name in rules}
    if rules:
        values["duplicates"] = rules
    if _SOURCE.value:
        if "sources" in values:
            raise UserError("--source cannot be used with a --config that sets sources")
        values["sources"] = [dataclasses.asdict(source) for source in map(_source, _SOURCE.value)]
    if _ACCEPT.value:
        values["licences"] = [*values.get("licences", LICENCES), *_ACCEPT.value]
    for key, value in (("picture_side", _SIDE.value), ("held_out", _HELD_OUT.value)):
        if value is not None:
            values[key] = value
    if _VARIANTS.value is not None:
        encoding["variants"] = _VARIANTS.value
    paths = _model_paths(values)
    config = configs.build(PrepareConfig, values)
    if not any(paths.values()):
        return config, None, None
    files = model_files(paths)
    assert files is not None
    encoding |= {kind: str(path) for kind, path in files.items()}
    encode_config = configs.build(EncodeConfig, encoding)
    return config, encode_config, None if "selection" in encoding else files


def _model_paths(values: dict[str, Any]) -> dict[str, str | None]:
    """Returns the model files of the flags, or of `values`, whose entries are removed."""
    flag_of_kind = {"tokenizer": _TOKENIZER, "encoder": _ENCODER, "text": _TEXT}
    in_config = {kind: values.pop(kind, None) for kind in flag_of_kind}
    return {kind: flag.value or in_config[kind] for kind, flag in flag_of_kind.items()}


def _source(text: str) -> "SourceConfig":
    from leon_jax.data.sources.raw_record import SourceConfig

    prefix, colon, path = text.partition(":")
    split, equals, kind = prefix.partition("=")
    if not equals:
        split, kind = "", prefix
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
