"""Tests several processes of a run: a slow host is named, and a host that hangs ends the run."""

import dataclasses
import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from leon_jax.cli import main
from leon_jax.train.host_times import slow_host
from leon_jax.train.supervisor import STUCK
from tests.train.test_training_loop import SETTINGS

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def start(tmp_path):
    """Returns a function that starts the processes of a run; they are killed at the end."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    processes: list[subprocess.Popen] = []

    def start(count: int, steps: int, slow: int, seconds: float, first: int, compile=0.0, **loop):
        for number in range(count):
            arguments = (
                tmp_path / "run", address, count, number, steps, slow, seconds, first, compile,
            )  # fmt: skip
            command = [sys.executable, "-m", "tests.train.slow_host", *map(str, arguments)]
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
            processes.append(
                subprocess.Popen(
                    [*command, json.dumps(loop)], cwd=ROOT, env=environment,
                    stderr=subprocess.PIPE, text=True,
                )
            )  # fmt: skip
        return processes

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_a_host_that_sleeps_300_ms_a_step_is_named_within_one_interval(start, tmp_path):
    processes = start(4, 6, 2, 0.3, 1, log_every=3)
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, errors
    assert f"host 2 ({socket.gethostname()}) slows the run: up to step 3 " in errors[0]
    assert errors[0].count("slows the run") == 1, "it is named once, not at each interval"
    hosts = (tmp_path / "run" / "hosts.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in hosts]
    assert [(line["step"], line["slow"]) for line in lines] == [(3, 2), (6, 2)]
    for line in lines:
        # The first batch of the run is read before the first step.
        assert line["own_seconds"][2] >= line["input_seconds"][2] >= 0.2
        assert max(np.delete(line["own_seconds"], 2)) < 0.15
    metrics = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert metrics["own_seconds"] == pytest.approx(lines[-1]["own_seconds"][2], abs=1e-4)
    assert main.run(("report", str(tmp_path / "run"), f"--out={tmp_path / 'page'}")) == 0
    page = (tmp_path / "page" / "index.html").read_text()
    assert "host 2 was slower than the others in 2 of 2 intervals" in page


def test_a_host_that_hangs_ends_the_run_and_the_stacks_of_all_hosts_are_on_disk(start, tmp_path):
    processes = start(2, 1000, 1, 10_000, 9, log_every=4, step_timeout=8)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.exists() and '"step": 4,' in metrics.read_text()):
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes)
        time.sleep(0.05)
    began = time.monotonic()
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert time.monotonic() - began < 8 + 12
    codes = [process.returncode for process in processes]
    assert codes == [STUCK, STUCK], errors
    assert any("no step ended within 8 s (config.loop.step_timeout)" in text for text in errors)
    (folder,) = (tmp_path / "run" / "stacks").iterdir()
    stacks = [(folder / f"host_{number:04d}.txt").read_text() for number in range(2)]
    assert "in delayed" in stacks[1] and "slow_host.py" in stacks[1], "where it sleeps"
    assert all("training_loop.py" in text for text in stacks)
    assert "in delayed" not in stacks[0]


@pytest.mark.slow
def test_a_host_that_compiles_longer_than_a_step_may_take_does_not_end_the_run(start, tmp_path):
    processes = start(2, 4, 1, 0.0, 1, compile=10.0, step_timeout=5)
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert not (tmp_path / "run" / "stacks").exists()


def test_the_longest_own_time_is_slow_only_if_it_is_far_from_the_others():
    assert slow_host(np.array([0.01, 0.01, 0.32, 0.02]), 0.4) == 2
    assert slow_host(np.array([0.30, 0.31, 0.32, 0.29]), 0.4) is None, "all are equally slow"
    assert slow_host(np.array([0.001, 0.005]), 0.4) is None, "5 ms of 400 do not matter"
    assert slow_host(np.array([0.3, 0.1]), 0.4) == 0
    assert slow_host(np.array([0.3]), 0.4) is None


def test_a_negative_timeout_is_refused():
    with pytest.raises(ValueError, match="step_timeout is -1; it must be at least 0"):
        dataclasses.replace(SETTINGS, step_timeout=-1)
