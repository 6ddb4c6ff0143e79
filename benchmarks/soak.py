#!/usr/bin/env python3
"""Kills a training run with SIGKILL at random moments; it must end as one that nothing disturbed.

    python -m benchmarks.soak --kills=20 --out=out/soak
    python -m benchmarks.soak --out=out/soak --devices=8 -- --config.loop.mesh="(2, 2, 1, 2)"

First `leon train` runs undisturbed, then again in another workdir, where it is killed and started
again with the same command. What follows `--` is added to both commands. At the end everything in
`benchmarks/compare_runs.py` must be equal.

A kill aims at a phase. The process is frozen first, so that what it was doing can be seen, and dies
without waking up. The phases, as seen from outside:

    start    imports and data, before it opens its workdir
    restore  until it says that it has resumed
    compile  until the first loss
    step     updates
    save     a checkpoint is there under its temporary name

Exit code 0: equal. 1: something differs; the first such array is named. 2: nothing to compare.
"""

import argparse
import collections
import json
import os
import pathlib
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from benchmarks.compare_runs import contents, differences
from benchmarks.soak_config import SAVE_EVERY, write_data

ROOT = pathlib.Path(__file__).resolve().parents[1]
PHASES = ("start", "restore", "compile", "step", "save")
# What kills aim at, in turn. A compilation follows every start, so some hit it anyway.
AIMS = ("save", "step", "restore", "save", "step", "start")
POLL = 0.002  # seconds


class Failed(Exception):
    """There is nothing to compare."""


class Run:
    """One start of a training run, seen from outside.

    Args:
      command: what to run; it writes into `workdir`.
      workdir: its messages go beside it, into a file of the same name that ends in `.log`.
      environment: variables of the process.
    """

    def __init__(
        self, command: list[str], workdir: pathlib.Path, environment: dict[str, str]
    ) -> None:
        workdir.mkdir(parents=True, exist_ok=True)
        self._workdir, self._log = workdir, workdir.with_suffix(".log")
        self._said_before = self._log.stat().st_size if self._log.exists() else 0
        self._opened_before = self._opened()
        names = self._checkpoints()
        self._restores = any(name.isdigit() for name in names)
        # Half a checkpoint of the start before, which this one removes at some time.
        self._leftover = {name for name in names if not name.isdigit()}
        self.began = time.monotonic()
        with self._log.open("a") as log:
            # A process group of its own, so that whatever it starts dies with it.
            self.process = subprocess.Popen(
                command, env=environment, cwd=ROOT, stderr=log, start_new_session=True
            )

    def phase(self) -> str:
        """One of `PHASES`, or "end"."""
        if self.process.poll() is not None:
            return "end"
        if self._opened() == self._opened_before:
            return "start"
        said = self.said()
        if self._restores and "resumed from step" not in said:
            return "restore"
        if "\nstep " not in "\n" + said:
            return "compile"
        return "save" if self.unfinished() else "step"

    def unfinished(self) -> set[str]:
        """Names of the checkpoints that this start began to write and has not finished."""
        present = {name for name in self._checkpoints() if not name.isdigit()}
        self._leftover &= present
        return present - self._leftover

    def step(self) -> int:
        """The newest step that this start or one before it has logged."""
        path = self._workdir / "metrics.jsonl"
        for line in reversed(path.read_text().splitlines() if path.exists() else []):
            try:
                return json.loads(line)["step"]
            except ValueError:  # half a line
                continue
        return 0

    def said(self) -> str:
        """What this start wrote on stderr."""
        with self._log.open("rb") as log:
            log.seek(self._said_before)
            return log.read().decode(errors="replace")

    def freeze(self) -> None:
        """Stops all its threads where they are."""
        os.killpg(self.process.pid, signal.SIGSTOP)
        # Until the system says so, a thread may still be running.
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def wake(self) -> None:
        os.killpg(self.process.pid, signal.SIGCONT)

    def kill(self) -> None:
        """Ends it with SIGKILL if it has not ended."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def _opened(self) -> int:
        # Every start writes its configuration anew, just before it looks for checkpoints.
        path = self._workdir / "config.json"
        return path.stat().st_mtime_ns if path.exists() else 0

    def _checkpoints(self) -> list[str]:
        folder = self._workdir / "checkpoints"
        return os.listdir(folder) if folder.is_dir() else []


class Clock:
    """How long phases last, from all that was seen so far."""

    def __init__(self) -> None:
        self._seconds: dict[str, list[float]] = {phase: [] for phase in PHASES}

    def follow(self, run: Run, until: Callable[[str], bool] = lambda phase: False) -> str:
        """Waits until `until(phase)` or the end of the run; returns the phase."""
        phase, since = run.phase(), time.monotonic()
        while phase != "end" and not until(phase):
            time.sleep(POLL)
            if (now := run.phase()) != phase:
                self._seconds[phase].append(time.monotonic() - since)
                phase, since = now, time.monotonic()
        return phase

    def typical(self, phase: str) -> float:
        """The median, in seconds; 0 for a phase that was never seen whole."""
        return statistics.median(self._seconds[phase] or [0.0])


def strike(run: Run, aim: str, step: int, late: float, clock: Clock) -> str:
    """Kills `run` and returns the phase in which it died.

    A kill that aims at a save is put off until it hits one; any other may come a little late.

    Args:
      run: one that has just been started.
      aim: the phase to wait for, at `step` or later.
      step: does not matter for `start` and `restore`, which only come once.
      late: how far into the phase to strike, in parts of the time that it usually takes.
      clock: knows how long that is.

    Raises:
      Failed: the run ended before.
    """

    def reached(phase: str) -> bool:
        if aim in ("step", "save"):
            return phase == aim and run.step() >= step
        return PHASES.index(phase) >= PHASES.index(aim)

    while clock.follow(run, reached) != "end":
        time.sleep(late * clock.typical(aim))
        run.freeze()
        phase = run.phase()
        if phase == "end":
            break
        if aim != "save" or phase == "save":
            run.kill()
            return phase
        run.wake()
        late /= 2
    raise Failed(
        f"the run ended with code {run.process.returncode} before it could be killed; if that is "
        f"0, give it more --steps\n{run.said()[-2000:]}"
    )


def soak(arguments: argparse.Namespace, running: list[Run]) -> list[str]:
    """Does what this file's description says, prints it, and returns what differs.

    Args:
      arguments: see `main`.
      running: every process that was started is added to it.

    Raises:
      Failed: a run failed or ended too early.
    """
    out = arguments.out.absolute()
    write_data(out / "data")
    devices = f"--xla_force_host_platform_device_count={arguments.devices}"
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {devices}".strip(),
    }

    def start(name: str) -> Run:
        command = [
            sys.executable, "-m", "leon_jax.cli.main", "train",
            f"--config={ROOT / 'benchmarks' / 'soak_config.py'}:{out / 'data'}",
            f"--config.steps={arguments.steps}",
            f"--config.optimizer.total_steps={arguments.steps}",
            f"--workdir={out / name}",
            *arguments.more,
        ]  # fmt: skip
        running.append(Run(command, out / name, environment))
        return running[-1]

    def finish(run: Run) -> None:
        clock.follow(run)
        if run.process.returncode:
            raise Failed(f"leon train failed:\n{run.said()[-2000:]}")

    clock, began = Clock(), time.monotonic()
    finish(start("undisturbed"))
    print(
        f"undisturbed: {arguments.steps} steps in {time.monotonic() - began:.0f} s, "
        f"a checkpoint every {SAVE_EVERY}, each {1000 * clock.typical('save'):.0f} ms",
        flush=True,
    )
    chance = random.Random(arguments.seed)
    aims = [AIMS[number % len(AIMS)] for number in range(arguments.kills)]
    chance.shuffle(aims)
    # Rising, so that the run gets on. The last saves are left to it: a kill may need a second one.
    steps = sorted(chance.randrange(1, arguments.steps - 3 * SAVE_EVERY) for _ in aims)
    phases: collections.Counter[str] = collections.Counter()
    halves = 0
    for number, (aim, step) in enumerate(zip(aims, steps, strict=True), 1):
        run = start("killed")
        phase = strike(run, aim, step, chance.random(), clock)
        phases[phase] += 1
        left = " ".join(sorted(run.unfinished()))
        halves += bool(left)
        print(
            f"kill {number:2}  step {run.step():3}  {phase:7}  "
            f"{time.monotonic() - run.began:5.2f} s after its start  {left}".rstrip(),
            flush=True,
        )
    finish(start("killed"))
    counts = ", ".join(f"{phases[phase]} in {phase}" for phase in PHASES)
    print(
        f"{arguments.kills} kills: {counts}; {halves} left half a checkpoint; "
        f"{time.monotonic() - began:.0f} s in all"
    )
    return differences(out / "undisturbed", out / "killed")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="decides when")
    parser.add_argument("--steps", type=int, default=400, help="length of the run")
    parser.add_argument("--devices", type=int, default=1, help="simulated CPU devices")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="a folder, new or empty")
    parser.add_argument("more", nargs="*", help="after --: flags for leon train")
    arguments = parser.parse_args()
    if arguments.kills < 1 or arguments.steps <= 4 * SAVE_EVERY or arguments.devices < 1:
        parser.error(f"needs a kill, a device, and more than {4 * SAVE_EVERY} steps")
    if arguments.out.exists() and any(arguments.out.iterdir()):
        parser.error(f"{arguments.out} is not empty")
    running: list[Run] = []
    try:
        found = soak(arguments, running)
    except Failed as error:
        print(error, file=sys.stderr)
        return 2
    finally:
        for run in running:
            run.kill()
    if found:
        print(f"DIFFERENT: {found[0]}", *found[1:10], sep="\n  ")
        return 1
    print(f"equal, bit for bit: all {len(contents(arguments.out / 'killed'))} things compared")
    return 0


if __name__ == "__main__":
    sys.exit(main())
