"""The lock of a folder in a bucket: an object that its holder writes again and again.

The object is created only if it is absent, and later replaced only if it has the generation of the
holder's last write. So at most one run holds it. A lock that was not renewed for `STALE_SECONDS` is
free. Its age is the difference of two times of the server: no host's clock matters.

A holder that was paused for so long (a suspended machine, a moved virtual one) ends when it wakes.
Requests that were on their way may still arrive, only into the checkpoint that it was writing. That
checkpoint is not complete; if another run writes the same step, its checksums detect a mixture, and
a restart takes the checkpoint before it.
"""

import contextlib
import dataclasses
import datetime
import email.utils
import errno
import json
import os
import pathlib
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator

from leon_jax import storage
from leon_jax.config import UserError

RENEW_SECONDS, STALE_SECONDS = 10.0, 60.0
# The body of an upload: the description of the object, and its content.
_MULTIPART = (
    b"--part\r\nContent-Type: application/json\r\n\r\n%b\r\n"
    b"--part\r\nContent-Type: application/octet-stream\r\n\r\n%b\r\n--part--"
)


@dataclasses.dataclass(frozen=True)
class Holder:
    """Who holds a lock.

    Attributes:
      run: the name of the run, $LEON_RUN or $SLURM_JOB_ID; "" if it has none.
      attempt: the number of the run's start, $LEON_ATTEMPT or $SLURM_RESTART_COUNT.
      host: the name of the host.
      process: the number of the process there.
      system: identifies the processes that this number belongs to: the start of the host, and the
        container.
      key: identifies the holder; random.
    """

    run: str
    attempt: int
    host: str
    process: int
    system: str
    key: str

    @classmethod
    def this_process(cls) -> "Holder":
        """Returns this process as a holder."""
        system = ""
        with contextlib.suppress(OSError):  # not Linux
            boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            system = f"{boot} {os.readlink('/proc/self/ns/pid')}"
        attempt = os.environ.get("LEON_ATTEMPT") or os.environ.get("SLURM_RESTART_COUNT") or "0"
        return cls(
            os.environ.get("LEON_RUN") or os.environ.get("SLURM_JOB_ID") or "",
            int(attempt) if attempt.isdecimal() else 0,
            socket.gethostname(),
            os.getpid(),
            system,
            uuid.uuid4().hex,
        )

    def replaces(self, other: "Holder") -> bool:
        """Returns whether the other holder must have ended.

        That is so if it is an earlier attempt of the same run, or a process of this host that does
        not exist any more.
        """
        if self.run and self.run == other.run and self.attempt > other.attempt:
            return True
        if not self.system or self.system != other.system or self.process == other.process:
            return False
        try:
            os.kill(other.process, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        return False

    def __str__(self) -> str:
        run = f"run {self.run}, " if self.run else ""
        return f"{run}attempt {self.attempt}, process {self.process} on {self.host}"


class BucketLock:
    """Holds the lock of a folder; a thread renews it.

    Args:
      path: the object of the lock, in a `gs://` bucket.
      on_loss: called in the thread, with a sentence, if another process has taken the lock.
      renew_seconds, stale_seconds: times.

    Raises:
      UserError: another run holds the lock.
      OSError: the bucket cannot be read or written.
    """

    def __init__(
        self,
        path: pathlib.Path,
        on_loss: Callable[[str], None],
        renew_seconds: float,
        stale_seconds: float,
    ) -> None:
        self._path, self._on_loss = path, on_loss
        self._renew_seconds, self._stale_seconds = renew_seconds, stale_seconds
        self._holder, self._renewals = Holder.this_process(), 0
        self._mutex, self._ended = threading.Lock(), threading.Event()
        self._generation = self._take()
        self._thread = threading.Thread(target=self._renew_always, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Renews the lock, and so makes sure that this process holds it.

        Raises:
          UserError: another process has taken it.
          OSError: the bucket cannot be read or written.
        """
        with self._mutex:
            try:
                self._generation = write_generation(self._path, self._content(), self._generation)
            except FileExistsError as error:
                raise UserError(self._loss()) from error

    def release(self) -> None:
        """Removes the lock, if this process still holds it."""
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            remove_generation(self._path, self._generation)

    def _take(self) -> int:
        while True:
            try:
                return write_generation(self._path, self._content(), 0)
            except FileExistsError:
                pass
            try:
                content, generation, age = read_generation(self._path)
            except FileNotFoundError:  # released in between
                continue
            try:
                holder = Holder(**json.loads(content)["holder"])
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{self._path} is not a lock of this version; remove it if no run is writing"
                ) from error
            if age < self._stale_seconds and not self._holder.replaces(holder):
                raise UserError(
                    f"another run is writing into {self._path.parent}: {holder}; wait for its "
                    f"end, or name another folder (its lock is {age:.0f} s old; if it has died, "
                    f"the folder is free when the lock is {self._stale_seconds:.0f} s old)"
                )
            with contextlib.suppress(FileExistsError):  # another process was faster
                generation = write_generation(self._path, self._content(), generation)
                print(f"took the lock of {self._path.parent} from {holder}", file=sys.stderr)
                return generation

    def _content(self) -> bytes:
        self._renewals += 1
        values = {"holder": dataclasses.asdict(self._holder), "renewals": self._renewals}
        return json.dumps(values).encode()

    def _renew_always(self) -> None:
        start = time.monotonic()
        while not self._ended.wait(self._renew_seconds):
            if time.monotonic() - start > self._stale_seconds:
                # No request before the end: others of this process might be faster.
                self._on_loss(
                    f"this process was paused for {time.monotonic() - start:.0f} s, so its lock of "
                    f"{self._path.parent} is not valid any more; run the same command again"
                )
                return
            try:
                self.check()
            except UserError as error:
                self._on_loss(str(error))
                return
            except OSError as error:  # the bucket may answer again before the lock is stale
                print(f"the lock {self._path} is not renewed: {error}", file=sys.stderr)
            start = time.monotonic()

    def _loss(self) -> str:
        return (
            f"another run has taken {self._path.parent}, because this process did not renew its "
            "lock in time; this process ends and leaves the folder to it"
        )


@contextlib.contextmanager
def hold(path: pathlib.Path) -> Iterator[BucketLock]:
    """Holds a lock within the context. If it is lost, the process ends at once with exit code 1.

    Raises:
      UserError: another run holds the lock.
      OSError: the bucket cannot be read or written.
    """
    lock = BucketLock(path, _end_process, RENEW_SECONDS, STALE_SECONDS)
    try:
        yield lock
    finally:
        lock.release()


def _end_process(sentence: str) -> None:
    """Ends the process without further writes, even those of other threads."""
    print(f"leon: {sentence}", file=sys.stderr, flush=True)
    os._exit(1)


def read_generation(target: pathlib.Path) -> tuple[bytes, int, float]:
    """Reads an object of Cloud Storage and its generation, a number that each write changes.

    Returns:
      The content, the generation, and the seconds since it was written, by the server's clock.

    Raises:
      FileNotFoundError: there is no such object.
      OSError: it cannot be read.
    """
    files = storage.file_system(target)
    bucket, name = _bucket_and_name(target)
    with storage.as_os_errors(target):
        while True:
            headers, text = files.call("GET", "b/{}/o/{}", bucket, name)
            about = json.loads(text)
            generation = int(about["generation"])
            written = datetime.datetime.fromisoformat(about["updated"])
            age = email.utils.parsedate_to_datetime(headers["Date"]) - written
            with contextlib.suppress(FileNotFoundError):  # it was written again in between
                _, content = files.call(
                    "GET", "b/{}/o/{}", bucket, name, alt="media", generation=generation
                )
                return content, generation, max(0.0, age.total_seconds())


def write_generation(target: pathlib.Path, content: bytes, generation: int) -> int:
    """Writes an object of Cloud Storage if it has a generation.

    Args:
      target: the object.
      content: its new content, which no other process writes.
      generation: the generation that the object must have; 0: it must not exist.

    Returns:
      The new generation.

    Raises:
      FileExistsError: the object has another generation.
      OSError: it cannot be written.
    """
    files = storage.file_system(target)
    bucket, name = _bucket_and_name(target)
    with storage.as_os_errors(target):
        try:
            about = files.call(
                "POST",
                f"{files._location}/upload/storage/v1/b/{{}}/o",
                bucket,
                uploadType="multipart",
                ifGenerationMatch=str(generation),
                headers={"Content-Type": "multipart/related; boundary=part"},
                data=_MULTIPART % (json.dumps({"name": name}).encode(), content),
                json_out=True,
            )
            return int(about["generation"])
        except FileExistsError:
            # A request is repeated if its answer is lost, and then conflicts with itself.
            with contextlib.suppress(FileNotFoundError):
                written, new_generation, _ = read_generation(target)
                if written == content:
                    return new_generation
            raise


def remove_generation(target: pathlib.Path, generation: int) -> None:
    """Removes an object of Cloud Storage if it has a generation; nothing if it does not exist.

    Raises:
      FileExistsError: the object has another generation.
      OSError: it cannot be removed.
    """
    bucket, name = _bucket_and_name(target)
    with storage.as_os_errors(target), contextlib.suppress(FileNotFoundError):
        if read_generation(target)[1] != generation:
            raise FileExistsError(errno.EEXIST, "it has another generation", os.fspath(target))
        storage.file_system(target).call(
            "DELETE", "b/{}/o/{}", bucket, name, ifGenerationMatch=str(generation)
        )


def _bucket_and_name(target: pathlib.Path) -> tuple[str, str]:
    bucket, _, name = os.fspath(target)[5:].partition("/")
    return bucket, name
