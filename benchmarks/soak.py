#!/usr/bin/env python3
"""Kills a training run with SIGKILL at random times and compares it with an undisturbed run.

    python -m benchmarks.soak --kills=20 --out=out/soak
    python -m benchmarks.soak --out=out/soak --devices=8 -- --config.loop.mesh="(2, 2, 1, 2)"

First `leon train` runs undisturbed. Then it runs in another workdir, where it is killed and started
again with the same command. Arguments after `--` are added to both commands. At the end the results
must be equal (see `benchmarks/compare_runs.py`).

Each kill aims at a phase. The process is stopped before it is killed, so that its phase can be
determined. The phases, as seen from outside:

    start    imports and data, before it opens its workdir
    restore  until it prints that it has resumed
    compile  until the first loss
    step     updates
    save     a checkpoint exists under its temporary name

Exit code 0: equal. 1: the runs differ; the first difference is named. 2: a run failed.
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
# The phases that kills aim at, in turn. Some also hit compilation, which follows every start.
AIMS = ("save", "step", "restore", "save", "step", "start")
POLL = 0.002  # seconds


class Failed(Exception):
    """A run failed or ended too early."""


class Run:
    """One start of a training run, observed from outside.

    Args:
      command: the command; it writes into `workdir`.
      workdir: the folder of the run; stderr is appended to `WORKDIR.log` next to it.
      environment: environment variables of the process.
    """

    def __init__(
        self, command: list[str], workdir: pathlib.Path, environment: dict[str, str]
    ) -> None:
        workdir.mkdir(parents=True, exist_ok=True)
        self._workdir, self._log = workdir, workdir.with_suffix(".log")
        self._log_start = self._log.stat().st_size if self._log.exists() else 0
        self._opened_before = self._opened()
        names = self._checkpoints()
        self._restores = any(name.isdigit() for name in names)
        # Partial checkpoints of the previous start, which this start removes at some time.
        self._leftover = {name for name in names if not name.isdigit()}
        self.start_time = time.monotonic()
        with self._log.open("a") as log:
            # A new process group, so that its child processes are killed too.
            self.process = subprocess.Popen(
                command, env=environment, cwd=ROOT, stderr=log, start_new_session=True
            )

    def phase(self) -> str:
        """One of `PHASES`, or "end"."""
        if self.process.poll() is not None:
            return "end"
        if self._opened() == self._opened_before:
            return "start"
        output = self.output()
        if self._restores and "resumed from step" not in output:
            return "restore"
        if "\nstep " not in "\n" + output:
            return "compile"
        return "save" if self.unfinished() else "step"

    def unfinished(self) -> set[str]:
        """Returns the names of checkpoints that this start has begun and not finished."""
        present = {name for name in self._checkpoints() if not name.isdigit()}
        self._leftover &= present
        return present - self._leftover

    def step(self) -> int:
        """Returns the newest step that this or an earlier start has logged."""
        path = self._workdir / "metrics.jsonl"
        for line in reversed(path.read_text().splitlines() if path.exists() else []):
            try:
                return json.loads(line)["step"]
            except ValueError:  # a partial line
                continue
        return 0

    def output(self) -> str:
        """Returns what this start wrote to stderr."""
        with self._log.open("rb") as log:
            log.seek(self._log_start)
            return log.read().decode(errors="replace")

    def freeze(self) -> None:
        """Stops all threads of the process."""
        os.killpg(self.process.pid, signal.SIGSTOP)
        # A thread may still run until the system reports the stop.
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def wake(self) -> None:
        os.killpg(self.process.pid, signal.SIGCONT)

    def kill(self) -> None:
        """Kills the process with SIGKILL if it is running."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def _opened(self) -> int:
        # Every start writes its configuration just before it looks for checkpoints.
        path = self._workdir / "config.json"
        return path.stat().st_mtime_ns if path.exists() else 0

    def _checkpoints(self) -> list[str]:
        folder = self._workdir / "checkpoints"
        return os.listdir(folder) if folder.is_dir() else []


class Clock:
    """Measures the duration of phases."""

    def __init__(self) -> None:
        self._seconds: dict[str, list[float]] = {phase: [] for phase in PHASES}

    def follow(self, run: Run, until: Callable[[str], bool] = lambda phase: False) -> str:
        """Waits until `until(phase)` is true or the run ends, and returns the phase."""
        phase, since = run.phase(), time.monotonic()
        while phase != "end" and not until(phase):
            time.sleep(POLL)
            if (now := run.phase()) != phase:
                self._seconds[phase].append(time.monotonic() - since)
                phase, since = now, time.monotonic()
        return phase

    def typical(self, phase: str) -> float:
        """Returns the median duration in seconds; 0 if no complete phase was seen."""
        return statistics.median(self._seconds[phase] or [0.0])


def strike(run: Run, aim: str, step: int, late: float, clock: Clock) -> str:
    """Kills `run` and returns the phase in which it was killed.

    A kill that aims at a save is repeated until it hits one. Other kills may hit a later phase.

    Args:
      run: a run that has just been started.
      aim: the phase to wait for, at `step` or later.
      step: the first step to kill at; ignored for `start` and `restore`, which occur once.
      late: delay of the kill within the phase, as a fraction of the phase's typical duration.
      clock: measures the durations of phases.

    Raises:
      Failed: the run ended before it was killed.
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
        f"0, give it more --steps\n{run.output()[-2000:]}"
    )


def soak(arguments: argparse.Namespace, running: list[Run]) -> list[str]:
    """Runs the undisturbed and the killed run, and returns their differences.

    Args:
      arguments: see `main`.
      running: every started run is appended to it.

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
            raise Failed(f"leon train failed:\n{run.output()[-2000:]}")

    clock, start_time = Clock(), time.monotonic()
    finish(start("undisturbed"))
    print(
        f"undisturbed: {arguments.steps} steps in {time.monotonic() - start_time:.0f} s, "
        f"a checkpoint every {SAVE_EVERY}, each {1000 * clock.typical('save'):.0f} ms",
        flush=True,
    )
    rng = random.Random(arguments.seed)
    aims = [AIMS[number % len(AIMS)] for number in range(arguments.kills)]
    rng.shuffle(aims)
    # Ascending, so that the run makes progress. The last saves are kept as a reserve for retries.
    steps = sorted(rng.randrange(1, arguments.steps - 3 * SAVE_EVERY) for _ in aims)
    phases: collections.Counter[str] = collections.Counter()
    partial = 0
    for number, (aim, step) in enumerate(zip(aims, steps, strict=True), 1):
        run = start("killed")
        phase = strike(run, aim, step, rng.random(), clock)
        phases[phase] += 1
        unfinished = " ".join(sorted(run.unfinished()))
        partial += bool(unfinished)
        print(
            f"kill {number:2}  step {run.step():3}  {phase:7}  "
            f"{time.monotonic() - run.start_time:5.2f} s after its start  {unfinished}".rstrip(),
            flush=True,
        )
    finish(start("killed"))
    counts = ", ".join(f"{phases[phase]} in {phase}" for phase in PHASES)
    print(
        f"{arguments.kills} kills: {counts}; {partial} left a partial checkpoint;  "
        f"{time.monotonic() - start_time:.0f} s in all"
    )
    return differences(out / "undisturbed", out / "killed")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="number of kills")
    parser.add_argument("--seed", type=int, default=0, help="seed of the times of the kills")
    parser.add_argument("--steps", type=int, default=400, help="steps of the run")
    parser.add_argument("--devices", type=int, default=1, help="simulated CPU devices")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="a new or empty folder")
    parser.add_argument("more", nargs="*", help="after --: flags of leon train")
    arguments = parser.parse_args()
    if arguments.kills < 1 or arguments.steps <= 4 * SAVE_EVERY or arguments.devices < 1:
        parser.error(
            f"--kills and --devices must be at least 1, and --steps above {4 * SAVE_EVERY}"
        )
    if arguments.out.exists() and any(arguments.out.iterdir()):
        parser.error(f"{arguments.out} is not empty")
    running: list[Run] = []
    try:
        sentences = soak(arguments, running)
    except Failed as error:
        print(error, file=sys.stderr)
        return 2
    finally:
        for run in running:
            run.kill()
    if sentences:
        print(f"DIFFERENT: {sentences[0]}", *sentences[1:10], sep="\n  ")
        return 1
    print(f"equal, bit for bit: {len(contents(arguments.out / 'killed'))} values compared")
    return 0


if __name__ == "__main__":
    sys.exit(main())
