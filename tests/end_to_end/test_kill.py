"""`leon train` on a real decoder, killed with -9, ends with the bits of a run that was not."""

import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import soak
from benchmarks.compare_runs import differences
from leon_jax import weight_files
from leon_jax.train.checkpoint import Checkpoints
from leon_jax.train.state import TrainState
from tests import tiny


def test_a_killed_decoder_ends_with_the_same_bits(tmp_path):
    """Three kills, one of them in a save; `python -m benchmarks.soak` makes twenty."""
    command = [
        sys.executable, "-m", "benchmarks.soak", "--kills=3", "--steps=80", "--seed=0",
        f"--out={tmp_path / 'soak'}",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=soak.ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall("^kill ", done.stdout, re.MULTILINE)) == 3
    halves = re.search(r"(\d+) left half a checkpoint", done.stdout)
    assert halves and int(halves[1]) >= 1, done.stdout
    assert "resumed from step" in (tmp_path / "soak" / "killed.log").read_text()
    # The comparison has something to compare: the run has learned.
    lines = (tmp_path / "soak" / "killed" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert len(losses) == 80 and np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


@pytest.fixture
def finished(tmp_path):
    """Makes the workdir of a finished run, by name, with some things other than usual."""

    def make(name: str, moment: float = 0.5, loss: float = 2.0, position: str = "7"):
        workdir = tmp_path / name
        model = tiny.random_decoder(40, 16)
        moments = np.zeros((32, 40), np.float32)
        moments[3, 5] = moment
        state = TrainState(jnp.int32(2), model, {"mu": jnp.asarray(moments)}, jax.random.key(0))
        checkpoints = Checkpoints(workdir / "checkpoints")
        checkpoints.save(state, {"0": position})
        checkpoints.close()
        # Two starts are never equally fast.
        lines = [
            {"step": 1, "loss": 3.0, "seconds_per_step": len(name)},
            {"step": 2, "loss": loss, "seconds_per_step": 0.1},
        ]
        (workdir / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        weight_files.save(workdir / "export" / "decoder.safetensors", model, "decoder", {})
        return workdir

    return make


def test_runs_that_differ_only_in_time_are_equal(finished):
    assert differences(finished("one"), finished("other")) == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"moment": 0.5 + 2**-24}, "opt_state.mu differs: 1 of 1,280 numbers"),
        ({"loss": 2.0 + 2**-51}, "what was logged of step 2 differs"),
        ({"position": "8"}, "data position 0 differs"),
    ],
)
def test_what_differs_is_named(finished, change, sentence):
    found = differences(finished("one"), finished("other", **change))
    assert len(found) == 1 and found[0].startswith(sentence), found


def test_a_run_that_ends_too_early_is_no_success(tmp_path, capfd, monkeypatch):
    """The command is one that does nothing at all."""
    monkeypatch.setattr(sys, "executable", "true")
    monkeypatch.setattr(sys, "argv", ["soak", "--kills=1", f"--out={tmp_path / 'soak'}"])
    assert soak.main() == 2
    assert "the run ended with code 0 before it could be killed" in capfd.readouterr().err
