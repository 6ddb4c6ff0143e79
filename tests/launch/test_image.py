"""Tests launch/Dockerfile without Docker: its base image, the copied files and the last install."""

import fnmatch
import importlib.metadata
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from packaging.specifiers import SpecifierSet

ROOT = pathlib.Path(__file__).parents[2]
DOCKERFILE = ROOT / "launch" / "Dockerfile"
IGNORED = ROOT / "launch" / "Dockerfile.dockerignore"


def instructions() -> list[tuple[str, str]]:
    """Returns the instructions of the file with their arguments."""
    lines = DOCKERFILE.read_text().replace("\\\n", " ").splitlines()
    words = (line.split(maxsplit=1) for line in lines if line and not line.startswith("#"))
    return [(name, rest) for name, rest in words]


def values(name: str) -> list[str]:
    return [rest for instruction, rest in instructions() if instruction == name]


@pytest.fixture(scope="module")
def context(tmp_path_factory) -> pathlib.Path:
    """Returns a copy of the build context: the files that .dockerignore names with a `!`."""
    first, *rest = [line for line in IGNORED.read_text().splitlines() if not line.startswith("#")]
    assert first == "*"
    included = [line[1:] for line in rest if line.startswith("!")]
    excluded = [line for line in rest if not line.startswith("!")]
    assert all(fnmatch.fnmatch("a/b/__pycache__", pattern) for pattern in excluded)
    folder = tmp_path_factory.mktemp("context")
    for name in included:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            shutil.copy(ROOT / name, folder)
    return folder


def test_the_package_supports_the_images_python():
    (image,) = values("FROM")
    version = re.fullmatch(r"python:([\d.]+)-slim", image).group(1)
    required = importlib.metadata.metadata("leon_jax")["Requires-Python"]
    assert SpecifierSet(required).contains(version)


def test_the_accelerators_are_extras_of_jax():
    (default,) = (rest.split("=")[1] for rest in values("ARG"))
    accelerators = set(re.findall(r"ACCELERATOR=(\w+)", DOCKERFILE.read_text())) | {default}
    assert accelerators == {"tpu", "cuda13"}
    assert accelerators <= set(importlib.metadata.metadata("jax").get_all("Provides-Extra"))


def test_jax_keeps_the_locked_version():
    """The command within the install prints the version of the installed JAX."""
    (install,) = (rest for rest in values("RUN") if "ACCELERATOR" in rest)
    (command,) = re.findall(r"\$\((.*)\)", install)
    command = command.replace("python", shlex.quote(sys.executable), 1)
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    locked = re.search(
        r"^jax==(\S+)", (ROOT / "requirements" / "dev.txt").read_text(), flags=re.MULTILINE
    )
    assert result.stdout.strip() == locked.group(1)


def test_the_copied_files_exist(context):
    for rest in values("COPY"):
        *sources, _ = shlex.split(rest)
        assert all((context / source).exists() for source in sources)
    assert not (context / "tests").exists() and not (context / ".git").exists()


def test_the_package_installs_from_what_is_copied(context, tmp_path):
    """Runs the last install with its flags into a folder, then runs the installed program."""
    program, *arguments = shlex.split(values("RUN")[-1])
    assert program == "pip"
    subprocess.run(
        [sys.executable, "-m", "pip", *arguments, "--quiet", f"--target={tmp_path}"],
        cwd=context, check=True, capture_output=True,
    )  # fmt: skip
    assert values("ENTRYPOINT") == ['["leon"]']
    result = subprocess.run(
        [sys.executable, tmp_path / "bin" / "leon", "train", "--help"],
        cwd=context, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0 and "--distributed" in result.stdout, result.stderr
    assert (context / "configs" / "cm3leon_350m.py").is_file()
