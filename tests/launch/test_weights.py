"""Tests launch/weights.sh with a fake `leon`: what it needs, and the commands that it runs."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from leon_jax.datasets.emoji.npm_designs import install_command
from tests.datasets import npm_packages

ROOT = pathlib.Path(__file__).parents[2]
LEON = """#!/bin/sh
echo "$@" >> commands.txt
mkdir -p leon_jax/weights/emoji
"""


@pytest.fixture
def clone(tmp_path) -> pathlib.Path:
    """A folder with the script, this Python, and a `leon` that records its arguments."""
    (tmp_path / "launch").mkdir()
    shutil.copy(ROOT / "launch" / "weights.sh", tmp_path / "launch")
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "leon").write_text(LEON)
    (programs / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    return tmp_path


def run(folder: pathlib.Path) -> subprocess.CompletedProcess:
    settings = {"BIN", "RUNS", "WEIGHTS"}
    environment = {key: value for key, value in os.environ.items() if key not in settings}
    return subprocess.run(
        ["bash", folder / "launch" / "weights.sh"], capture_output=True, text=True, check=False,
        env=environment | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def test_without_the_npm_packages_it_names_the_command_that_installs_them(clone):
    result = run(clone)
    assert result.returncode == 1 and not result.stdout
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("make weights: data/npm/")
    assert install_command("data/npm") in result.stderr
    assert not (clone / "commands.txt").exists()


def test_it_runs_the_pipeline_and_exports_its_model(clone):
    npm_packages.write(clone / "data" / "npm")
    result = run(clone)
    assert result.returncode == 0, result.stderr
    assert "hours" in result.stdout
    pipeline, export = (clone / "commands.txt").read_text().splitlines()
    assert pipeline == "pipeline --config=configs/emoji/pipeline.py --workdir=runs/emoji"
    assert export.startswith("export --workdir=runs/emoji/decoder_second --index=prepare:demo ")
    assert "--dtype=bfloat16" in export and export.endswith("--out=leon_jax/weights/emoji")
    named = [word.partition("=")[2] for word in export.split() if "=configs/" in word]
    assert named and all((ROOT / name).is_file() for name in named)
