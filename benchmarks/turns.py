"""Two programs take turns on one machine: each is a process that works only when it is asked to.

The worker reads a line of JSON from stdin for each request and answers with one on stdout. This
file imports nothing that one of two Python environments might lack.
"""

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]


def serve(answers: dict[str, Callable[..., Any]]) -> None:
    """The worker's side: calls `answers[name](*arguments)` until stdin ends."""
    # Libraries may print; only answers go to the other side.
    out, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        out.write(json.dumps(answers[name](*arguments)) + "\n")
        out.flush()


class Worker:
    """The asking side.

    Args:
      command: what to run, in the repository's root; its stderr is ours.
      environment: more variables for it.
    """

    def __init__(self, command: list[str], environment: dict[str, str] | None = None) -> None:
        # Neither environment may leak into the other.
        inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        self._command = command
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=inherited | {"PYTHONPATH": str(ROOT)} | (environment or {}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, name: str, *arguments: Any) -> Any:
        """What the worker answers; waits for it.

        Raises:
          RuntimeError: the worker ended.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps([name, *arguments]) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # what is read next tells the same
        if not (line := self._process.stdout.readline()):
            raise RuntimeError(f"{' '.join(self._command)} ended with code {self._process.wait()}")
        return json.loads(line)

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
