"""Detects CPU use of other programs during a measurement, and repeats disturbed ones (Linux).

A busy machine slows the two sides of a comparison differently. PyTorch's threads wait for each
other after every operation, so it can be twenty times slower if one of them has no core. XLA's
threads share their work. A measurement on a busy machine is therefore meaningless.
"""

import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol


class Noisy(Exception):
    """Other programs use this machine."""


class Watch:
    """Measures the CPU time of all programs but `processes` and this one, from its creation."""

    def __init__(self, processes: Iterable[int]) -> None:
        self._processes = {os.getpid(), *processes}  # several sides may share a process
        self._start, self._all, self._known = self._now()

    def others(self) -> float:
        """Returns the share of all cores that other programs have used; 0 without /proc."""
        now, all_seconds, known_seconds = self._now()
        available = max(now - self._start, 1e-9) * (os.cpu_count() or 1)
        return max(0.0, (all_seconds - self._all) - (known_seconds - self._known)) / available

    def _now(self) -> tuple[float, float, float]:
        """Returns, in seconds, the time and the CPU time of all and of the known processes."""
        if not pathlib.Path("/proc/stat").exists():
            return time.monotonic(), 0.0, 0.0
        tick = os.sysconf("SC_CLK_TCK")
        # user, nice, system, (idle, iowait), irq, softirq, steal
        cpu = [int(n) for n in pathlib.Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
        known = 0
        for process in self._processes:
            # The name, in brackets, may contain spaces.
            fields = pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
            known += int(fields[11]) + int(fields[12])
        return time.monotonic(), (sum(cpu) - cpu[3] - cpu[4]) / tick, known / tick


def wait(share: float, patience: float) -> bool:
    """Waits until other programs use at most `share` of the CPU; False after `patience` seconds."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        watch = Watch(())
        time.sleep(1)
        if watch.others() <= share:
            return True
    return False


class Side(Protocol):
    """A side of a comparison: `benchmarks.turns.Worker`, or one of several in a process."""

    @property
    def pid(self) -> int: ...


def rounds[S: Side, T](
    workers: Sequence[S],
    ask: Callable[[S], T],
    count: int,
    noise: float,
    patience: float,
    show: Callable[[T], Any] = str,
) -> Iterator[tuple[list[T], float]]:
    """Yields rounds in which the workers take turns and other programs do not disturb them.

    Args:
      workers: the workers, in the order of their turns.
      ask: runs one worker and returns its answer.
      count: number of undisturbed rounds; up to three times as many are tried.
      noise: share of the CPU that other programs may use.
      patience: seconds to wait for a quiet machine before a round.
      show: formats an answer for printing.

    Yields:
      The workers' answers, and the share of the CPU that other programs used.

    Raises:
      Noisy: there were too few undisturbed rounds.
    """
    quiet_rounds = 0
    for number in range(1, 3 * count + 1):
        if not wait(noise, patience):
            break
        watch = Watch(worker.pid for worker in workers)
        answers = [ask(worker) for worker in workers]
        others = watch.others()
        is_quiet = others <= noise
        print(
            f"round {number}: {' and '.join(show(answer) for answer in answers)}, others used "
            f"{100 * others:.1f} % of the CPU" + ("" if is_quiet else "; not counted"),
            file=sys.stderr,
            flush=True,
        )
        if is_quiet:
            quiet_rounds += 1
            yield answers, others
        if quiet_rounds == count:
            return
    raise Noisy("other programs use this machine; end them, or see --noise")
