"""The emoji dataset. The rest of leon_jax accesses it only through this module."""

import os
from typing import Any

from leon_jax.data.records import RecordSource
from leon_jax.data.sources.raw_record import SourceConfig
from leon_jax.datasets.emoji import make
from leon_jax.datasets.emoji.designs import TWEMOJI
from leon_jax.datasets.emoji.source import SPLITS, EmojiSource
from leon_jax.documents import Document
from leon_jax.prepare.config import DuplicatesConfig, PrepareConfig


def make_dataset(folder: str | os.PathLike) -> None:
    """Renders the dataset into `folder`, unless it exists (about 30 s, 25 MB).

    Raises:
      UserError: a package is missing, or `folder` cannot be written.
    """
    make.make(folder)


def source(split: str, folder: str | os.PathLike) -> EmojiSource:
    """Opens a split of the dataset in `folder`; its documents have a caption and an image.

    Args:
      split: "train", "unseen_design" or "unseen_concept".
      folder: the folder of `make_dataset`.

    Raises:
      UserError: the split or the dataset does not exist, or the dataset cannot be read.
    """
    return EmojiSource(split, folder)


def prepare_config(folder: str | os.PathLike, **values: Any) -> PrepareConfig:
    """Returns the configuration that prepares the dataset: 96-pixel images, no duplicates dropped.

    Duplicates remain because designs of one concept, skin tones and flags are similar on purpose.

    Args:
      folder: the folder of `make_dataset`.
      values: other fields of `PrepareConfig`, such as the model files.
    """
    return PrepareConfig(
        sources=tuple(
            SourceConfig("emoji", os.fspath(folder), split=split, shard_size=1000)
            for split in SPLITS
        ),
        picture_side=96,
        duplicates=DuplicatesConfig(exact=False),
        **values,
    )


def prepare_documents(
    folder: str | os.PathLike, out_dir: str | os.PathLike, **values: Any
) -> dict[str, Any]:
    """Prepares the dataset in `folder` into `out_dir`; a missing dataset is rendered first.

    Args:
      folder: the folder of the dataset.
      out_dir: the prepared folder; one with other inputs or settings is replaced.
      values: as for `prepare_config`.

    Returns:
      The manifest.

    Raises:
      UserError: a package or a model file is missing, or a folder cannot be written.
    """
    # Import late: most programs read the dataset without preparing it.
    from leon_jax.prepare import prepare as preparing

    make_dataset(folder)
    return preparing.prepare(prepare_config(folder, **values), out_dir)


def seen_documents(train: RecordSource, count: int) -> list[Document]:
    """Returns the first documents of the train split in the design that is held out elsewhere.

    Args:
      train: the train split of the prepared emoji.
      count: the number of documents.
    """
    chosen = []
    for row in range(len(train)):
        document = train[row]
        provenance = document.provenance
        if provenance is not None and provenance.key.startswith(f"{TWEMOJI.name}/"):
            chosen.append(document)
        if len(chosen) == count:
            break
    return chosen
