"""Reads the files of training runs. A run may go on meanwhile, or may have been killed."""

import dataclasses
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from leon_jax.config import UserError


@dataclasses.dataclass(frozen=True)
class Run:
    """What is known of a run.

    Attributes:
      name: a short name, different from those of the other runs of a report.
      folder: its workdir.
      config: the values of `config.json` by dotted key; empty for a text tokenizer.
      lines: the lines of `metrics.jsonl` with different steps, in order; each has "step".
      hosts: the lines of `hosts.jsonl`, in order; each has "step".
      damaged: number of lines of both files that cannot be read, for example cut by a kill.
      seconds: the wall time by category of `leon_jax.train.goodput`, from `goodput.json`.
      updated: Unix time of the newest metrics; None: there are none.
      history: the branches that led to this run, from `history.json`, the oldest first.
    """

    name: str
    folder: pathlib.Path
    config: Mapping[str, Any]
    lines: Sequence[Mapping[str, Any]]
    hosts: Sequence[Mapping[str, Any]]
    damaged: int
    seconds: Mapping[str, float]
    updated: float | None
    history: Sequence[Mapping[str, Any]]

    @property
    def step(self) -> int:
        """The newest step that was logged, or 0."""
        return self.lines[-1]["step"] if self.lines else 0

    @property
    def is_finished(self) -> bool:
        """Whether the run wrote its model after its last step."""
        return (self.folder / "export").is_dir() and self.step >= self.config.get("steps", 0)

    def samples(self) -> dict[str, list[tuple[int, pathlib.Path]]]:
        """Returns the (step, PNG file) pairs of each kind of sample images, by step."""
        files: dict[str, list[tuple[int, pathlib.Path]]] = {}
        for path in sorted((self.folder / "samples").glob("*.png")):
            if match := re.fullmatch(r"(.+)_(\d+)", path.stem):
                files.setdefault(match[1], []).append((int(match[2]), path))
        return {name: sorted(pairs) for name, pairs in files.items()}

    def profiles(self) -> list[tuple[str, list[pathlib.Path]]]:
        """Returns the (name, files of all hosts) pairs of the run's profiles."""
        folders = sorted((self.folder / "profiles" / "plugins" / "profile").glob("*"))
        pairs = [(folder.name, sorted(folder.glob("*.xplane.pb"))) for folder in folders]
        return [(name, files) for name, files in pairs if files]

    def stacks(self) -> list[pathlib.Path]:
        """Returns the folders with the stacks of hosts of a step that did not end."""
        return sorted(path for path in (self.folder / "stacks").glob("*") if path.is_dir())


def read(folders: Sequence[pathlib.Path]) -> list[Run]:
    """Reads runs.

    Args:
      folders: the workdirs, at least one.

    Raises:
      UserError: a folder is named twice, does not exist or holds no run.
    """
    names = [folder.absolute().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    if len(set(names)) < len(names):
        raise UserError(f"{max(names, key=names.count)} is named twice; name each run once")
    return [_read(name, folder) for name, folder in zip(names, folders, strict=True)]


def _read(name: str, folder: pathlib.Path) -> Run:
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; name the --workdir of leon train")
    if not any((folder / part).exists() for part in ("config.json", "metrics.jsonl", "export")):
        raise UserError(
            f"{folder} holds no run: it has no config.json and no metrics.jsonl; name the "
            "--workdir of leon train"
        )
    lines, damaged = _lines(folder / "metrics.jsonl")
    hosts, damaged_hosts = _lines(folder / "hosts.jsonl")
    goodput, history = _json(folder / "goodput.json"), _json(folder / "history.json")
    seconds = goodput.get("seconds", {}) if isinstance(goodput, dict) else {}
    return Run(
        name,
        folder,
        _flat(_json(folder / "config.json") or {}),
        lines,
        hosts,
        damaged + damaged_hosts,
        seconds,
        (folder / "metrics.jsonl").stat().st_mtime if lines else None,
        history if isinstance(history, list) else [],
    )


def _lines(path: pathlib.Path) -> tuple[list[dict[str, Any]], int]:
    """Returns the lines of a file, the last of each step, and the number of damaged lines."""
    if not path.exists():
        return [], 0
    lines, damaged = {}, 0
    for text in path.read_bytes().decode(errors="replace").splitlines():
        try:
            line = json.loads(text)
            lines[int(line["step"])] = line
        except (ValueError, KeyError, TypeError):
            damaged += bool(text.strip())
    return [lines[step] for step in sorted(lines)], damaged


def _json(path: pathlib.Path) -> Any:
    """Returns the content of a JSON file, or None if it is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {prefix.removesuffix("."): values}
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.")
    return flat
