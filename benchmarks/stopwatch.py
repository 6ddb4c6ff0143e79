"""Measures the time of a program by function."""

import collections
import time
from collections.abc import Callable
from typing import Any


class Stopwatch:
    """Counts the time in functions, each without the other counted functions that it calls.

    Only for single-threaded programs. As a context manager it restores the functions at its end.
    """

    def __init__(self) -> None:
        self.seconds: collections.Counter[str] = collections.Counter()
        self._running: list[str] = []
        self._last = 0.0
        self._undo: list[Callable[[], None]] = []

    def time(self, owner: Any, name: str, stage: str) -> None:
        """Starts to count the time in the function `owner.name` under `stage`."""
        original = getattr(owner, name)

        def timed(*arguments: Any, **keywords: Any) -> Any:
            self._switch()
            self._running.append(stage)
            try:
                return original(*arguments, **keywords)
            finally:
                self._switch()
                self._running.pop()

        setattr(owner, name, timed)
        self._undo.append(lambda: setattr(owner, name, original))

    def __enter__(self) -> "Stopwatch":
        return self

    def __exit__(self, *failure: object) -> None:
        while self._undo:
            self._undo.pop()()

    def _switch(self) -> None:
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._last
        self._last = now
