"""Tests runs whose workdir is in a Cloud Storage bucket: resumption, the lock, damage, kills."""

import dataclasses
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from leon_jax import bucket_lock, sharding, storage
from leon_jax.cli import main
from leon_jax.config import UserError
from leon_jax.train import training_loop, workdir
from leon_jax.train.checkpoint import complete_steps
from tests.train.test_training_loop import SETTINGS, ToyConfig, ToyProgram, exported_kernel


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    """Returns the kernel of a run of 30 steps on a disk."""
    path = tmp_path_factory.mktemp("on_disk")
    with jax.set_mesh(sharding.make_mesh((1, 1, 1, 1), jax.devices()[:1])):
        training_loop.run(ToyProgram(ToyConfig(30)), SETTINGS, path)
    return exported_kernel(path)


@pytest.fixture
def run(gs_folder, tmp_path, monkeypatch) -> pathlib.Path:
    """A new workdir in the bucket."""
    monkeypatch.setenv("LEON_CACHE", str(tmp_path / "cache"))
    return storage.path(gs_folder) / "run"


def metrics_steps(run: pathlib.Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_two_starts_in_a_bucket_give_the_model_of_one_on_a_disk(run, on_disk):
    training_loop.run(ToyProgram(ToyConfig(13)), SETTINGS, run)
    assert complete_steps(run / "checkpoints") == [12, 13]
    milestones = dataclasses.replace(SETTINGS, keep=1, keep_every=10)
    training_loop.run(ToyProgram(ToyConfig(30)), milestones, run)
    assert complete_steps(run / "checkpoints") == [20, 30]
    np.testing.assert_array_equal(exported_kernel(run), on_disk)
    assert metrics_steps(run) == [3, 6, 9, 12, 13, 15, 18, 21, 24, 27, 30]
    assert len(list((run / "samples").glob("kernel_*.png"))) == 7
    assert len(list((run / "tensorboard").iterdir())) == 2
    goodput = json.loads((run / "goodput.json").read_text())
    assert goodput["step"] == 30 and goodput["seconds"]["down"] > 0
    assert json.loads((run / "config.json").read_text())["steps"] == 30
    assert not (run / "lock.json").exists()
    other = run.parent / "other"
    settings = training_loop.LoopConfig(init_from=str(run), log_every=1)
    state = training_loop.run(ToyProgram(ToyConfig(1)), settings, other)
    assert np.abs(np.asarray(state.model.kernel[...]) - on_disk).max() < 0.2


def test_a_profile_and_the_times_of_hosts_are_in_the_bucket_and_in_the_report(run, tmp_path):
    settings = dataclasses.replace(SETTINGS, profile=(5, 2))
    for steps in (9, 12):
        training_loop.run(ToyProgram(ToyConfig(steps)), settings, run)
    traces = run / "profiles" / "plugins" / "profile" / "step_0000005"
    assert [path.name for path in traces.iterdir()] == ["host_0000.xplane.pb"]
    lines = (run / "hosts.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [3, 6, 9, 12]
    assert main.run(["report", str(run), f"--out={tmp_path / 'report'}"]) == 0
    page = (tmp_path / "report" / "index.html").read_text()
    assert "12 of 12" in page and "step_0000005" in page


def test_another_configuration_is_refused(run):
    training_loop.run(ToyProgram(ToyConfig(2)), SETTINGS, run)
    with pytest.raises(UserError, match=r"gs://.* holds a run with width = 4, but it is now 5"):
        training_loop.run(ToyProgram(ToyConfig(2, width=5)), SETTINGS, run)


def test_a_damaged_checkpoint_is_moved_and_the_one_before_it_is_used(run, on_disk, capfd):
    training_loop.run(ToyProgram(ToyConfig(13)), SETTINGS, run)
    files = [file for file in storage._objects(str(run / "checkpoints/13")) if "/d/" in f"/{file}"]
    assert files
    for file in files:
        storage.write(run / "checkpoints/13" / file, b"damaged")
    training_loop.run(ToyProgram(ToyConfig(30)), SETTINGS, run)
    assert "checkpoint 13 is damaged" in capfd.readouterr().err
    assert [path.name for path in (run / "damaged_checkpoints").iterdir()] == ["13"]
    np.testing.assert_array_equal(exported_kernel(run), on_disk)


SCRIPT = """
import sys
import jax
from leon_jax import bucket_lock, sharding, storage
from leon_jax.train import training_loop
from tests.train.test_training_loop import SETTINGS, ToyConfig, ToyProgram
bucket_lock.RENEW_SECONDS, bucket_lock.STALE_SECONDS = {seconds}
with jax.set_mesh(sharding.make_mesh((1, 1, 1, 1), jax.devices()[:1])):
    program = ToyProgram(ToyConfig({steps}), delay=0.05)
    training_loop.run(program, SETTINGS, storage.path(sys.argv[1]))
"""


def start(run: pathlib.Path, steps: int = 30, seconds=(0.5, 3.0), **variables) -> subprocess.Popen:
    root = str(pathlib.Path(__file__).parents[2])
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(steps=steps, seconds=seconds), str(run)],
        env={**os.environ, "PYTHONPATH": root, **variables}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for_step(run: pathlib.Path, step: int, process: subprocess.Popen) -> None:
    end = time.monotonic() + 300
    while not any(saved >= step for saved in complete_steps(run / "checkpoints")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_killed_run_resumes_to_the_parameters_of_a_run_on_a_disk(run, on_disk):
    process = start(run)
    wait_for_step(run, 8, process)
    process.kill()
    process.communicate()
    assert (run / "lock.json").exists() and not (run / "export").exists()
    again = start(run)  # at once: the holder of the lock is a process that does not exist
    error = again.communicate(timeout=300)[1]
    assert again.returncode == 0, error
    assert "resumed from step" in error and "took the lock" in error
    np.testing.assert_array_equal(exported_kernel(run), on_disk)
    assert metrics_steps(run) == list(range(3, 31, 3))


def holds_lock(run: pathlib.Path, process: subprocess.Popen) -> bool:
    try:
        holder = json.loads((run / "lock.json").read_text())["holder"]
    except FileNotFoundError:
        return False
    return holder["process"] == process.pid


@pytest.mark.slow
def test_a_run_that_is_killed_ten_times_has_the_parameters_of_a_run_on_a_disk(run, on_disk):
    """Each time within four seconds after it has taken the lock."""
    rng = random.Random(0)
    for _ in range(10):
        process = start(run)
        while process.poll() is None and not holds_lock(run, process):
            time.sleep(0.1)
        time.sleep(rng.uniform(0, 4))
        process.kill()
        process.communicate()
    error = start(run).communicate(timeout=600)[1]
    assert (run / "export/toy.safetensors").exists(), error
    np.testing.assert_array_equal(exported_kernel(run), on_disk)


def test_a_second_run_is_refused_at_once(run, monkeypatch):
    monkeypatch.setattr(bucket_lock, "RENEW_SECONDS", 0.5)
    with workdir.open_workdir(run):
        second = start(run)
        error = second.communicate(timeout=300)[1]
    assert second.returncode != 0
    assert f"another run is writing into {run}: attempt 0, process {os.getpid()} on" in error


@pytest.mark.slow
def test_a_paused_run_that_has_lost_its_lock_ends_and_writes_nothing(run, on_disk):
    first = start(run, steps=100_000)
    wait_for_step(run, 8, first)
    first.send_signal(signal.SIGSTOP)
    time.sleep(4.5)  # longer than the lock's life
    second = start(run)
    error = second.communicate(timeout=300)[1]
    assert second.returncode == 0, error
    files = storage._objects(str(run))
    first.send_signal(signal.SIGCONT)
    error = first.communicate(timeout=60)[1]
    assert first.returncode == 1
    assert "this process was paused for" in error
    changed = dict(storage._objects(str(run)).items() - files.items())
    complete = complete_steps(run / "checkpoints")
    # Requests that were on their way may have reached the checkpoint that was not complete.
    unfinished = [f"checkpoints/{step}/" for step in range(100) if step not in complete]
    assert not [name for name in changed if not name.startswith(tuple(unfinished))]
    np.testing.assert_array_equal(exported_kernel(run), on_disk)
