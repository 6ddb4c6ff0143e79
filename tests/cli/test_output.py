"""What `leon` prints arrives on every terminal, and ends quietly where nobody reads it."""

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
    done = subprocess.run(
        [sys.executable, "-c", PRINTS.format(text=ascii("Größe → \N{CAT FACE}"))],
        capture_output=True,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == rb"Gr\xf6\xdfe \u2192 \U0001f431" + b"\n"


def test_a_name_that_is_no_unicode_is_shown_with_escapes():
    done = subprocess.run(
        [sys.executable, "-c", PRINTS.format(text=ascii("caf\udce9.png"))],
        capture_output=True,
        env=os.environ | {"PYTHONUTF8": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == rb"caf\udce9.png" + b"\n"


def with_closed_pipe(arguments: list[str], stream: str, unbuffered: str) -> tuple[int, str]:
    """Runs Python while nobody reads `stdout` or `stderr`: (exit code, the other stream)."""
    reader, writer = os.pipe()
    os.close(reader)
    other = {"stdout": "stderr", "stderr": "stdout"}[stream]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    pipes = {stream: writer, other: subprocess.PIPE}
    try:
        done = subprocess.run(
            [sys.executable, *arguments], text=True, env=environment, check=False, **pipes
        )
    finally:
        os.close(writer)
    return done.returncode, getattr(done, other)


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


def test_another_broken_pipe_is_not_hidden():
    program = (
        "from leon_jax.cli import main\n"
        "def run(arguments):\n    raise BrokenPipeError('a socket')\n"
        "main.run = run\nmain.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1 and "BrokenPipeError: a socket" in done.stderr


def test_closed_streams_are_no_error():
    done = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m leon_jax.cli.main --help >&- 2>&-"], check=False
    )
    assert done.returncode == 0
