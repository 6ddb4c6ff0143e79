"""Measures how a run spends its wall time, over all its starts.

Every second since the first start belongs to exactly one category of `CATEGORIES`. *Goodput* is
the share of the category `step`: time in which the devices computed updates that the final model
contains.
"""

import contextlib
import json
import pathlib
import time
from collections.abc import Iterator

from leon_jax import storage

CATEGORIES = {
    "start": "imports, starting the devices, and everything not listed below",
    "data": "opening the data, and reading the first batch",
    "restore": "reading a checkpoint, or making the first weights",
    "compile": "tracing and compiling the step",
    "input": "devices idle, waiting for a batch",
    "step": "updates",
    "checkpoint": "waiting for a checkpoint (most of it is written in the background)",
    "evaluate": "evaluating the model on held-out documents",
    "sample": "generating samples and exporting",
    "redone": "updates that were lost in a stop and repeated",
    "down": "between a stop and the next start",
}


class GoodputTracker:
    """Counts the wall time of each category of `CATEGORIES`, over restarts.

    Args:
      start: the unix time at which this start of the run began; None: now.
    """

    def __init__(self, start: float | None = None) -> None:
        self._start = time.time() if start is None else start
        self._last_time, self._category = self._start, "start"
        self._earlier, self._current = (
            dict.fromkeys(CATEGORIES, 0.0),
            dict.fromkeys(CATEGORIES, 0.0),
        )
        self._path: pathlib.Path | None = None
        self._step = 0

    @property
    def seconds(self) -> dict[str, float]:
        """The seconds of each category, over all starts."""
        return {name: self._earlier[name] + self._current[name] for name in CATEGORIES}

    def open(self, path: pathlib.Path) -> None:
        """Adds the times of earlier starts, and saves all of them from now on.

        Args:
          path: a JSON file {"seconds": {category: seconds}, "step": updates, "time": unix time}.
        """
        self._path = path
        if not path.exists():
            return
        try:
            saved = json.loads(path.read_text())
            # Files of earlier versions lack new categories.
            earlier = {name: float(saved["seconds"].get(name, 0.0)) for name in CATEGORIES}
            step, stop_time = int(saved["step"]), float(saved["time"])
        except (ValueError, KeyError, TypeError, AttributeError):
            return  # the file is of another version; start from zero
        earlier["down"] += max(0.0, self._start - stop_time)
        self._earlier, self._step = earlier, step

    def resume(self, step: int) -> None:
        """Sets the step that the run resumes from; later updates of the last start are redone."""
        if self._step > step:
            lost_seconds = self._earlier["step"] * (self._step - step) / self._step
            self._earlier["step"] -= lost_seconds
            self._earlier["redone"] += lost_seconds
        self._step = step

    @contextlib.contextmanager
    def spend(self, category: str) -> Iterator[None]:
        """Counts the time within the context under `category`."""
        outer_category = self._category
        self.switch(category)
        try:
            yield
        finally:
            self.switch(outer_category)

    def switch(self, category: str, was: str | None = None) -> None:
        """Counts the time from now on under `category`.

        Args:
          category: a key of `CATEGORIES`.
          was: the category of the time since the last switch, if not the one of that switch.

        Raises:
          KeyError: a category is unknown.
        """
        now = time.time()
        self._current[was or self._category] += now - self._last_time
        self._last_time, self._category = now, category

    def report(self, step: int) -> float:
        """Counts the time up to now, saves the file, and returns the goodput, 0 to 1."""
        self.switch(self._category)
        self._step = step
        if self._path is not None:
            content = {"seconds": self.seconds, "step": step, "time": self._last_time}
            storage.write(self._path, json.dumps(content, indent=1))
        seconds = self.seconds
        return seconds["step"] / max(sum(seconds.values()), 1e-9)

    def first_step_summary(self) -> str:
        """Returns one line with the seconds of this start up to now, by category."""
        self.switch(self._category)
        parts = [f"{name} {value:.1f} s" for name, value in self._current.items() if value]
        return f"{sum(self._current.values()):.1f} s: {', '.join(parts)}"

    def summary(self) -> str:
        """Returns one line with the share of each category, the largest first."""
        seconds = self.seconds
        total = max(sum(seconds.values()), 1e-9)
        by_size = sorted(seconds.items(), key=lambda item: -item[1])
        shares = [f"{name} {100 * value / total:.1f} %" for name, value in by_size if value > 0]
        return f"{total:,.0f} s: " + ", ".join(shares)
