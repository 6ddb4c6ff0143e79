"""Tests that one replica reads a checkpoint and sends it to the others."""

import contextlib
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from leon_jax import storage
from leon_jax.train.checkpoint import Checkpoints, complete_steps
from tests import buckets, simulated_devices
from tests.bucket_proxy import proxy
from tests.train.replica_reader import state, words

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_one_replica_reads_the_arrays_and_all_have_every_bit(
    gs_folder, cloud_storage, tmp_path, processes
):
    """The newest checkpoint is damaged, which only the readers see: none waits for them."""
    directory = storage.path(gs_folder) / "checkpoints"
    checkpoints = Checkpoints(directory)
    for step in (3, 4):
        checkpoints.save(state(step), {"0": f"position {step}"})
    checkpoints.close()
    damaged = [file for file in storage._objects(str(directory / "4/state")) if "d/" in file]
    assert damaged
    for file in damaged:
        storage.write(directory / "4/state" / file, b"damaged")

    answers: list[list[tuple[str, int]]] = [[] for _ in range(processes)]
    with contextlib.ExitStack() as stack:
        running = []
        coordinator = f"127.0.0.1:{buckets.free_port()}"
        for number in range(processes):
            url = stack.enter_context(proxy(cloud_storage, lambda *_: None, answers[number]))
            environment = {
                **simulated_devices.environment(2),
                **buckets.cloud_storage_environment(url),
            }
            arguments = (directory, tmp_path, coordinator, processes, number)
            command = [sys.executable, "-m", "tests.train.replica_reader", *map(str, arguments)]
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
            )
            stack.callback(process.kill)
            running.append(process)
        errors = [process.communicate(timeout=300)[1] for process in running]
    assert [process.returncode for process in running] == [0] * processes, errors
    assert "checkpoint 4 is damaged" in errors[0]

    expected = words(state(3))
    for number in range(processes):
        actual = dict(np.load(tmp_path / f"{number}.npz"))
        assert actual.pop("data") == "position 3"
        assert actual.keys() == expected.keys()
        for name in expected:
            np.testing.assert_array_equal(actual[name], expected[name], name)

    # The contents of objects; all processes list the folders.
    sizes = [
        sum(size for line, size in of_process if "/3/state/" in line and "alt=media" in line)
        for of_process in answers
    ]
    readers, receivers = sizes[: processes // 2], sizes[processes // 2 :]
    assert sum(readers) > 100_000 and not any(receivers), sizes
    assert complete_steps(directory) == [3, 9]
