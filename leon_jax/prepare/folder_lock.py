"""Locks a folder of `leon prepare` against other processes, and replaces it as a whole.

A new folder is built beside the old one. The old folder is renamed to a backup, then the new folder
is renamed to the final name. If a process is killed between the two renames, the next one restores
the backup.
"""

import contextlib
import os
import pathlib
import shutil
import sys
from collections.abc import Iterator

from leon_jax import bucket_lock, file_lock, storage
from leon_jax.config import UserError


@contextlib.contextmanager
def hold(folder: pathlib.Path, on_disk: pathlib.Path | None = None) -> Iterator[None]:
    """Holds the lock of a folder, so that no other process changes it.

    If a killed process left a backup of the folder, the backup is restored first. A folder in an
    S3 bucket is locked only against processes of this host.

    Args:
      folder: path of the folder; it need not exist.
      on_disk: for a folder in a bucket, the path of its copy on the disk, which is locked too.

    Raises:
      UserError: the parent folder is not writable, or another host holds the lock of a bucket.
    """
    if storage.is_bucket(folder):
        assert on_disk is not None
        with contextlib.ExitStack() as stack:
            stack.enter_context(hold(on_disk))
            if str(folder).startswith("gs://"):
                stack.enter_context(bucket_lock.hold(beside(folder, "lock") / "lock.json"))
            yield
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write {folder.parent}: {error.strerror or 'the file system refuses it'}"
        ) from error

    def on_busy() -> None:
        print(f"waiting for another process that is changing {folder}", file=sys.stderr)

    with file_lock.hold(beside(folder, "lock"), on_busy):
        backup = beside(folder, "replaced")
        if backup.exists() and not folder.exists():
            os.rename(backup, folder)
        shutil.rmtree(backup, ignore_errors=True)
        yield


def replace(folder: pathlib.Path, new: pathlib.Path) -> None:
    """Renames the complete folder `new` to `folder`, which may exist. Call it within `hold`."""
    backup = beside(folder, "replaced")
    if folder.exists():
        os.rename(folder, backup)
    os.rename(new, folder)
    shutil.rmtree(backup, ignore_errors=True)


def beside(folder: pathlib.Path, suffix: str) -> pathlib.Path:
    """Returns a hidden path beside a folder, for example `.data.lock`."""
    return folder.parent / f".{folder.name}.{suffix}"
