"""What is wrong with flags and config files is said in sentences of our own, as it was typed."""

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
    """The lines of the error of `leon train`; absl's own warnings left out."""
    done = subprocess.run(
        [sys.executable, "-m", "leon_jax.cli.main", "train", *arguments],
        capture_output=True, text=True, env=os.environ | environment,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    return [line for line in done.stderr.splitlines() if not line.startswith("WARNING:absl")]


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
        ("key.py", r'the config file key.py stops in line 2 with KeyError: x\y "z"'),
        (
            "value.py",
            "the config file value.py stops in line 2 with ValueError: the rate must be below 1",
        ),
        # What a library says is not passed on.
        ("library.py", "the config file library.py stops in line 3 with JSONDecodeError"),
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
            "get_config of argument.py takes other arguments than the one after the colon",
        ),
        ("missing.py", "there is no config file missing.py"),
        (".", "--config=. is a folder; it must be a Python file"),
        ("", "--config is empty; for example --config=configs/emoji/decoder.py"),
    ],
)
def test_a_config_file_that_cannot_be_used(path, message):
    assert refused(f"--config={path}", "--workdir=w") == [f"leon train: {message}"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([f"--config={CONFIG}", "--config.batch_size=a'\\b"], r"--config.batch_size=a'\b must be a "
         "whole number"),
        ([f"--config={CONFIG}", "--config.batch_size"], "--config.batch_size has no value; write "
         "--config.batch_size=VALUE"),
        ([f"--config={CONFIG}", "--config.model.codes.x=3"], "--config.model.codes.x names no key "
         f"that {CONFIG} could have"),
        ([f"--config={CONFIG}", "--config.model=3"], "--config.model=3 must be of the kind that it "
         "has in the config file"),
        (["--config.batch_size=3", f"--config={CONFIG}"], "--config.batch_size=3 stands before "
         "--config; it must come after it"),
        ([f"--config={CONFIG}", "--config.model.codes=3", "--config.model={}"], "--config.model "
         "would undo --config.model.codes, which stands before it; change their order"),
        (["--config.batch_size=3"], "--config.batch_size sets a key of the file that --config "
         "names, but --config is missing"),
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
def test_a_flag_that_cannot_be_used(arguments, message):
    assert refused(*arguments) == [f"leon train: {message}"]


def test_leon_debug_shows_where_an_error_comes_from():
    lines = refused("--processes=0", LEON_DEBUG="1")
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == "leon train: --processes=0 must be a positive whole number"
