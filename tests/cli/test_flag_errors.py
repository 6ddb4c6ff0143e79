"""Tests that a mistake in flags or a config file gives one sentence that quotes the input."""

import os
import pathlib
import subprocess
import sys

import pytest

CONFIG = str(pathlib.Path(__file__).parents[2] / "configs" / "emoji" / "tokenizer.py")
FILES = {
    "syntax.py": "def get_config(:\n",
    "key.py": "def get_config():\n    raise KeyError('x\\\\y \"z\"')\n",
    "value.py": "def get_config():\n    raise ValueError('the rate must be below 1')\n",
    "library.py": "import json\ndef get_config():\n    return json.loads('{')\n",
    "imports.py": "import no_such_package\n",
    "empty.py": "",
    "nothing.py": "def get_config():\n    return None\n",
    "number.py": "def get_config():\n    return 3\n",
    "opens.py": "def get_config():\n    return open('no_such_file')\n",
    "argument.py": "def get_config(name):\n    return name\n",
}


def refused(*arguments: str, **environment: str) -> list[str]:
    """Returns the error lines of `leon train` without absl's warnings."""
    result = subprocess.run(
        [sys.executable, "-m", "leon_jax.cli.main", "train", *arguments],
        capture_output=True, text=True, env=os.environ | environment,
    )  # fmt: skip
    assert result.returncode == 2, result.stderr
    return [line for line in result.stderr.splitlines() if not line.startswith("WARNING:absl")]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(pathlib.Path(__file__).parents[2]))


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("syntax.py", "the config file syntax.py has a syntax error in line 1"),
        ("key.py", r'the config file key.py fails in line 2: KeyError: x\y "z"'),
        (
            "value.py",
            "the config file value.py fails in line 2: ValueError: the rate must be below 1",
        ),
        # A library's message is not quoted.
        ("library.py", "the config file library.py fails in line 3: JSONDecodeError"),
        (
            "imports.py",
            "the config file imports.py imports no_such_package, which is not installed",
        ),
        ("empty.py", "the config file empty.py has no function get_config"),
        ("nothing.py", "get_config of nothing.py returns nothing; it must return a ConfigDict"),
        ("number.py", "get_config of number.py returns int; it must return a ConfigDict"),
        ("opens.py", "the config file opens.py needs a file that cannot be read"),
        (
            "argument.py",
            "get_config of argument.py needs --config=argument.py:ARGUMENT, or takes no argument",
        ),
        ("missing.py", "there is no config file missing.py"),
        (".", "--config=. is a folder; it must be a Python file"),
        ("", "--config is empty; for example --config=configs/emoji/decoder.py"),
    ],
)
def test_an_invalid_config_file_is_refused(path, message):
    assert refused(f"--config={path}", "--workdir=w") == [f"leon train: {message}"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([f"--config={CONFIG}", "--config.batch_size=a'\\b"], r"--config.batch_size=a'\b must be a "
         "whole number"),
        ([f"--config={CONFIG}", "--config.batch_size"], "--config.batch_size has no value; write "
         "--config.batch_size=VALUE"),
        ([f"--config={CONFIG}", "--config.model.codes.x=3"], "--config.model.codes.x is not a key "
         f"of {CONFIG}"),
        ([f"--config={CONFIG}", "--config.batch_size=3", "--config.export.encoder=x"],
         f"--config.export.encoder sets a key of the group export, which {CONFIG} does not have; "
         "add the group to a copy of the file"),
        ([f"--config={CONFIG}", "--config.model=3"], "--config.model=3 must be of the type that "
         "the key has in the config file"),
        (["--config.batch_size=3", f"--config={CONFIG}"], "--config.batch_size=3 comes before "
         "--config; it must come after it"),
        ([f"--config={CONFIG}", "--config.model.codes=3", "--config.model={}"], "--config.model "
         "would override --config.model.codes, which comes before it; swap them"),
        (["--config.batch_size=3"], "--config.batch_size sets a key of the config file, but "
         "--config is missing"),
        (["--wrkdir=x"], "there is no flag --wrkdir; did you mean --workdir?"),
        (["--zzz=x"], "there is no flag --zzz; --help shows all flags"),
        (["--processes=0"], "--processes=0 must be a positive whole number"),
        (["--processes=2.5"], "--processes=2.5 must be a positive whole number"),
        (["--distributed=maybe"], "--distributed=maybe must be true or false"),
        (["--nodistributed=1"], "--nodistributed takes no value; write --nodistributed, or "
         "--distributed=false"),
        (["--workdir"], "--workdir has no value; write --workdir=VALUE"),
        (["--flagfile=nowhere"], "the file that --flagfile names cannot be read"),
    ],
)  # fmt: skip
def test_an_invalid_flag_is_refused(arguments, message):
    assert refused(*arguments) == [f"leon train: {message}"]


def test_leon_debug_prints_the_traceback():
    lines = refused("--processes=0", LEON_DEBUG="1")
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == "leon train: --processes=0 must be a positive whole number"
