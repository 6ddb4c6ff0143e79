"""The pages say what is so: links lead somewhere, commands and flags exist, examples compile."""

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest

from leon_jax.cli.main import VERBS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Folders whose files the pages name in running text; what a run makes (out/, runs/) is not there.
KEPT = (
    "leon_jax/", "configs/", "docs/", "tests/", "launch/", "notebooks/", "requirements/",
    "benchmarks/",
)  # fmt: skip

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """Every shell command of a page's bash blocks, split into words, continued lines joined."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def defined_flags(verb: str) -> set[str]:
    """Names of the flags that a command of `leon` defines with absl, found without running it."""
    names = {"help"}
    path = ROOT / "leon_jax" / "cli" / f"{verb}.py"
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        if ast.unparse(node.func) == "config_flag.define":
            names.add("config")
        if not node.args:
            continue
        function = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        if function.startswith("DEFINE_") and isinstance(node.args[0], ast.Constant):
            names.add(node.args[0].value)
    return names


@every_page
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    missing = [
        target for target in targets if "://" not in target and not (page.parent / target).exists()
    ]
    assert not missing


@every_page
def test_links_within_a_page_name_a_heading(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= anchors


@every_page
def test_files_named_in_the_text_exist(page):
    named = re.findall(r"`([\w./-]+)`", page.read_text())
    missing = [name for name in named if name.startswith(KEPT) and not (ROOT / name).exists()]
    assert not missing


@every_page
def test_commands_exist(page):
    """`make X` is a target; `leon COMMAND --flag` is a command with such a flag."""
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for words in commands(page):
        program = Path(words[0]).name
        if program == "make":
            used = {word for word in words[1:] if "=" not in word and not word.startswith("-")}
            assert used <= targets, words
        elif program == "leon" and not words[1].startswith("-"):
            assert words[1] in VERBS, words
            flags = defined_flags(words[1])
            for word in words[2:]:
                if word.startswith("--"):
                    # --config.batch_size=8 sets a key of the flag --config.
                    name = re.split(r"[=.]", word[2:])[0]
                    assert name in flags or name.removeprefix("no") in flags, (name, words)


@every_page
def test_configs_named_in_commands_exist(page):
    for words in commands(page):
        for word in words:
            for path in re.findall(r"configs/[\w/]+\.py", word):
                assert (ROOT / path).exists(), path


@every_page
def test_python_examples_compile_and_their_imports_exist(page):
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "leon_jax":
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"
