"""Where a run's wall time goes, over all its starts.

Every second since the first start belongs to exactly one of `SPENT`. *Goodput* is the share of
`step`: time in which the devices worked on updates that are part of the result.
"""

import contextlib
import json
import os
import pathlib
import time
from collections.abc import Iterator

SPENT = {
    "start": "imports, data, restoring a checkpoint, and what is not named below",
    "compile": "tracing and compiling the step",
    "input": "devices idle, waiting for a batch",
    "step": "updates",
    "checkpoint": "waiting for a checkpoint (most of the writing happens beside the steps)",
    "sample": "drawing samples and exporting",
    "redone": "updates that were lost in a stop and had to be made again",
    "down": "between a stop and the next start",
}


class GoodputTracker:
    """Counts the wall time of every category of `SPENT`; kept in a file, so it spans restarts.

    Args:
      path: a JSON file {"seconds": {category: seconds}, "step": updates, "time": unix time}; None
        keeps nothing.
    """

    def __init__(self, path: pathlib.Path | None) -> None:
        self.seconds = dict.fromkeys(SPENT, 0.0)
        self._path, self._last_time, self._category = path, time.time(), "start"
        self._step = 0
        if path is not None and path.exists():
            try:
                saved = json.loads(path.read_text())
                self.seconds |= {name: float(saved["seconds"][name]) for name in SPENT}
                self._step, stop_time = int(saved["step"]), float(saved["time"])
            except (ValueError, KeyError, TypeError):
                return  # of another version: the count starts anew
            self.seconds["down"] += max(0.0, self._last_time - stop_time)

    def resume(self, step: int) -> None:
        """Takes the step that the run goes on from; later updates of the last start are redone."""
        if self._step > step:
            lost_seconds = self.seconds["step"] * (self._step - step) / self._step
            self.seconds["step"] -= lost_seconds
            self.seconds["redone"] += lost_seconds
        self._step = step

    @contextlib.contextmanager
    def spend(self, category: str) -> Iterator[None]:
        """Counts the time inside under `category`, of `SPENT`."""
        outer_category = self._category
        self.switch(category)
        try:
            yield
        finally:
            self.switch(outer_category)

    def switch(self, category: str, was: str | None = None) -> None:
        """Counts the time from now on under `category`.

        The time since the last switch is counted under `was`, if given, instead of the category
        switched to then.

        Raises:
          KeyError: a category is not one of `SPENT`.
        """
        now = time.time()
        self.seconds[was or self._category] += now - self._last_time
        self._last_time, self._category = now, category

    def report(self, step: int) -> float:
        """Counts up to now, saves the file, and returns the goodput, 0 to 1."""
        self.switch(self._category)
        self._step = step
        if self._path is not None:
            content = {"seconds": self.seconds, "step": step, "time": self._last_time}
            temporary = self._path.with_name(self._path.name + ".tmp")
            temporary.write_text(json.dumps(content, indent=1))
            os.replace(temporary, self._path)
        return self.seconds["step"] / max(sum(self.seconds.values()), 1e-9)

    def summary(self) -> str:
        """One line, the largest shares first."""
        total = max(sum(self.seconds.values()), 1e-9)
        by_size = sorted(self.seconds.items(), key=lambda item: -item[1])
        shares = [f"{name} {100 * spent / total:.1f} %" for name, spent in by_size if spent > 0]
        return f"{total:,.0f} s: " + ", ".join(shares)
