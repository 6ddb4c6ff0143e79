"""Reads the emoji dataset: each split is a sequence of documents with random access.

The dataset is a TensorFlow Datasets folder that `make.py` renders. Reading needs no TensorFlow.
"""

import os
import pathlib
from collections.abc import Iterator
from typing import Any, Literal, get_args

from leon_jax.config import UserError
from leon_jax.data.records import from_png
from leon_jax.datasets.emoji.captions import variants
from leon_jax.datasets.emoji.splits import family
from leon_jax.documents import Document, Image, Provenance, Text

Split = Literal["train", "unseen_design", "unseen_concept"]

SPLITS: tuple[str, ...] = get_args(Split)
# Increase it when an image, a caption or a split changes; an old folder then remains unchanged.
VERSION = "1.0.0"


def is_prepared(data_dir: str | os.PathLike) -> bool:
    """Tells whether `make.make` has completed in this folder."""
    return (dataset_folder(data_dir) / "dataset_info.json").is_file()


class EmojiSource:
    """One split as a sequence of documents; a Grain data source.

    Args:
      split: "train" (both designs, a quarter of the Twemoji captions in 13 other languages),
        "unseen_design" (Twemoji images of concepts that train has only as OpenMoji images) or
        "unseen_concept" (both designs of concepts that are not in train).
      data_dir: the folder of `make.make`.

    `source[i]` is Document((Text(caption), Image(pixels=uint8[96, 96, 3])), provenance). The group
    of a document is its concept, and its family is that of `splits.family`. A source can be
    pickled; another process opens the files again.

    Raises:
      UserError: the split or the dataset does not exist, or the dataset cannot be read.
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
        """Returns the caption, the stored PNG file and the provenance of a document."""
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
        concept = fields["key"].partition("/")[2]
        provenance = Provenance(
            **fields, group=concept, family=family(concept), captions=variants(caption)
        )
        return caption, record["picture"], provenance

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
        folder = dataset_folder(self.data_dir)
        try:
            # Skip decoding: tensorflow-datasets would need OpenCV; `from_png` decodes instead.
            return tfds.builder_from_directory(folder).as_data_source(
                self.split, decoders={"picture": tfds.decode.SkipDecoding()}
            )
        except Exception as error:
            raise UserError(
                f"the emoji dataset in {folder} cannot be read; remove the folder and run: "
                "leon prepare"
            ) from error


def dataset_folder(data_dir: str | os.PathLike) -> pathlib.Path:
    """Returns the folder where TensorFlow Datasets stores the builder `Emoji`."""
    return pathlib.Path(data_dir) / "emoji" / VERSION
