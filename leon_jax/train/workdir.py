"""The folder of a training run: its lock, and the files that grow.

In a bucket an object cannot grow. There, process 0 writes such files into a temporary folder on its
disk, and a thread copies those that have changed to the bucket.
"""

import concurrent.futures
import contextlib
import pathlib
import sys
import tempfile
import time
from collections.abc import Iterator

import jax

from leon_jax import bucket_lock, file_lock, storage
from leon_jax.bucket_lock import BucketLock
from leon_jax.config import UserError
from leon_jax.train.replicas import on_all_processes

# Seconds between two copies of growing files to a bucket.
_COPY_SECONDS = 30.0
# What a run goes on with after a restart.
_CONTINUED = ("metrics.jsonl", "goodput.json", "hosts.jsonl", "tracker.json")


class Workdir:
    """The folder of a run, locked against other runs. Create it with `open_workdir`.

    Attributes:
      path: the folder, on a disk or in a bucket.
      files: the folder on a disk for growing files: `path` itself, or a temporary folder.
    """

    def __init__(self, path: pathlib.Path, files: pathlib.Path, lock: BucketLock | None) -> None:
        self.path, self.files, self._lock = path, files, lock
        self._copied: dict[pathlib.Path, tuple[int, int]] = {}
        self._executor = concurrent.futures.ThreadPoolExecutor(1)
        self._copying: concurrent.futures.Future[None] | None = None
        self._copy_time = time.monotonic()

    def check_lock(self) -> None:
        """Makes sure that this run still has the lock, if it is in a bucket.

        Raises:
          UserError: another run has taken it.
          OSError: the bucket cannot be read or written.
        """
        if self._lock is not None:
            self._lock.check()

    def copy_files(self, wait: bool = False) -> None:
        """Copies files that have changed to the bucket, if the last copy is old.

        Args:
          wait: copy them in any case, and return when they are there.

        Raises:
          UserError: another run has taken the lock.
          OSError: this or the previous copy failed.
        """
        if self._lock is None:
            return
        is_copying = self._copying is not None and not self._copying.done()
        if not wait and (is_copying or time.monotonic() - self._copy_time < _COPY_SECONDS):
            return
        if self._copying is not None:
            self._copying.result()
        self._copy_time = time.monotonic()
        self._copying = self._executor.submit(self._copy)
        if wait:
            self._copying.result()

    def close(self) -> None:
        """Ends the thread."""
        self._executor.shutdown()

    def _copy(self) -> None:
        changed = {}
        for file in sorted(self.files.rglob("*")):
            about = file.stat()
            state = about.st_size, about.st_mtime_ns
            if file.is_file() and file.suffix != ".tmp" and self._copied.get(file) != state:
                changed[file] = state
        if not changed:
            return
        self.check_lock()
        for file, state in changed.items():
            storage.write(self.path / str(file.relative_to(self.files)), file.read_bytes())
            self._copied[file] = state


@contextlib.contextmanager
def open_workdir(path: pathlib.Path) -> Iterator[Workdir]:
    """Creates and locks the folder of a run. Process 0 holds the lock for all processes.

    At the end the last files are copied to the bucket.

    Raises:
      UserError: another run holds the lock.
      OSError: the folder cannot be written.
    """
    storage.make_folder(path)
    with contextlib.ExitStack() as stack:
        refusal, lock = None, None
        if jax.process_index() == 0:
            try:
                lock = _lock(path, stack)
            except UserError as error:
                refusal = error
        if not on_all_processes(refusal is None):
            raise refusal or UserError(f"process 0 cannot use {path}; its error says why")
        files = path
        if storage.is_bucket(path):
            files = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="leon-")))
        workdir = Workdir(path, files, lock)
        stack.callback(workdir.close)
        if lock is not None:
            for name in _CONTINUED:
                with contextlib.suppress(FileNotFoundError):
                    (files / name).write_bytes((path / name).read_bytes())
        try:
            yield workdir
        except BaseException:
            with contextlib.suppress(OSError, UserError):  # the first error is the one to report
                workdir.copy_files(wait=True)
            raise
        workdir.copy_files(wait=True)


def _lock(path: pathlib.Path, stack: contextlib.ExitStack) -> BucketLock | None:
    """Locks a folder until `stack` is closed; returns the lock if it is in a bucket."""

    def refuse() -> None:
        raise UserError(
            f"another run is training in {path}; wait for its end, or use another --workdir"
        )

    if storage.is_bucket(path):
        return stack.enter_context(bucket_lock.hold(path / "lock.json"))
    try:
        stack.enter_context(file_lock.hold(path / "lock", refuse))
    except file_lock.NoLocks as error:
        print(f"{error}; a second run in {path} will not be detected", file=sys.stderr)
    return None
