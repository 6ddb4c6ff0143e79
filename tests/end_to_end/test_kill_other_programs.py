"""Tests that killed runs of the image tokenizer and of the encoder end as uninterrupted ones."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from benchmarks.compare_runs import contents, differences
from tests.end_to_end import other_programs

ROOT = pathlib.Path(__file__).parents[2]
# Kills after these steps have been logged; a checkpoint is written every four steps.
KILLS = (6, 15)


def start(kind: str, folder: pathlib.Path, workdir: pathlib.Path) -> subprocess.Popen:
    config = f"{ROOT}/tests/end_to_end/other_programs.py:{kind}:{folder}"
    command = [sys.executable, "-m", "leon_jax.cli.main", "train", f"--config={config}"]
    return subprocess.Popen(
        [*command, f"--workdir={workdir}"], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def kill_after(step: int, process: subprocess.Popen, workdir: pathlib.Path) -> None:
    """Kills a run with SIGKILL as soon as it has logged a step."""
    log, deadline = workdir / "metrics.jsonl", time.monotonic() + 300
    while not (log.exists() and f'"step": {step},' in log.read_text()):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, f"step {step} was never logged"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tokenizer", "encoder"])
def test_a_killed_run_ends_with_the_same_bits(tmp_path, kind):
    other_programs.write_data(tmp_path)
    process = start(kind, tmp_path, tmp_path / "whole")
    assert "training finished" in process.communicate()[1]
    for step in KILLS:
        kill_after(step, start(kind, tmp_path, tmp_path / "killed"), tmp_path / "killed")
    process = start(kind, tmp_path, tmp_path / "killed")
    assert "resumed from step" in process.communicate()[1]
    assert differences(tmp_path / "whole", tmp_path / "killed") == []
    assert len(contents(tmp_path / "whole")) > 60, "arrays, positions and 24 steps are compared"
