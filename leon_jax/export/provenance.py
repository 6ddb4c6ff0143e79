"""What is known of the data and the training of a model's parts.

It is read from the model folder that a part comes from, or else from the training run that wrote it
and from the prepared folders that the run read. Nothing is guessed: what is not recorded is said to
be unknown.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from leon_jax import model_description, storage
from leon_jax.config import UserError
from leon_jax.data.document_folder import MANIFEST, TRAIN
from leon_jax.model_description import TrainingData
from leon_jax.prepare.gather import OTHERS

# The file with the configuration of a run, and the folder with its model.
CONFIG, EXPORT = "config.json", "export"


@dataclasses.dataclass(frozen=True)
class Provenance:
    """What is known of one part.

    Attributes:
      data: the datasets that it was trained on.
      licences: SPDX expressions of its data, with those of the model that it started from.
      is_complete: whether all of its data have recorded licences.
      training: `steps`, `base` and `config`, as far as they are known.
    """

    data: tuple[TrainingData, ...] = ()
    licences: tuple[str, ...] = ()
    is_complete: bool = False
    training: dict = dataclasses.field(default_factory=dict)


def of_part(part: str, path: pathlib.Path) -> Provenance:
    """Returns what is known of a part of a model.

    Args:
      part: "decoder", "tokenizer", "encoder" or "text".
      path: its file, or the folder of an encoder.

    Raises:
      UserError: `model.json` or `config.json` beside the part is damaged.
    """
    return _of_part(part, storage.absolute(path), frozenset())


def of_run(part: str, workdir: pathlib.Path, config: Mapping[str, Any] | None = None) -> Provenance:
    """Returns what is known of a part that a training run wrote.

    Args:
      part: the kind of the run; or "text", for the text tokenizer that a decoder's run copied.
      workdir: the folder of the run, with `config.json`.
      config: the configuration of a run without `config.json`.

    Raises:
      UserError: `config.json`, or a file of a model that the run started from, is damaged.
    """
    workdir = storage.absolute(workdir)
    if config is not None and not (workdir / CONFIG).is_file():
        return _of_config(part, dict(config), frozenset())
    return _of_run(part, workdir, frozenset())


def run_config(workdir: pathlib.Path) -> dict[str, Any]:
    """Reads the configuration of a training run.

    Raises:
      UserError: there is no such file, or it is damaged.
    """
    path = workdir / CONFIG
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{workdir} is not a training run: it has no {CONFIG}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a group of keys")
    return values


def merge(data: Iterable[TrainingData]) -> tuple[TrainingData, ...]:
    """Returns each dataset once, with all parts that were trained on it."""
    merged: dict[tuple, TrainingData] = {}
    for each in data:
        key = each.name, each.split, each.documents, tuple(sorted(each.licences.items()))
        known = merged.get(key, dataclasses.replace(each, parts=()))
        parts = tuple(dict.fromkeys((*known.parts, *each.parts)))
        merged[key] = dataclasses.replace(known, parts=parts)
    return tuple(merged.values())


def _of_part(part: str, path: pathlib.Path, seen: frozenset) -> Provenance:
    if description := model_description.read(path.parent):
        data = (each for each in description.data if part in each.parts)
        return Provenance(
            tuple(dataclasses.replace(each, parts=(part,)) for each in data),
            description.licences,
            part not in description.unknown_licences,
            description.training.get(part, {}),
        )
    workdir = path.parent.parent
    if path.parent.name == EXPORT and (workdir / CONFIG).is_file():
        return _of_run(part, workdir, seen)
    return Provenance()


def _of_run(part: str, workdir: pathlib.Path, seen: frozenset) -> Provenance:
    if workdir in seen:  # a run that names itself as its start
        return Provenance()
    return _of_config(part, run_config(workdir), seen | {workdir})


def _of_config(part: str, config: dict[str, Any], seen: frozenset) -> Provenance:
    settings = config.get("data") or {}
    if part == "text" and config.get("kind") == "decoder":
        return _of_part(part, storage.absolute(settings.get("text", "")), seen)
    data = tuple(_training_data(part, *address) for address in _addresses(settings))
    licences = [licence for each in data for licence in each.licences if licence != OTHERS]
    is_complete = bool(data) and all(each.licences for each in data)
    base = (config.pop("loop", None) or {}).get("init_from", "")
    if base:
        path = storage.absolute(base)
        is_run = (path / CONFIG).is_file()
        start = _of_run(part, path, seen) if is_run else _of_part(part, path, seen)
        data, licences = (*start.data, *data), [*start.licences, *licences]
        is_complete = is_complete and start.is_complete
    training = {"steps": config.get("steps"), "base": base, "config": config}
    return Provenance(merge(data), tuple(dict.fromkeys(licences)), is_complete, training)


def _addresses(settings: Mapping[str, Any]) -> Iterator[tuple[pathlib.Path, str]]:
    """Yields the folder and the split of each dataset in the data settings of a run."""
    groups = [settings]
    for key in ("mixture", "folders"):
        several = settings.get(key) or ()
        groups += [{"folder": each} if isinstance(each, str) else each for each in several]
    for group in groups:
        for key in ("folder", "dir"):
            if isinstance(group.get(key), str) and group[key]:
                yield storage.path(group[key]), group.get("split") or TRAIN


def _training_data(part: str, folder: pathlib.Path, split: str) -> TrainingData:
    """Returns what the manifest of a folder says of a split."""
    name = storage.absolute(folder).name
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        documents = manifest["splits"][split]
        counts = manifest["counts"].get(split, {})
    except (OSError, ValueError, KeyError, TypeError):
        return TrainingData(name, (part,), split)
    return TrainingData(
        name,
        (part,),
        split,
        documents,
        counts.get("licence", {}),
        counts.get("source", {}),
        tuple(
            credit
            for credit in counts.get("credit", {})
            if credit != OTHERS and not credit.endswith("(no credit line)")
        ),
    )
