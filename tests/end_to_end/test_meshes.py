"""Tests that training gives the same losses on every mesh and with any number of processes."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests import simulated_devices
from tests.end_to_end import curves
from tests.train import test_decoder_evaluation

ROOT = pathlib.Path(__file__).parents[2]
LOCAL = [sys.executable, str(ROOT / "launch" / "local.py")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    test_decoder_evaluation.write(folder)
    return folder


def run(*command: str, **kwargs) -> str:
    environment = simulated_devices.environment()
    result = subprocess.run(
        command, env=environment, cwd=ROOT, text=True, capture_output=True, **kwargs
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def losses(folder):
    """Returns the losses by mesh; "microbatches" is mesh (2, 2, 1, 2) with two microbatches."""
    output = json.loads(run(sys.executable, "-m", "tests.end_to_end.curves", str(folder)))
    names = [(1, 1, 1, 1), "microbatches", *curves.MESHES]
    return dict(zip(names, map(np.array, output), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [*curves.MESHES, "microbatches"])
def test_losses_on_a_mesh_equal_those_on_one_device(losses, mesh):
    one_device = losses[1, 1, 1, 1]
    assert one_device[-1] < 0.9 * one_device[0], "the loss decreases"
    np.testing.assert_allclose(losses[mesh], one_device, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tokenizer", "encoder"])
def test_the_other_programs_train_equally_on_meshes_and_on_one_device(kind, tmp_path):
    """Includes the data, two documents folders, and the tokenizer's discriminator."""
    program = "tests.end_to_end.other_programs"
    one_device, *meshes = json.loads(run(sys.executable, "-m", program, kind, str(tmp_path)))
    assert one_device[-1]["loss"] < one_device[0]["loss"], "the loss decreases"
    for mesh in meshes:
        for step, expected in zip(mesh, one_device, strict=True):
            for name, value in expected.items():
                assert step[name] == pytest.approx(value, rel=2e-4, abs=1e-6), name
            assert step["loss"] == pytest.approx(expected["loss"], rel=1e-5)


@pytest.mark.slow
def test_an_evaluation_on_a_mesh_equals_one_on_one_device(tmp_path):
    results = json.loads(run(sys.executable, "-m", "tests.end_to_end.evaluations", str(tmp_path)))
    assert set(results) == {"decoder", "tokenizer", "encoder"}
    for one_device, *meshes in results.values():
        assert len(one_device) >= 3 and all(np.isfinite(value) for value in one_device.values())
        for metrics in meshes:
            assert metrics == pytest.approx(one_device, rel=1e-5)


CONFIG = """
from tests.end_to_end import curves

def get_config():
    config = curves.get_config({folder!r})
    config.loop = dict(log_every=1, save_every=5, mesh=(2, 2, 1, 2), data_shards=2, slices=1)
    config.loop["eval_every"] = 7
    return config
"""


@pytest.mark.slow
def test_two_processes_train_as_one_and_one_process_resumes_their_run(folder, losses, tmp_path):
    config = tmp_path / "config.py"
    config.write_text(CONFIG.format(folder=str(folder)))
    train = [sys.executable, "-m", "leon_jax.cli.main", "train", f"--config={config}"]
    pair = [*LOCAL, "--processes=2", "--devices=4", "--"]

    def values(workdir, name="loss"):
        lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
        return np.array([line[name] for line in lines if name in line])

    # Each process is a slice, so only gradients are sent between processes.
    run(*pair, *train, f"--workdir={tmp_path / 'two'}", "--config.loop.slices=2")
    np.testing.assert_allclose(values(tmp_path / "two"), losses[2, 2, 1, 2], rtol=1e-5)
    assert (tmp_path / "two" / "export" / "decoder.safetensors").is_file()
    evaluated = values(tmp_path / "two", "heldout/image_loss_1")
    assert len(evaluated) == 3

    # Two processes train ten steps, and one process trains the remaining steps.
    run(*pair, *train, f"--workdir={tmp_path / 'both'}", "--config.steps=10")
    run(*train, f"--workdir={tmp_path / 'both'}")
    np.testing.assert_allclose(values(tmp_path / "both"), losses[2, 2, 1, 2], rtol=1e-5)
    resumed = values(tmp_path / "both", "heldout/image_loss_1")
    # The run that ended after ten steps was evaluated there, too.
    np.testing.assert_allclose(np.delete(resumed, 1), evaluated, rtol=1e-5)
    steps = {path.name for path in (tmp_path / "two" / "checkpoints").iterdir()}
    assert steps == {path.name for path in (tmp_path / "both" / "checkpoints").iterdir()}


def test_ctrl_c_reaches_every_process_once_and_as_sigterm(tmp_path):
    """A terminal signals the whole process group, and a second signal would interrupt a save."""
    script = (
        "import pathlib, signal, sys, time\n"
        "def record(number, frame):\n"
        "    with open(sys.argv[1], 'a') as file: file.write(f'{number} ')\n"
        "signal.signal(signal.SIGINT, record)\n"
        "signal.signal(signal.SIGTERM, record)\n"
        "pathlib.Path(sys.argv[1]).touch()\n"
        "time.sleep(1.5)\n"
        "time.sleep(1.5)\n"
    )
    signals = tmp_path / "signals"
    process = subprocess.Popen(
        [*LOCAL, "--processes=1", "--", sys.executable, "-c", script, str(signals)],
        start_new_session=True,
    )
    while not signals.exists():
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == 0
    assert signals.read_text().split() == [str(int(signal.SIGTERM))]


@pytest.mark.parametrize(
    ("end", "description", "code"),
    [
        ("sys.exit(7)", "exit code 7", 7),
        ("os.kill(os.getpid(), signal.SIGKILL)", "signal SIGKILL", 137),
        ("sys.exit(137)", "exit code 137 (SIGKILL)", 137),
    ],
)
def test_the_process_that_failed_first_is_named_and_the_others_are_stopped(end, description, code):
    """Process 0 ends first, because it lost a peer, so it is not the cause."""
    script = (
        "import os, signal, sys, time\n"
        "if '--process_id=0' in sys.argv: sys.exit(134)\n"
        f"time.sleep(0.4); {end}"
    )
    result = subprocess.run(
        [*LOCAL, "--processes=2", "--", sys.executable, "-c", script],
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == code
    assert result.stderr.splitlines()[-1] == f"local.py: process 1 failed first, with {description}"
