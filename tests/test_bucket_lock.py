"""Tests the lock of a folder in a bucket: taking, renewing, losing it."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from leon_jax import bucket_lock, storage
from leon_jax.bucket_lock import BucketLock, Holder
from leon_jax.config import UserError


@pytest.fixture
def folder(gs_folder) -> pathlib.Path:
    """An empty folder in a bucket."""
    return storage.path(gs_folder)


def test_an_object_is_written_only_if_it_has_the_stated_generation(gs_folder):
    path = storage.path(gs_folder) / "lock"
    with pytest.raises(FileNotFoundError):
        bucket_lock.read_generation(path)
    first = bucket_lock.write_generation(path, b"1", 0)
    with pytest.raises(FileExistsError):
        bucket_lock.write_generation(path, b"2", 0)
    second = bucket_lock.write_generation(path, b"3", first)
    assert second != first
    with pytest.raises(FileExistsError):
        bucket_lock.write_generation(path, b"4", first)
    content, generation, age = bucket_lock.read_generation(path)
    assert (content, generation) == (b"3", second) and 0 <= age < 30
    with pytest.raises(FileExistsError):
        bucket_lock.remove_generation(path, first)
    bucket_lock.remove_generation(path, second)
    bucket_lock.remove_generation(path, second)
    assert not path.exists()


def test_a_repeated_request_does_not_conflict_with_itself(gs_folder):
    """An answer is lost, so the request is sent again."""
    path = storage.path(gs_folder) / "lock"
    generation = bucket_lock.write_generation(path, b"1", 0)
    assert bucket_lock.write_generation(path, b"1", 0) == generation


def lock(folder: pathlib.Path, sentences: list[str] | None = None) -> BucketLock:
    on_loss = (sentences if sentences is not None else []).append
    return BucketLock(folder / "lock.json", on_loss, 0.2, 3.0)


HOLDER = """
import sys, time
from leon_jax import bucket_lock, storage
bucket_lock.RENEW_SECONDS, bucket_lock.STALE_SECONDS = 0.2, 2.0
with bucket_lock.hold(storage.path(sys.argv[1]) / "lock.json"):
    print("holds", flush=True)
    time.sleep(100)
"""


def test_a_paused_process_ends_when_it_wakes(folder):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)],
        env={**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[1])},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout.readline() == "holds\n"
    with pytest.raises(UserError, match="another run is writing"):
        lock(folder)
    holder.send_signal(signal.SIGSTOP)
    time.sleep(4)
    taken = lock(folder)
    holder.send_signal(signal.SIGCONT)
    assert "this process was paused for" in holder.communicate(timeout=60)[1]
    assert holder.returncode == 1
    taken.check()
    taken.release()


def test_the_next_attempt_of_a_run_takes_its_lock_at_once(folder, monkeypatch):
    monkeypatch.setenv("LEON_RUN", "cats")
    sentences: list[str] = []
    first = lock(folder, sentences)
    with pytest.raises(UserError, match=r"another run is writing into .*: run cats, attempt 0"):
        lock(folder)
    monkeypatch.setenv("LEON_RUN", "dogs")
    monkeypatch.setenv("LEON_ATTEMPT", "1")
    with pytest.raises(UserError, match="another run is writing"):
        lock(folder)
    monkeypatch.setenv("LEON_RUN", "cats")
    second = lock(folder)
    with pytest.raises(UserError, match="another run has taken"):
        first.check()
    end = time.monotonic() + 10
    while not sentences and time.monotonic() < end:
        time.sleep(0.05)
    assert sentences and "another run has taken" in sentences[0]
    first.release()
    second.check()
    second.release()
    assert not (folder / "lock.json").exists()


def test_a_renewed_lock_stays_and_an_old_one_is_free(folder):
    first = lock(folder)
    time.sleep(4)
    with pytest.raises(UserError, match="another run is writing"):
        lock(folder)
    first._ended.set()  # the holder stops renewing
    time.sleep(4.5)
    lock(folder).release()


def test_only_a_process_of_this_host_that_does_not_exist_is_replaced():
    this = Holder.this_process()
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    values = {"run": "", "attempt": 0, "host": "h", "key": "k"}
    assert this.replaces(Holder(**values, process=child.pid, system=this.system))
    assert not this.replaces(Holder(**values, process=child.pid, system="another host"))
    assert not this.replaces(Holder(**values, process=os.getppid(), system=this.system))


def test_the_times_are_those_of_the_documentation():
    assert (bucket_lock.RENEW_SECONDS, bucket_lock.STALE_SECONDS) == (10, 60)
