"""A lock between processes: a file that one of them holds, and that its end releases."""

import contextlib
import fcntl
import pathlib
from collections.abc import Callable, Iterator

from leon_jax.config import UserError


class NoLocks(UserError):
    """A file system, such as some mounts of Lustre, has no locks."""


@contextlib.contextmanager
def hold(path: pathlib.Path, on_busy: Callable[[], None]) -> Iterator[None]:
    """Holds the lock of a file; the end of the process releases it, however it ends.

    The file stays: were it removed, two processes could hold two files of its name.

    Args:
      path: made if it does not exist.
      on_busy: called if another process holds the lock. The lock is waited for unless it raises.

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
