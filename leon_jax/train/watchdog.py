"""Ends a run in which a step does not end, instead of waiting for ever.

If a host hangs, all others wait for it in a collective. Each host has a watchdog. After
`step_timeout` seconds without the end of a step, it writes the stacks of all threads of its host
into the workdir. The watchdogs of the other hosts see the file and write theirs. Then all processes
exit with the code `supervisor.STUCK`, and the launcher starts them again.
"""

import collections
import contextlib
import faulthandler
import os
import pathlib
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from leon_jax import storage
from leon_jax.train.supervisor import STUCK

# Seconds that a host waits for the files of the others, besides two of their looks.
_GRACE_SECONDS = 10.0
# Seconds in which the other hosts exit. They look for the files every 0.1 s.
_EXIT_SECONDS = 2.0


class Watchdog:
    """Watches the steps of this process in threads of its own, from `start` to `close`.

    The constructor is a collective operation. While it is paused, for example during a checkpoint,
    no time counts. Time in which the process is stopped does not count either.

    Args:
      workdir: the folder of the run. The stacks of host I go to `stacks/START/host_I.txt`.
      seconds: the longest time of a step; 0 watches nothing.
    """

    def __init__(self, workdir: pathlib.Path, seconds: float) -> None:
        self._seconds, self._interval = seconds, min(max(seconds / 20, 0.2), 30.0)
        self._unfinished: collections.deque[jax.Array] = collections.deque()
        self._is_paused, self._resumes = False, 0
        self._is_closed, self._others_are_stuck = threading.Event(), threading.Event()
        if not seconds:
            return
        start = np.int32(time.time())
        if jax.process_count() > 1:  # all hosts use one folder
            start = multihost_utils.broadcast_one_to_all(start)
        name = time.strftime("%Y%m%d-%H%M%S", time.gmtime(int(start)))
        self._folder = workdir / "stacks" / name

    def start(self) -> None:
        """Starts the clock when all hosts call this; a collective operation.

        So it does not matter how long each host compiles before.
        """
        if self._seconds:
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices("first step")
            # Only the second thread reads files, since a file system may hang.
            for target in (self._watch, self._look_for_others):
                threading.Thread(target=target, daemon=True).start()

    def close(self) -> None:
        """Ends the watch."""
        self._is_closed.set()

    def add(self, output: jax.Array) -> None:
        """Adds an output of a step that was started; the step ends when it is ready."""
        if self._seconds:
            self._unfinished.append(output)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stops the clock within the context."""
        was_paused, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._resumes += 1
            self._is_paused = was_paused

    def _watch(self) -> None:
        stuck_seconds, resumes, last = 0.0, self._resumes, time.monotonic()
        while not self._is_closed.wait(self._interval):
            now = time.monotonic()
            # More time means that this process did not run.
            elapsed, last = min(now - last, 2 * self._interval), now
            if self._has_progress() or self._is_paused or resumes != self._resumes:
                stuck_seconds, resumes = 0.0, self._resumes
            else:
                stuck_seconds += elapsed
            if stuck_seconds >= self._seconds:
                self._end(f"no step ended within {self._seconds:g} s (config.loop.step_timeout)")
            if self._others_are_stuck.is_set():
                self._end("another host found that no step ends")

    def _has_progress(self) -> bool:
        """Returns whether a step has ended since the last call."""
        has_ended = False
        while self._unfinished and self._unfinished[0].is_ready():  # type: ignore[attr-defined]
            self._unfinished.popleft()
            has_ended = True
        return has_ended

    def _look_for_others(self) -> None:
        while jax.process_count() > 1 and not self._is_closed.wait(self._interval):
            if self._folder.exists():
                self._others_are_stuck.set()

    def _end(self, reason: str) -> None:
        """Writes the stacks of this host, waits for those of the others, and exits."""
        if self._is_closed.is_set():  # the run has just ended
            return
        print(
            f"leon train: {reason}; the stacks of all hosts are in {self._folder}; this process "
            "exits, and the same command continues from the newest checkpoint",
            file=sys.stderr,
            flush=True,
        )
        writer = threading.Thread(target=self._write_stacks, daemon=True)
        writer.start()
        writer.join(_GRACE_SECONDS + 2 * self._interval)
        if jax.process_count() > 1 and not jax.process_index():
            # Without this process, which coordinates the others, they would be aborted.
            time.sleep(_EXIT_SECONDS)
        os._exit(STUCK)

    def _write_stacks(self) -> None:
        with tempfile.TemporaryFile("w+") as file:
            file.write(f"host {jax.process_index()} ({socket.gethostname()}), main thread:\n")
            main_thread = threading.main_thread().ident
            traceback.print_stack(sys._current_frames().get(main_thread or 0), file=file)
            file.write("\nall threads:\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            stacks = file.read()
        storage.make_folder(self._folder)
        storage.write(self._folder / f"host_{jax.process_index():04d}.txt", stacks)
        while len(list(self._folder.glob("host_*.txt"))) < jax.process_count():
            time.sleep(0.1)
