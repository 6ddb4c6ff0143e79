"""A file lock between processes, which the end of the holding process releases."""

import contextlib
import fcntl
import pathlib
from collections.abc import Callable, Iterator

from leon_jax.config import UserError


class NoLocks(UserError):
    """The file system has no locks, like some mounts of Lustre."""


@contextlib.contextmanager
def hold(path: pathlib.Path, on_busy: Callable[[], None]) -> Iterator[None]:
    """Holds the lock of a file. The end of the process, of any kind, also releases it.

    The file is not removed. Otherwise two processes could lock two different files of this name.

    Args:
      path: path of the lock file, which is created if it does not exist.
      on_busy: called if another process holds the lock. The call may raise an exception; otherwise
        this function waits for the lock.

    Raises:
      NoLocks: the file system of `path` has no locks.
      UserError: the file cannot be written.
    """
    try:
        file = path.open("w")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    with file:
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                on_busy()
                fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            raise NoLocks(f"{path} cannot be locked: {error.strerror}") from error
        yield
