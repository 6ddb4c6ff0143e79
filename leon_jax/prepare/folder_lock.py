"""The place of a prepared folder: held against other processes, and changed as a whole.

A new folder is made beside the old one. The old one is then renamed out of the way and the new one
into its place; a process killed between the two leaves the old one to be put back.
"""

import contextlib
import os
import pathlib
import shutil
import sys
from collections.abc import Iterator

from leon_jax import file_lock
from leon_jax.config import UserError


@contextlib.contextmanager
def hold(folder: pathlib.Path) -> Iterator[None]:
    """Holds a folder, which need not be there, against other processes that would change it.

    What a killed process left in the way of it is put back first.

    Raises:
      UserError: there is no writing beside the folder.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write {folder.parent}: {error.strerror or 'the file system refuses it'}"
        ) from error

    def on_busy() -> None:
        print(f"waiting for another process that changes {folder}", file=sys.stderr)

    with file_lock.hold(beside(folder, "lock"), on_busy):
        old = beside(folder, "replaced")
        if old.exists() and not folder.exists():
            os.rename(old, folder)
        shutil.rmtree(old, ignore_errors=True)
        yield


def replace(folder: pathlib.Path, new: pathlib.Path) -> None:
    """Puts a complete folder in the place of another one, if there is one. Call it in `hold`."""
    old = beside(folder, "replaced")
    if folder.exists():
        os.rename(folder, old)
    os.rename(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def beside(folder: pathlib.Path, what: str) -> pathlib.Path:
    """A hidden name beside a folder, for example `.data.lock`."""
    return folder.parent / f".{folder.name}.{what}"
