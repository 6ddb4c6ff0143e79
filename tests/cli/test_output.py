"""Tests the output of `leon` on terminals without Unicode and on closed pipes."""

import os
import subprocess
import sys

import pytest

PRINTS = """
import sys
from leon_jax.cli import main

main.usage = lambda: {text}
sys.argv = ["leon", "--help"]
main.main()
"""
STOPS_WITH_3 = """
import sys
from leon_jax.cli import main

def run(arguments):
    print("does not fit")
    raise SystemExit(3)

main.run = run
main.main()
"""


@pytest.mark.parametrize(
    "environment",
    [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}],
    ids=["ascii", "C"],
)
def test_a_terminal_without_unicode_shows_escapes(environment):
    result = subprocess.run(
        [sys.executable, "-c", PRINTS.format(text=ascii("Größe → \N{CAT FACE}"))],
        capture_output=True,
        env=os.environ | environment,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == rb"Gr\xf6\xdfe \u2192 \U0001f431" + b"\n"


def test_a_file_name_that_is_not_unicode_is_printed_with_escapes():
    result = subprocess.run(
        [sys.executable, "-c", PRINTS.format(text=ascii("caf\udce9.png"))],
        capture_output=True,
        env=os.environ | {"PYTHONUTF8": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == rb"caf\udce9.png" + b"\n"


def with_closed_pipe(arguments: list[str], stream: str, unbuffered: str) -> tuple[int, str]:
    """Runs Python with one stream's pipe closed; returns the exit code and the other stream."""
    reader, writer = os.pipe()
    os.close(reader)
    other = {"stdout": "stderr", "stderr": "stdout"}[stream]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    pipes = {stream: writer, other: subprocess.PIPE}
    try:
        result = subprocess.run(
            [sys.executable, *arguments], text=True, env=environment, check=False, **pipes
        )
    finally:
        os.close(writer)
    return result.returncode, getattr(result, other)


@pytest.mark.parametrize(
    ("arguments", "stream"),
    [
        (["-m", "leon_jax.cli.main", "--help"], "stdout"),
        (["-m", "leon_jax.cli.main", "plan", "--help"], "stdout"),
        (["-c", PRINTS.format(text="100_000 * chr(10)")], "stdout"),
        (["-c", STOPS_WITH_3], "stdout"),
        (["-m", "leon_jax.cli.main", "no_such_verb"], "stderr"),
    ],
    ids=["usage", "plan", "much", "exit code", "error"],
)
@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
def test_a_closed_pipe_ends_the_command_quietly(arguments, stream, unbuffered):
    assert with_closed_pipe(arguments, stream, unbuffered) == (141, "")


def test_a_broken_pipe_of_a_socket_is_not_hidden():
    program = (
        "from leon_jax.cli import main\n"
        "def run(arguments):\n    raise BrokenPipeError('a socket')\n"
        "main.run = run\nmain.main()\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 1 and "BrokenPipeError: a socket" in result.stderr


def test_closed_streams_cause_no_error():
    result = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m leon_jax.cli.main --help >&- 2>&-"], check=False
    )
    assert result.returncode == 0
