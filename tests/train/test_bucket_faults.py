"""Faults of a bucket, made by a proxy that gcsfs and TensorStore go through.

They are retried, or refused in one sentence; nothing is lost.
"""

import contextlib
import dataclasses
import os
import pathlib
import random
import threading
import time
from unittest import mock

import numpy as np
import pytest

from leon_jax import storage
from leon_jax.config import UserError
from leon_jax.train import training_loop
from tests import buckets
from tests.bucket_proxy import proxy
from tests.train.test_training_loop import SETTINGS, ToyConfig, ToyProgram, exported_kernel


@contextlib.contextmanager
def disturbed(url: str, fault):
    """Sends the requests of gcsfs and TensorStore through a proxy within the context."""
    with (
        proxy(url, fault) as address,
        mock.patch.dict(os.environ, buckets.cloud_storage_environment(address)),
    ):
        yield


@pytest.mark.parametrize("fault", ["503", "reset", 1.0, pytest.param(5.0, marks=pytest.mark.slow)])
def test_a_disturbed_request_is_repeated(cloud_storage, gs_folder, tmp_path, monkeypatch, fault):
    monkeypatch.setenv("LEON_CACHE", str(tmp_path))
    folder = storage.path(gs_folder)
    requests: list[str] = []

    def every_fourth(number: int, request: str) -> str | float | None:
        requests.append(request)
        return fault if number % 4 == 2 else None

    with disturbed(cloud_storage, every_fourth):
        for name in ("a", "b"):
            storage.write(folder / name, name * 1000)
        assert (folder / "a").read_text() == "a" * 1000
        copy = storage.local(folder)
        assert sorted(path.name for path in copy.iterdir()) == ["a", "b"]
        storage.remove(folder / "a")
    assert len(requests) > 5
    assert sorted(storage._objects(gs_folder)) == ["b"]


def test_a_missing_permission_is_one_sentence(cloud_storage, gs_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("LEON_CACHE", str(tmp_path))

    def no_writes(number: int, request: str) -> str | None:
        return None if request.startswith(("GET", "HEAD")) else "403"

    run = storage.path(gs_folder)
    with disturbed(cloud_storage, no_writes):
        with pytest.raises(UserError) as failure:
            training_loop.run(ToyProgram(ToyConfig(4)), SETTINGS, run)
        with pytest.raises(OSError, match="the permission is missing"):
            storage.write(run / "file", "")
    assert str(failure.value).startswith(f"{run}/lock.json cannot be written: the permission is")
    with disturbed(cloud_storage, lambda number, request: "403"), pytest.raises(UserError) as none:
        storage.local(run)
    assert "the permission is missing" in str(none.value)


def test_a_disturbed_run_gives_the_model_of_a_run_on_a_disk(
    cloud_storage, gs_folder, tmp_path, monkeypatch
):
    """Each start writes one checkpoint; the second restores that of the first."""
    settings = dataclasses.replace(SETTINGS, save_every=100)
    training_loop.run(ToyProgram(ToyConfig(7)), settings, tmp_path / "disk")
    rng, mutex, faults = random.Random(0), threading.Lock(), []

    def some(number: int, request: str) -> str | float | None:
        with mutex:
            if rng.random() >= 0.08:
                return None
            faults.append(rng.choice(["503", "reset", 0.2]))
            return faults[-1]

    run: pathlib.Path = storage.path(gs_folder)
    with disturbed(cloud_storage, some):
        training_loop.run(ToyProgram(ToyConfig(5)), settings, run)
        training_loop.run(ToyProgram(ToyConfig(7)), settings, run)
    assert len(faults) > 5
    monkeypatch.setenv("LEON_CACHE", str(tmp_path / "cache"))
    np.testing.assert_array_equal(exported_kernel(run), exported_kernel(tmp_path / "disk"))


def test_a_bucket_that_fails_for_long_ends_the_run_and_loses_nothing(
    cloud_storage, gs_folder, tmp_path, monkeypatch
):
    """From some request on, writes are refused; the run resumes when they are not."""
    training_loop.run(ToyProgram(ToyConfig(12)), SETTINGS, tmp_path / "disk")
    run, has_failed = storage.path(gs_folder), threading.Event()

    def from_second_checkpoint(number: int, request: str) -> str | None:
        if "checkpoints/8/" in request and request.startswith("POST"):
            has_failed.set()
        return "403" if has_failed.is_set() and not request.startswith("GET") else None

    with disturbed(cloud_storage, from_second_checkpoint), pytest.raises(UserError) as failure:
        training_loop.run(ToyProgram(ToyConfig(12)), SETTINGS, run)
    assert len(str(failure.value).splitlines()) == 1 and str(run) in str(failure.value)
    # The lock could not be removed.
    monkeypatch.setattr("leon_jax.bucket_lock.RENEW_SECONDS", 0.5)
    monkeypatch.setattr("leon_jax.bucket_lock.STALE_SECONDS", 5.0)
    time.sleep(6)
    training_loop.run(ToyProgram(ToyConfig(12)), SETTINGS, run)
    monkeypatch.setenv("LEON_CACHE", str(tmp_path / "cache"))
    np.testing.assert_array_equal(exported_kernel(run), exported_kernel(tmp_path / "disk"))
