"""Lets programs take turns on one machine: each is a worker process that works only on request.

A worker reads a line of JSON from stdin for each request and writes a line of JSON to stdout. This
module imports only the standard library, because workers use different Python environments.
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
    """Serves requests in a worker: calls `answers[name](*arguments)` until stdin ends."""
    # Libraries may print to stdout, so keep the real stdout for answers.
    out, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        out.write(json.dumps(answers[name](*arguments)) + "\n")
        out.flush()


class Worker:
    """A worker process, as its client sees it.

    Args:
      command: the worker's command; it runs in the repository's root and inherits stderr.
      environment: additional environment variables.
    """

    def __init__(self, command: list[str], environment: dict[str, str] | None = None) -> None:
        # Do not pass on this Python environment.
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
        """Sends a request and returns the worker's answer.

        Raises:
          RuntimeError: the worker ended.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps([name, *arguments]) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the read below fails too
        if not (line := self._process.stdout.readline()):
            raise RuntimeError(f"{' '.join(self._command)} ended with code {self._process.wait()}")
        return json.loads(line)

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
