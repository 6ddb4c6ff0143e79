"""Training is the same on every mesh and with any number of processes."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.end_to_end import curves
from tests.train.test_decoder_program import write_data

ROOT = pathlib.Path(__file__).parents[2]
LOCAL = [sys.executable, str(ROOT / "launch" / "local.py")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    write_data(folder)
    return folder


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }


def run(*command: str, **kwargs) -> str:
    result = subprocess.run(
        command, env=environment(), cwd=ROOT, text=True, capture_output=True, **kwargs
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def losses(folder):
    """By mesh; (1, 1, 1, 1) is one device, "microbatches" (2, 2, 1, 2) with two of them."""
    found = json.loads(run(sys.executable, "-m", "tests.end_to_end.curves", str(folder)))
    names = [(1, 1, 1, 1), "microbatches", *curves.MESHES]
    return dict(zip(names, map(np.array, found), strict=True))


@pytest.mark.parametrize("mesh", [*curves.MESHES, "microbatches"])
def test_twenty_losses_on_a_mesh_are_those_on_one_device(losses, mesh):
    alone = losses[1, 1, 1, 1]
    assert alone[-1] < 0.9 * alone[0], "it learns"
    np.testing.assert_allclose(losses[mesh], alone, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tokenizer", "encoder"])
def test_the_other_programs_train_on_meshes_as_on_one_device(kind):
    """The tokenizer's adversarial part included."""
    program = "tests.end_to_end.other_programs"
    alone, *meshes = json.loads(run(sys.executable, "-m", program, kind))
    assert alone[-1]["loss"] < alone[0]["loss"], "it learns"
    for mesh in meshes:
        for step, expected in zip(mesh, alone, strict=True):
            for name, value in expected.items():
                assert step[name] == pytest.approx(value, rel=1e-3, abs=1e-6), name
            assert step["loss"] == pytest.approx(expected["loss"], rel=1e-5)


CONFIG = """
from tests.end_to_end import curves

def get_config():
    config = curves.get_config({folder!r})
    config.loop = dict(log_every=1, save_every=5, mesh=(2, 2, 1, 2), data_shards=2, slices=1)
    return config
"""


def test_two_processes_train_as_one_and_hand_over_to_it(folder, losses, tmp_path):
    config = tmp_path / "config.py"
    config.write_text(CONFIG.format(folder=str(folder)))
    train = [sys.executable, "-m", "leon_jax.cli.main", "train", f"--config={config}"]
    pair = [*LOCAL, "--processes=2", "--devices=4", "--"]

    def curve(workdir):
        lines = (workdir / "metrics.jsonl").read_text().splitlines()
        return np.array([json.loads(line)["loss"] for line in lines])

    # Each process is an island of fast links: only gradients go from one to the other.
    run(*pair, *train, f"--workdir={tmp_path / 'two'}", "--config.loop.slices=2")
    np.testing.assert_allclose(curve(tmp_path / "two"), losses[2, 2, 1, 2], rtol=1e-5)
    assert (tmp_path / "two" / "export" / "decoder.safetensors").is_file()

    # Ten steps by two processes, the rest by one: the data go on where they were.
    run(*pair, *train, f"--workdir={tmp_path / 'both'}", "--config.steps=10")
    run(*train, f"--workdir={tmp_path / 'both'}")
    np.testing.assert_allclose(curve(tmp_path / "both"), losses[2, 2, 1, 2], rtol=1e-5)


def test_ctrl_c_reaches_every_process_once_and_as_sigterm(tmp_path):
    """A terminal sends it to the whole group of processes, and a second signal would end a save."""
    script = (
        "import pathlib, signal, sys, time\n"
        "def note(number, frame):\n"
        "    with open(sys.argv[1], 'a') as file: file.write(f'{number} ')\n"
        "signal.signal(signal.SIGINT, note)\n"
        "signal.signal(signal.SIGTERM, note)\n"
        "pathlib.Path(sys.argv[1]).touch()\n"
        "time.sleep(1.5)\n"
        "time.sleep(1.5)\n"
    )
    heard = tmp_path / "heard"
    started = subprocess.Popen(
        [*LOCAL, "--processes=1", "--", sys.executable, "-c", script, str(heard)],
        start_new_session=True,
    )
    while not heard.exists():
        time.sleep(0.05)
    os.killpg(started.pid, signal.SIGINT)
    assert started.wait(timeout=60) == 0
    assert heard.read_text().split() == [str(int(signal.SIGTERM))]


@pytest.mark.parametrize(
    ("end", "words", "code"),
    [
        ("sys.exit(7)", "exit code 7", 7),
        ("os.kill(os.getpid(), signal.SIGKILL)", "signal SIGKILL", 137),
        ("sys.exit(137)", "exit code 137 (SIGKILL)", 137),
    ],
)
def test_a_process_that_fails_ends_the_others_and_is_named(end, words, code):
    """Process 0 ends first, as one that lost a peer; that is not the cause."""
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
    assert result.stderr.splitlines()[-1] == f"local.py: process 1 failed first, with {words}"
