"""The demonstration's data set: the one door through which the rest of leon_jax reaches it."""

import os
from typing import Any

from leon_jax.data.sources.raw_record import SourceConfig
from leon_jax.datasets.emoji import make
from leon_jax.datasets.emoji.source import SPLITS, EmojiSource
from leon_jax.prepare.config import DuplicatesConfig, PrepareConfig


def make_dataset(folder: str | os.PathLike) -> None:
    """Draws the data set into `folder`, unless it is there (about 30 s, 25 MB).

    Raises:
      UserError: a package is missing, or `folder` cannot be written.
    """
    make.make(folder)


def source(split: str, folder: str | os.PathLike) -> EmojiSource:
    """One split of the data set in `folder`: documents of a caption and an image.

    Args:
      split: "train", "unseen_design" or "unseen_concept".
      folder: where `make_dataset` drew it.

    Raises:
      UserError: there is no such split, or no data set in `folder`, or it cannot be read.
    """
    return EmojiSource(split, folder)


def prepare_config(folder: str | os.PathLike, **values: Any) -> PrepareConfig:
    """What `leon prepare` does with the data set: images stay at 96 pixels, nothing is dropped.

    Designs of one concept, skin tones and flags are near copies of each other on purpose.

    Args:
      folder: of the data set, as for `make_dataset`.
      values: further fields of `PrepareConfig`, the model files among them.
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
    """Makes the prepared folder `out_dir` from the data set in `folder`; both are made if missing.

    Args:
      folder: of the data set.
      out_dir: the prepared folder; an older one with other inputs is replaced.
      values: as for `prepare_config`.

    Returns:
      The manifest.

    Raises:
      UserError: a package or a model file is missing, or a folder cannot be written.
    """
    # Loaded only here: programs that read the data set prepare nothing.
    from leon_jax.prepare import prepare as preparing

    make_dataset(folder)
    return preparing.prepare(prepare_config(folder, **values), out_dir)
