"""The place of a prepared folder: held against other processes, and changed as a whole.

A new folder is made beside the old one. The old one is then renamed out of the way and the new one
into its place; a process killed between the two leaves the old one to be put back.
"""

import contextlib
import fcntl
import os
import pathlib
import shutil
import sys
from collections.abc import Iterator

from leon_jax.config import UserError


@contextlib.contextmanager
def hold(folder: pathlib.Path) -> Iterator[None]:
    """Holds a folder, which need not be there, against other processes that would change it.

    What a killed process left in the way of it is put back first. The lock's file stays: were it
    removed, two processes could hold two files of its name.

    Raises:
      UserError: there is no writing beside the folder.
    """
    path = beside(folder, "lock")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or 'the file system refuses it'}"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that changes {folder}", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            raise UserError(
                f"cannot lock {path}: {error.strerror or 'the file system refuses it'}"
            ) from error
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
