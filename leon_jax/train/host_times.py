"""Measures the time of each host outside the wait for the others, and names a slow host.

The hosts of a run are synchronous, so the steps of all of them take equally long. What differs is
the time that a host needs for its own work: reading its batches, and everything else in Python. All
other hosts wait for the slowest one. A slow chip is not found in this way; a profile shows it.
"""

import contextlib
import json
import pathlib
import socket
import sys
import time
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Float64

# A host is slow if its own time is more than so many times the median of the others ...
FACTOR = 2.0
# ... and if the difference is more than this share of the time of a step.
MIN_SHARE = 0.1

_NAME_BYTES = 64


class HostTimes:
    """Counts the own time of this host, and gathers the times of all hosts.

    The constructor and `report` are collective operations.

    Args:
      path: the file `hosts.jsonl`, to which process 0 appends a line at each report.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path
        self._slow: int | None = None
        self._names = [socket.gethostname()]
        if jax.process_count() > 1:
            name = np.zeros(_NAME_BYTES, np.uint8)
            encoded = self._names[0].encode()[:_NAME_BYTES]
            name[: len(encoded)] = np.frombuffer(encoded, np.uint8)
            rows = multihost_utils.process_allgather(name)
            self._names = [bytes(row).rstrip(b"\0").decode(errors="replace") for row in rows]
        self._reset()

    def _reset(self) -> None:
        self._start, self._input, self._waited = time.monotonic(), 0.0, 0.0

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Counts the time within the context as time for the batch, a part of the own time."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._input += time.monotonic() - start

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time within the context as time in which this host may wait for others."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._waited += time.monotonic() - start

    def report(self, step: int, steps: int) -> dict[str, float]:
        """Gathers the times since the last report, and prints a sentence on a slow host.

        Args:
          step: the last step.
          steps: number of steps since the last report.

        Returns:
          The largest `own_seconds` and `input_seconds` a step of a host.
        """
        total = time.monotonic() - self._start
        local = np.array([total, total - self._waited, self._input]) / steps
        times = local[None]
        if jax.process_count() > 1:
            times = np.asarray(multihost_utils.process_allgather(local), np.float64)
        step_seconds, own, reading = times[:, 0].max(), times[:, 1], times[:, 2]
        slow = slow_host(own, step_seconds)
        if jax.process_index() == 0:
            line = {
                "step": step,
                "step_seconds": round(float(step_seconds), 6),
                "own_seconds": own.round(6).tolist(),
                "input_seconds": reading.round(6).tolist(),
                "slow": slow,
            }
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            if slow is not None and slow != self._slow:
                others = float(np.median(np.delete(own, slow)))
                print(
                    f"leon train: host {slow} ({self._names[slow]}) slows the run: up to step "
                    f"{step} it spent {own[slow]:.3f} s a step outside the wait for the others, "
                    f"{reading[slow]:.3f} s of them on its batches, and the others spent "
                    f"{others:.3f} s",
                    file=sys.stderr,
                    flush=True,
                )
        self._slow = slow
        self._reset()
        return {"own_seconds": float(own.max()), "input_seconds": float(reading.max())}


def slow_host(own: Float64[np.ndarray, "hosts"], step_seconds: float) -> int | None:
    """Returns the index of a host that slows the others, or None.

    Args:
      own: seconds a step of each host outside the wait for the others.
      step_seconds: seconds a step of the run.
    """
    if len(own) == 1:
        return None
    slow = int(np.argmax(own))
    others = float(np.median(np.delete(own, slow)))
    is_slow = own[slow] > FACTOR * others and own[slow] - others > MIN_SHARE * step_seconds
    return slow if is_slow else None
