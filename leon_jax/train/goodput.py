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


class Ledger:
    """Books wall time; kept in `path` so that it spans restarts.

    Args:
      path: a JSON file {"seconds": {name: seconds}, "step": updates, "time": unix time}; None keeps
        nothing.
    """

    def __init__(self, path: pathlib.Path | None) -> None:
        self.seconds = dict.fromkeys(SPENT, 0.0)
        self._path, self._since, self._now = path, time.time(), "start"
        self._step = 0
        if path is not None and path.exists():
            try:
                kept = json.loads(path.read_text())
                self.seconds |= {name: float(kept["seconds"][name]) for name in SPENT}
                self._step, stopped = int(kept["step"]), float(kept["time"])
            except (ValueError, KeyError, TypeError):
                return  # of another version: the count starts anew
            self.seconds["down"] += max(0.0, self._since - stopped)

    def resumed(self, step: int) -> None:
        """Says where the run goes on; updates the last start made beyond that are redone."""
        if self._step > step:
            lost = self.seconds["step"] * (self._step - step) / self._step
            self.seconds["step"] -= lost
            self.seconds["redone"] += lost
        self._step = step

    @contextlib.contextmanager
    def spend(self, name: str) -> Iterator[None]:
        """Books the time inside under `name`, of `SPENT`."""
        before = self._now
        self.switch(name)
        try:
            yield
        finally:
            self.switch(before)

    def switch(self, name: str, was: str | None = None) -> None:
        """Books what comes under `name`; and the time since the last switch, under `was` if given.

        Raises:
          KeyError: a name is not one of `SPENT`.
        """
        now = time.time()
        self.seconds[was or self._now] += now - self._since
        self._since, self._now = now, name

    def report(self, step: int) -> float:
        """Books up to now, keeps it, and returns the goodput, 0 to 1."""
        self.switch(self._now)
        self._step = step
        if self._path is not None:
            kept = {"seconds": self.seconds, "step": step, "time": self._since}
            temporary = self._path.with_name(self._path.name + ".tmp")
            temporary.write_text(json.dumps(kept, indent=1))
            os.replace(temporary, self._path)
        return self.seconds["step"] / max(sum(self.seconds.values()), 1e-9)

    def summary(self) -> str:
        """One line, the largest shares first."""
        total = max(sum(self.seconds.values()), 1e-9)
        ordered = sorted(self.seconds.items(), key=lambda item: -item[1])
        shares = [f"{name} {100 * spent / total:.1f} %" for name, spent in ordered if spent > 0]
        return f"{total:,.0f} s: " + ", ".join(shares)
