"""Setting up: the README's commands, the metadata of setup.py, the locks, what a wheel holds."""

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import leon_jax

ROOT = Path(__file__).resolve().parents[1]
PINNED = re.compile(r"^([a-z0-9-]+)==(\S+)", re.MULTILINE)


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def requirements() -> dict[str, list[Requirement]]:
    """What the installed package says it needs: by extra, `""` for what it always needs."""
    found: dict[str, list[Requirement]] = {}
    for line in importlib.metadata.requires("leon_jax") or []:
        requirement = Requirement(line)
        extra = re.search(r'extra == "(\w+)"', line)
        found.setdefault(extra.group(1) if extra else "", []).append(requirement)
    return found


def test_the_readme_has_two_set_up_commands():
    readme = (ROOT / "README.md").read_text()
    section = readme.split("## Set up\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
    commands = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    assert commands == ["make demo", "make test"]


def test_each_set_up_command_installs_by_itself():
    makefile = (ROOT / "Makefile").read_text()
    for target in ("demo", "test"):
        assert re.search(rf"^{target}: install\b", makefile, re.MULTILINE)


def test_make_alone_lists_every_command():
    printed = subprocess.run(
        ["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert set(re.findall(r"^  make (\w+)", printed, re.MULTILINE)) == make_targets()


def test_what_must_pass_before_a_change_lands():
    steps = re.findall(r"^make (\w+)$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert steps == ["lint", "peers", "tpu", "test", "slowtest"]


def test_the_version_has_one_source():
    assert importlib.metadata.version("leon_jax") == leon_jax.__version__


def test_all_metadata_is_in_setup_py():
    """pyproject.toml is for tools; a second place for dependencies would drift."""
    assert set(tomllib.loads((ROOT / "pyproject.toml").read_text())) == {"build-system", "tool"}


def test_the_extras():
    expected = {
        "tpu", "cuda", "data", "beam", "huggingface", "faiss", "eval", "convert", "serve", "demo",
        "dev", "images", "wandb", "profile", "buckets",
    }  # fmt: skip
    assert set(importlib.metadata.metadata("leon_jax").get_all("Provides-Extra")) == expected
    assert set(requirements()) == expected | {""}


def test_the_command_line_program_is_installed():
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="leon")
    assert entry.value == "leon_jax.cli.main:main"
    assert callable(entry.load())


def test_the_compiler_for_tpus_is_the_one_that_jax_wants():
    ((name, version),) = PINNED.findall((ROOT / "requirements" / "tpu.txt").read_text())
    wanted = [Requirement(line) for line in importlib.metadata.requires("jax") or []]
    (wanted,) = (requirement for requirement in wanted if requirement.name == name == "libtpu")
    assert version in wanted.specifier


def test_the_lock_covers_what_development_needs():
    """Every requirement of the package and of its extra `dev` is locked, in a version it allows."""
    locked = dict(PINNED.findall((ROOT / "requirements" / "dev.txt").read_text()))
    needed = requirements()
    for requirement in needed[""] + needed["dev"]:
        version = locked[requirement.name.lower().replace("_", "-")]
        assert requirement.specifier.contains(version), f"{requirement} but {version} is locked"


@pytest.mark.parametrize("name", ["dev.txt", "peers.txt"])
def test_every_locked_package_has_hashes(name):
    entries = re.split(
        r"^(?=[a-z])", (ROOT / "requirements" / name).read_text(), flags=re.MULTILINE
    )
    entries = [entry for entry in entries if entry.strip()]
    assert len(entries) > 20
    assert not [entry for entry in entries if "--hash=sha256:" not in entry]


@pytest.mark.parametrize(
    "path", sorted((ROOT / "requirements").iterdir()), ids=lambda path: path.name
)
def test_no_lock_names_an_address(path):
    assert not re.findall(r"://|--(?:extra-)?index|--find-links|@ ", path.read_text())


def test_our_environment_never_holds_pytorch():
    assert "\ntorch==" not in (ROOT / "requirements" / "dev.txt").read_text()


def test_the_splits_belong_to_the_pinned_pictures():
    """splits.json was made for exact versions of the emoji packages; these are locked."""
    splits = json.loads((ROOT / "leon_jax" / "datasets" / "emoji" / "splits.json").read_text())
    locked = dict(PINNED.findall((ROOT / "requirements" / "dev.txt").read_text()))
    assert {name: locked[name] for name in splits["packages"]} == splits["packages"]


def test_the_wheel_holds_every_module_and_every_data_file(tmp_path):
    """Built as pip builds it, from a copy, so that nothing is written into the tree."""
    source = tmp_path / "source"
    shutil.copytree(ROOT / "leon_jax", source / "leon_jax", ignore=shutil.ignore_patterns("*.pyc"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", tmp_path, source], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("leon_jax/")}
    files = {
        path.relative_to(ROOT).as_posix()
        for pattern in (
            "**/*.py",
            "weights/**/*",
            "datasets/**/*.json",
            "convert/*.json",
            "configs/**/*",
        )
        for path in (ROOT / "leon_jax").glob(pattern)
        if path.is_file() and path.suffix != ".pyc"
    }
    assert packed == files
