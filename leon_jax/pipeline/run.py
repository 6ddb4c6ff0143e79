"""Runs the stages of a pipeline in order, each as a process, and resumes where it was stopped."""

import hashlib
import json
import os
import pathlib
import pprint
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from leon_jax import file_lock
from leon_jax.config import UserError
from leon_jax.data.document_folder import MANIFEST
from leon_jax.pipeline.speed import relative_speed
from leon_jax.pipeline.stages import Command, Stage

_RECORD = "pipeline.json"


def run(stages: Sequence[Stage], workdir: pathlib.Path) -> None:
    """Runs every stage that is not finished.

    Args:
      stages: the stages in order.
      workdir: the folder of the pipeline; created if it is missing.

    Raises:
      UserError: a stage failed, its inputs differ from those of its earlier run, another pipeline
        runs in `workdir`, or it cannot be written.
    """
    try:
        (workdir / "configs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {workdir}: {error.strerror}") from error

    def refuse() -> None:
        raise UserError(f"another pipeline runs in {workdir}; wait for its end")

    with file_lock.hold(workdir / "pipeline.lock", refuse):
        _Progress(stages, workdir).run()


class _Progress:
    """The state of a pipeline: which stages are finished, and how long the others will take."""

    def __init__(self, stages: Sequence[Stage], workdir: pathlib.Path):
        self.stages, self.workdir = stages, workdir
        # By stage: its key, whether it is finished, and seconds and core_seconds of all attempts.
        self.record = _read_record(workdir / _RECORD)
        self.speed = relative_speed()
        # Digest of everything that the next stage depends on.
        self.key = ""

    def run(self) -> None:
        total = sum(stage.seconds for stage in self.stages) / self.speed
        print(f"{len(self.stages)} stages, about {_duration(total)} in all (an estimate)")
        for number, stage in enumerate(self.stages, 1):
            command = stage.make()
            key = f"{self.key}{command.key}"
            entry = self.record.get(stage.name, {})
            title = f"stage {number} of {len(self.stages)}: {stage.title}"
            is_finished = entry.get("finished") and stage.output.exists()
            if entry and not stage.is_repeated and entry["key"] != key:
                names = " ".join(
                    str(self.workdir / later.name) for later in self.stages[number - 1 :]
                )
                raise UserError(
                    f"stage {stage.name} was begun with other data or settings; use another "
                    f"--workdir, or remove {names} to run it again"
                )
            if is_finished and not stage.is_repeated:
                print(f"{title}: finished before")
            else:
                remaining = sum(later.seconds for later in self.stages[number - 1 :]) / self.speed
                print(f"{title} (about {_duration(remaining)} left)")
                self._run_stage(stage, command, key)
            self.key = _chained(key, stage)
        core_hours = sum(self._spent(stage.name)["core_seconds"] for stage in self.stages) / 3600
        print(f"finished: {self.stages[-1].output.parent} ({core_hours:.1f} core-hours)")

    def _run_stage(self, stage: Stage, command: Command, key: str) -> None:
        """Runs the command of a stage in a process."""
        for note in command.notes:
            print(f"  {note}")
        if command.config is not None:
            _write_config(self.workdir / "configs" / f"{stage.name}.py", command)
        for path, text in command.files.items():
            _write(pathlib.Path(path), text)
        if command.arguments:
            print(f"  leon {shlex.join(command.arguments)}", flush=True)
        entry: dict[str, Any] = {"key": key, "finished": False, **self._spent(stage.name)}
        self.record[stage.name] = entry
        self._save()
        start, cpu_start = time.monotonic(), _cpu_seconds()
        code = 0
        try:
            if command.arguments:
                process = [sys.executable, "-m", "leon_jax.cli.main", *command.arguments]
                code = subprocess.run(process, check=False).returncode
        finally:  # an interrupted attempt counts too
            seconds = time.monotonic() - start
            entry["seconds"] = round(entry["seconds"] + seconds, 1)
            entry["core_seconds"] = round(entry["core_seconds"] + _cpu_seconds() - cpu_start, 1)
            self._save()
        if code:
            raise UserError(
                f"stage {stage.name} ended with exit code {code}; its message is above. Run the "
                "same command again to continue"
            )
        if not stage.output.exists():
            raise UserError(f"stage {stage.name} wrote no {stage.output}")
        entry["finished"] = True
        self._save()
        print(f"  took {_duration(seconds)}", flush=True)

    def _spent(self, name: str) -> dict[str, float]:
        """Returns the wall time and the CPU time that earlier attempts of a stage took."""
        entry = self.record.get(name, {})
        return {unit: entry.get(unit, 0.0) for unit in ("seconds", "core_seconds")}

    def _save(self) -> None:
        _write(self.workdir / _RECORD, json.dumps(self.record, indent=1) + "\n")


def _cpu_seconds() -> float:
    """Returns the CPU time of all finished child processes, summed over cores."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _read_record(path: pathlib.Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read; remove it to begin again") from error
    return record


def _chained(key: str, stage: Stage) -> str:
    """Returns the digest that later stages depend on: the key, and the documents of the stage."""
    digest = hashlib.sha256(key.encode())
    manifest = stage.output if stage.output.name == MANIFEST else None
    if manifest is not None:
        digest.update(manifest.read_bytes())
    return digest.hexdigest()[:16] + "-"


def _write_config(path: pathlib.Path, command: Command) -> None:
    """Writes the config file of a stage, which `leon train` can use too."""
    values: Mapping[str, Any] = command.config or {}
    text = pprint.pformat(json.loads(json.dumps(values, default=list)), sort_dicts=False)
    text = (
        f'"""Written by leon pipeline. It runs\n\n    leon {shlex.join(command.arguments)}\n"""\n\n'
        "from ml_collections import ConfigDict\n\n\n"
        f"def get_config():\n    return ConfigDict(\n{_indented(text)}\n    )\n"
    )
    _write(path, text)


def _write(path: pathlib.Path, text: str) -> None:
    """Writes a file atomically."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _indented(text: str) -> str:
    return "\n".join(f"        {line}" for line in text.splitlines())


def _duration(seconds: float) -> str:
    """Returns a duration in words, for example "12 minutes"."""
    for unit, size in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"
