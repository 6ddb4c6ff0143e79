"""launch/Dockerfile, as far as it runs without Docker: what it copies, and its last install."""

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
    """The instructions of the file and what follows each."""
    lines = DOCKERFILE.read_text().replace("\\\n", " ").splitlines()
    words = (line.split(maxsplit=1) for line in lines if line and not line.startswith("#"))
    return [(name, rest) for name, rest in words]


def values(name: str) -> list[str]:
    return [rest for found, rest in instructions() if found == name]


@pytest.fixture(scope="module")
def context(tmp_path_factory) -> pathlib.Path:
    """What Docker is sent of the repository: only what .dockerignore names with a `!`."""
    first, *rest = [line for line in IGNORED.read_text().splitlines() if not line.startswith("#")]
    assert first == "*"
    kept = [line[1:] for line in rest if line.startswith("!")]
    without = [line for line in rest if not line.startswith("!")]
    assert all(fnmatch.fnmatch("a/b/__pycache__", pattern) for pattern in without)
    folder = tmp_path_factory.mktemp("context")
    for name in kept:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            shutil.copy(ROOT / name, folder)
    return folder


def test_its_python_is_one_that_the_package_allows():
    (image,) = values("FROM")
    version = re.fullmatch(r"python:([\d.]+)-slim", image).group(1)
    needed = importlib.metadata.metadata("leon_jax")["Requires-Python"]
    assert SpecifierSet(needed).contains(version)


def test_its_accelerators_are_extras_of_jax():
    (default,) = (rest.split("=")[1] for rest in values("ARG"))
    named = set(re.findall(r"ACCELERATOR=(\w+)", DOCKERFILE.read_text())) | {default}
    assert named == {"tpu", "cuda13"}
    assert named <= set(importlib.metadata.metadata("jax").get_all("Provides-Extra"))


def test_jax_stays_in_the_locked_version():
    """The command within the install prints the version of the JAX that is there."""
    (install,) = (rest for rest in values("RUN") if "ACCELERATOR" in rest)
    (command,) = re.findall(r"\$\((.*)\)", install)
    command = command.replace("python", shlex.quote(sys.executable), 1)
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    locked = re.search(
        r"^jax==(\S+)", (ROOT / "requirements" / "dev.txt").read_text(), flags=re.MULTILINE
    )
    assert done.stdout.strip() == locked.group(1)


def test_what_is_copied_is_there(context):
    for rest in values("COPY"):
        *sources, _ = shlex.split(rest)
        assert all((context / source).exists() for source in sources)
    assert not (context / "tests").exists() and not (context / ".git").exists()


def test_the_package_installs_from_what_is_copied(context, tmp_path):
    """The last install, with its own flags, into a folder; then its program runs."""
    program, *arguments = shlex.split(values("RUN")[-1])
    assert program == "pip"
    subprocess.run(
        [sys.executable, "-m", "pip", *arguments, "--quiet", f"--target={tmp_path}"],
        cwd=context, check=True, capture_output=True,
    )  # fmt: skip
    assert values("ENTRYPOINT") == ['["leon"]']
    done = subprocess.run(
        [sys.executable, tmp_path / "bin" / "leon", "train", "--help"],
        cwd=context, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and "--distributed" in done.stdout, done.stderr
    assert (context / "configs" / "cm3leon_350m.py").is_file()
