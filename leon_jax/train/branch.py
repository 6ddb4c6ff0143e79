"""Starts a run from a checkpoint of another run, with a changed configuration.

What is carried depends on what changes:

    schedule, steps                  everything: model, optimizer, random key, position in the data
    folders, weights, batch size     all but the position: each folder's order goes on after the
                                     examples that the parent has consumed
    length and packing of rows       all but the position: the data begin anew

Any other change is refused. `history.json` in the workdir says how the run came about.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import grain
import jax
import numpy as np
from jax.experimental import multihost_utils

from leon_jax import config as configs
from leon_jax import storage
from leon_jax.config import UserError
from leon_jax.data.config import FolderComponent
from leon_jax.export import provenance
from leon_jax.train.checkpoint import find_step
from leon_jax.train.checkpoint_reader import load_data
from leon_jax.train.programs import make_program
from leon_jax.train.run_config import MAY_CHANGE, differences
from leon_jax.train.state import Program

Carried = Literal["everything", "state and consumed examples", "state"]

_SCHEDULE = (
    "steps", "optimizer.total_steps", "optimizer.learning_rate", "optimizer.warmup_steps",
    "optimizer.schedule", "optimizer.final_fraction", "optimizer.decay_steps",
)  # fmt: skip
_MIXTURE = (
    "batch_size", "microbatches", "loop.data_shards", "data.folder", "data.split", "data.mixture",
    "data.retrieved", "data.variants", "data.unchanged", "data.balance", "data.per_modality",
)  # fmt: skip
_ROWS = ("data.length", "data.packing", "data.packing_bins")
# Groups of keys without effect on the training.
_FREE_GROUPS = ("loop", "export", "samples")

# Length of the orders that stand for those of the components; longer than any run.
_LONG = 2**62


@dataclasses.dataclass(frozen=True)
class Branch:
    """The beginning of a branch.

    Attributes:
      checkpoints: the folder of the parent's checkpoints.
      step: the step of the checkpoint.
      position: the position in the data, by data shard; None: it is not carried.
      history: what `history.json` says: the branches of the parent, then this one.
    """

    checkpoints: pathlib.Path
    step: int
    position: Mapping[str, str] | None
    history: Sequence[Mapping[str, Any]]

    def write_history(self, workdir: pathlib.Path) -> None:
        """Writes `history.json`."""
        storage.write(workdir / "history.json", json.dumps(self.history, indent=1) + "\n")


def prepare(
    branch_from: str, workdir: pathlib.Path, program: Program, loop: Mapping[str, Any]
) -> tuple[Program, Branch | None]:
    """Prepares the start of a run that may be a branch.

    Args:
      branch_from: WORKDIR@STEP of the parent; the step is a number, "newest" or "best". "": none.
      workdir: the folder of the new run. If it has checkpoints, the run goes on from them.
      program: the program of the new run.
      loop: the configuration of its loop.

    Returns:
      The program, with the orders of the data that the branch continues; and the branch, or None if
      the run does not begin with one.

    Raises:
      UserError: the parent has no such checkpoint, the configuration differs in a key that cannot
        change, or the workdir holds another run.
    """
    history = _history(workdir)
    has_begun = any(workdir.glob("checkpoints/[0-9]*"))
    if has_begun and branch_from and (not history or history[-1]["branch_from"] != branch_from):
        raise UserError(
            f"{workdir} holds a run that does not branch from {branch_from}; use another --workdir"
        )
    if has_begun:
        streams = history[-1]["streams"] if history else []
        return (_with_streams(program, streams) if streams else program), None
    if not branch_from:
        if history:
            raise UserError(
                f"{workdir} holds the beginning of a branch; repeat "
                f"--branch_from={history[-1]['branch_from']}, or use another --workdir"
            )
        return program, None
    return _begin(branch_from, program, loop)


def _begin(branch_from: str, program: Program, loop: Mapping[str, Any]) -> tuple[Program, Branch]:
    folder, at, step_name = branch_from.rpartition("@")
    if not (at and folder and step_name):
        raise UserError(f"--branch_from={branch_from} must be WORKDIR@STEP, for example runs/a@200")
    parent = storage.path(folder)
    values = provenance.run_config(parent)
    parent_loop = values.pop("loop", {})
    if values.get("kind") != program.kind:
        raise UserError(f"{parent} is the run of a {values.get('kind')}, not of a {program.kind}")
    step = find_step(parent / "checkpoints", step_name)
    if jax.process_count() > 1:  # the parent may go on, so that its newest step changes
        step = int(multihost_utils.broadcast_one_to_all(np.int32(step)))
    parent_program = make_program(program.kind, values)
    changes = differences(
        {**configs.to_dict(parent_program.config), "loop": parent_loop},
        {**configs.to_dict(program.config), "loop": dict(loop)},
    )
    carried = what_is_carried(changes)
    position = load_data(parent / "checkpoints", step)
    streams = []
    if carried == "state and consumed examples":
        parents = parent_program.config.data.components
        streams = continued(parents, consumed(parents, position), program.config.data.components)
        program = _with_streams(program, streams)
    entry = {
        "branch_from": branch_from,
        "from": str(parent),
        "step": step,
        "carried": carried,
        "changes": {key: list(pair) for key, pair in changes.items()},
        "streams": streams,
    }
    return program, Branch(
        parent / "checkpoints",
        step,
        position if carried == "everything" else None,
        [*_history(parent), entry],
    )


def what_is_carried(changes: Mapping[str, Any]) -> Carried:
    """Returns what a branch carries, given the keys that change.

    Raises:
      UserError: a key cannot change.
    """
    carried: Carried = "everything"
    for key in changes:
        if key in _ROWS:
            carried = "state"
        elif key in _MIXTURE:
            carried = "state and consumed examples" if carried == "everything" else carried
        elif not (key in _SCHEDULE or key in MAY_CHANGE or key.split(".")[0] in _FREE_GROUPS):
            old, new = changes[key]
            raise UserError(
                f"--branch_from: config.{key} is {old!r} in the parent and {new!r} here, but a "
                "branch can only change the schedule, the steps, the folders and their weights, "
                "the batch size, and the length and packing of rows"
            )
    return carried


def consumed(components: Sequence[FolderComponent], position: Mapping[str, str]) -> list[int]:
    """Returns how many examples of the order of each component a run has consumed.

    Examples in rows that were not trained on yet do not count. If the data shards have consumed
    different numbers, the smallest counts, so that no example is left out.

    Args:
      components: the components of the run.
      position: the state of the iterator of each data shard, as JSON.
    """
    orders = [
        grain.MapDataset.range(_LONG).map(lambda number, index=index: (index, number))
        for index in range(len(components))
    ]
    mixture = grain.MapDataset.mix(orders, [component.weight for component in components])
    counts = []
    for state in position.values():
        missing, number = dict.fromkeys(range(len(components)), 0), _next_index(json.loads(state))
        ends: dict[int, int] = {}
        while number > 0 and len(ends) < len(components):
            number -= 1
            index, last = mixture[number]
            ends.setdefault(index, last + 1)
        counts.append([(missing | ends)[index] for index in missing])
    return [
        component.start + len(counts) * min(column)
        for component, column in zip(components, zip(*counts, strict=True), strict=True)
    ]


def continued(
    parents: Sequence[FolderComponent], counts: Sequence[int], children: Sequence[FolderComponent]
) -> list[dict[str, Any]]:
    """Returns where the order of each component of a branch goes on.

    Args:
      parents, counts: the components of the parent, and the examples of each that were consumed.
      children: the components of the branch.

    Returns:
      For each child its `stream` and `start` (see `FolderComponent`), with `folder` and `split`. A
      component that the parent does not have has a new order.
    """
    orders: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for place, (parent, count) in enumerate(zip(parents, counts, strict=True)):
        stream = place if parent.stream is None else parent.stream
        orders.setdefault((parent.folder, parent.split), []).append((stream, count))
    used = [stream for pairs in orders.values() for stream, _ in pairs]
    unused = max(used, default=-1) + 1
    streams = []
    for child in children:
        if pairs := orders.get((child.folder, child.split)):
            stream, start = pairs.pop(0)
        else:
            stream, start, unused = unused, 0, unused + 1
        streams.append(
            {"folder": child.folder, "split": child.split, "stream": stream, "start": start}
        )
    return streams


def _with_streams(program: Program, streams: Sequence[Mapping[str, Any]]) -> Program:
    """Returns the program with these orders of its components, as a mixture."""
    values = configs.to_dict(program.config)
    components = program.config.data.components
    if [(part.folder, part.split) for part in components] != [
        (stream["folder"], stream["split"]) for stream in streams
    ]:
        raise UserError(
            "config.data names other folders than history.json in the workdir; restore them, or "
            "begin another branch with --branch_from and another --workdir"
        )
    mixture = [
        {**configs.to_dict(part), "stream": stream["stream"], "start": stream["start"]}
        for part, stream in zip(components, streams, strict=True)
    ]
    data = {**values["data"], "folder": "", "mixture": mixture}
    return make_program(program.kind, {**values, "data": data})


def _history(workdir: pathlib.Path) -> list[dict[str, Any]]:
    path = workdir / "history.json"
    return json.loads(path.read_text()) if path.exists() else []


def _next_index(state: Any) -> int:
    """Returns the number of examples that an iterator has read, from its state."""
    if isinstance(state, dict):
        if "next_index" in state:
            return int(state["next_index"])
        for value in state.values():
            if (number := _next_index(value)) >= 0:
                return number
    return -1
