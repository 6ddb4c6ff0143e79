"""Short trainings for comparisons: runs `leon` commands and measures their processor time."""

import json
import pathlib
import resource
import subprocess
import sys


def train(folder: pathlib.Path, stage: str, values: dict, steps: int) -> None:
    """Trains a stage and adds its time to core_seconds.json; a finished one is skipped."""
    times = folder / "core_seconds.json"
    seconds = json.loads(times.read_text()) if times.exists() else {}
    if (folder / stage / "export").exists():
        return
    values["steps"] = values["optimizer"]["total_steps"] = steps
    config = folder / f"{stage}.py"
    config.write_text(
        "from ml_collections import ConfigDict\n\n\ndef get_config():\n"
        f"    return ConfigDict({values!r})\n"
    )
    before = children_seconds()
    leon("train", f"--config={config}", f"--workdir={folder / stage}")
    seconds[stage] = round(seconds.get(stage, 0) + children_seconds() - before)
    times.write_text(json.dumps(seconds) + "\n")


def children_seconds() -> float:
    """Returns the processor time of the finished child processes."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def held_out(run: pathlib.Path) -> dict[str, float]:
    """Returns the last held-out measurements of a run."""
    for line in reversed((run / "metrics.jsonl").read_text().splitlines()):
        values = json.loads(line)
        prefix = "heldout/"
        measured = {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}
        if measured:
            return measured
    raise ValueError(f"{run} has no held-out measurements")


def leon(verb: str, *arguments: str) -> str:
    """Runs a `leon` command and returns its stdout."""
    command = [sys.executable, "-m", "leon_jax.cli.main", verb, *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
