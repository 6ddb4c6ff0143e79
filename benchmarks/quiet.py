"""Whether anything else ran on this machine while something was timed (Linux).

A busy machine does not slow both sides of a comparison alike: PyTorch's threads wait for each other
after every operation, and when one of them has no core it can be twenty times slower, while XLA's
share their work. Such a measurement says nothing, so it has to be found out and made again.
"""

import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from benchmarks.turns import Worker


class Noisy(Exception):
    """Other programs use this machine."""


class Watch:
    """From its creation on, measures the CPU time of everything but `processes` and this one."""

    def __init__(self, processes: Iterable[int]) -> None:
        self._processes = (os.getpid(), *processes)
        self._began, self._all, self._known = self._now()

    def others(self) -> float:
        """CPU time of all others until now, as a share of all cores; 0 where there is no /proc."""
        now, everything, known = self._now()
        wall = max(now - self._began, 1e-9) * (os.cpu_count() or 1)
        return max(0.0, (everything - self._all) - (known - self._known)) / wall

    def _now(self) -> tuple[float, float, float]:
        """Seconds: the time, all CPU time used so far, and that of the known processes."""
        if not pathlib.Path("/proc/stat").exists():
            return time.monotonic(), 0.0, 0.0
        tick = os.sysconf("SC_CLK_TCK")
        # user, nice, system, (idle, iowait), irq, softirq, steal
        cpu = [int(n) for n in pathlib.Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
        known = 0
        for process in self._processes:
            # The name, in brackets, may hold spaces.
            fields = pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
            known += int(fields[11]) + int(fields[12])
        return time.monotonic(), (sum(cpu) - cpu[3] - cpu[4]) / tick, known / tick


def wait(share: float, patience: float) -> bool:
    """Waits until others use at most `share` of the CPU for a second; False after `patience` s."""
    until = time.monotonic() + patience
    while time.monotonic() < until:
        watch = Watch(())
        time.sleep(1)
        if watch.others() <= share:
            return True
    return False


def rounds[T](
    workers: Sequence[Worker],
    ask: Callable[[Worker], T],
    count: int,
    noise: float,
    patience: float,
    show: Callable[[T], Any] = str,
) -> Iterator[tuple[list[T], float]]:
    """Rounds in which the workers take turns and others leave the machine alone.

    Args:
      workers: in their order.
      ask: what each does in a round.
      count: how many quiet rounds are wanted; up to three times as many are made.
      noise: share of the CPU that others may use.
      patience: seconds to wait for that, before a round.
      show: an answer as it is printed.

    Yields:
      What each worker answered, and the share of the CPU that others used.

    Raises:
      Noisy: there were too few quiet rounds.
    """
    found = 0
    for number in range(1, 3 * count + 1):
        if not wait(noise, patience):
            break
        watch = Watch(worker.pid for worker in workers)
        answers = [ask(worker) for worker in workers]
        others = watch.others()
        quiet = others <= noise
        print(
            f"round {number}: {' and '.join(show(answer) for answer in answers)}, others used "
            f"{100 * others:.1f} % of the CPU" + ("" if quiet else "; not counted"),
            file=sys.stderr,
            flush=True,
        )
        if quiet:
            found += 1
            yield answers, others
        if found == count:
            return
    raise Noisy("other programs use this machine; end them, or see --noise")
