"""Tests that a decoder run killed with SIGKILL ends exactly as an uninterrupted run."""

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


@pytest.mark.slow
def test_a_killed_decoder_run_ends_with_the_same_bits(tmp_path):
    """Kills a run three times, once during a save; `benchmarks.soak` does so twenty times."""
    command = [
        sys.executable, "-m", "benchmarks.soak", "--kills=3", "--steps=80", "--seed=0",
        f"--out={tmp_path / 'soak'}",
    ]  # fmt: skip
    result = subprocess.run(command, cwd=soak.ROOT, text=True, capture_output=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(re.findall("^kill ", result.stdout, re.MULTILINE)) == 3
    partial = re.search(r"(\d+) left a partial checkpoint", result.stdout)
    assert partial and int(partial[1]) >= 1, result.stdout
    assert "resumed from step" in (tmp_path / "soak" / "killed.log").read_text()
    # The run has learned, so the comparison is meaningful.
    lines = (tmp_path / "soak" / "killed" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert len(losses) == 80 and np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


@pytest.fixture
def finished(tmp_path):
    """Returns a function that writes the workdir of a finished run, with optional changes."""

    def make(name: str, moment: float = 0.5, loss: float = 2.0, position: str = "7"):
        workdir = tmp_path / name
        model = tiny.random_decoder(40, 16)
        moments = np.zeros((32, 40), np.float32)
        moments[3, 5] = moment
        state = TrainState(jnp.int32(2), model, {"mu": jnp.asarray(moments)}, jax.random.key(0))
        checkpoints = Checkpoints(workdir / "checkpoints")
        checkpoints.save(state, {"0": position})
        checkpoints.close()
        # The times of two runs always differ.
        lines = [
            {"step": 1, "loss": 3.0, "seconds_per_step": len(name)},
            {"step": 2, "loss": loss, "seconds_per_step": 0.1},
        ]
        (workdir / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        (workdir / "config.json").write_text('{"kind": "decoder"}')
        weight_files.save(workdir / "export" / "decoder.safetensors", model, "decoder", {})
        return workdir

    return make


def test_runs_that_differ_only_in_times_are_equal(finished):
    assert differences(finished("one"), finished("other")) == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"moment": 0.5 + 2**-24}, "opt_state.mu differs: 1 of 1,280 numbers"),
        ({"loss": 2.0 + 2**-51}, "metrics of step 2 differs"),
        ({"position": "8"}, "data position 0 differs"),
    ],
)
def test_a_difference_is_named(finished, change, sentence):
    sentences = differences(finished("one"), finished("other", **change))
    assert len(sentences) == 1 and sentences[0].startswith(sentence), sentences


def test_a_run_that_ends_too_early_is_a_failure(tmp_path, capfd, monkeypatch):
    """The command does nothing and exits with code 0."""
    monkeypatch.setattr(sys, "executable", "true")
    monkeypatch.setattr(sys, "argv", ["soak", "--kills=1", f"--out={tmp_path / 'soak'}"])
    assert soak.main() == 2
    assert "the run ended with code 0 before it could be killed" in capfd.readouterr().err
