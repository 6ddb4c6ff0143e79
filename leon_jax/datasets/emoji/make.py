"""Renders the emoji dataset into a TensorFlow Datasets folder. It needs no TensorFlow."""

import contextlib
import fcntl
import os
import pathlib
from collections.abc import Iterator

from leon_jax.config import UserError
from leon_jax.datasets.emoji.source import is_prepared


def make(data_dir: str | os.PathLike) -> None:
    """Renders the dataset into `data_dir`, unless it exists (about 30 s, 25 MB).

    It shows its progress. The folder is renamed into place once it is complete. If two processes
    render, the second waits for the first.

    Raises:
      UserError: a package is missing, or `data_dir` cannot be written.
    """
    if is_prepared(data_dir):
        return
    try:
        from leon_jax.datasets.emoji import builder
    except ImportError as error:
        raise UserError(
            f"the emoji dataset needs the package {error.name}; run: pip install leon_jax[demo]"
        ) from error
    import tensorflow_datasets as tfds

    with _lock(data_dir):
        if is_prepared(data_dir):
            return
        emoji = builder.Emoji(data_dir=os.fspath(data_dir), file_format="array_record")
        emoji.download_and_prepare(
            download_config=tfds.download.DownloadConfig(try_download_gcs=False, num_shards=1)
        )


@contextlib.contextmanager
def _lock(data_dir: str | os.PathLike) -> Iterator[None]:
    """Holds the lock of `data_dir`, so that no other process renders into it."""
    try:
        pathlib.Path(data_dir).mkdir(parents=True, exist_ok=True)
        file = (pathlib.Path(data_dir) / ".emoji.lock").open("w")
    except OSError as error:
        raise UserError(f"cannot write to {os.fspath(data_dir)}: {error.strerror}") from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
