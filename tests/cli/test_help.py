"""Tests `leon --help` and `leon COMMAND --help`: they load little, and their commands are valid."""

import ast
import pathlib
import shlex
import subprocess
import sys
from typing import get_args

import pytest

from leon_jax.cli.main import VERBS
from leon_jax.engine.kv_cache import CacheDtype
from leon_jax.generate.ranking import Ranking
from leon_jax.generate.retriever import DEFAULT_FOLDER
from leon_jax.models.weight_conversion import WeightType

ROOT = pathlib.Path(__file__).parents[2]

# Packages that load slowly. Help must not import them.
HEAVY = {
    "PIL", "flax", "grain", "jax", "jaxlib", "numpy", "optax", "orbax", "tensorflow_datasets",
}  # fmt: skip


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], *([verb, "--help"] for verb in VERBS)],
    ids=" ".join,
)
def test_help_loads_no_heavy_package(arguments):
    program = (
        "import sys\n"
        "from leon_jax.cli import main\n"
        f"code = main.run({arguments})\n"
        f"loaded = {HEAVY} & {{name.split('.')[0] for name in sys.modules}}\n"
        "sys.exit(code or (f'loaded: {sorted(loaded)}' if loaded else 0))\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("leon") or "flags of leon" in result.stdout


def python(program: str) -> str:
    """Runs a program in a new process, since commands define global flags; returns its output."""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize(
    ("verb", "flag", "type_"),
    [
        *((verb, "weights", WeightType) for verb in ("plan", "generate")),
        *((verb, "cache", CacheDtype) for verb in ("plan", "generate")),
        ("generate", "rank_by", Ranking),
    ],
)
def test_the_choices_of_a_flag_are_those_of_its_type(verb, flag, type_):
    values = f"{verb}.FLAGS[{flag!r}].parser.enum_values"
    printed = python(f"from leon_jax.cli import {verb}; print(*{values})")
    assert tuple(printed.split()) == get_args(type_)


def test_the_default_folder_of_prepare_is_the_default_index_of_models():
    printed = python("from leon_jax.cli import prepare; print(prepare.FLAGS['out'].help)")
    assert f"(default: {DEFAULT_FOLDER}, for the emoji)" in printed


def help_commands(verb: str) -> list[list[str]]:
    """Returns the example commands in a command's help, without `leon COMMAND`."""
    tree = ast.parse((ROOT / "leon_jax" / "cli" / f"{verb}.py").read_text(encoding="utf-8"))
    text = (ast.get_docstring(tree) or "").replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines()]
    return [shlex.split(line)[2:] for line in lines if line.startswith(f"leon {verb} ")]


def test_the_model_folder_in_the_help_of_evaluate_is_complete():
    flags = [flag for command in help_commands("evaluate") for flag in command]
    (folder,) = [flag.split("=")[1] for flag in flags if flag.startswith("--model=")]
    for name in ("decoder.safetensors", "tokenizer.safetensors", "encoder.safetensors"):
        assert (ROOT / folder / name).is_file()
    assert f"--index={DEFAULT_FOLDER}" in flags


@pytest.mark.parametrize("verb", VERBS)
def test_the_commands_in_help_use_existing_flags(verb):
    names = {flag.partition("=")[0] for command in help_commands(verb) for flag in command}
    text = python(f"from leon_jax.cli import main, {verb}; print(main.describe({verb}, 'x'))")
    if any(not name.startswith("--") for name in names):
        assert "usage: leon x " in text
    # Keys of the config file are not listed.
    names = {name for name in names if name.startswith("--") and not name.startswith("--config.")}
    assert not [name for name in names if f"\n  {name}: " not in text]
