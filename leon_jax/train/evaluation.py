"""Evaluates the model of a training run on held-out documents, always the same ones.

A program prepares an `Evaluation` once: the documents as rows of host arrays, and a function of the
model and a batch of rows. An `Evaluator` runs it on the mesh. It draws no random numbers and reads
no training data, so a run with evaluation has the same parameters as one without, bit for bit.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int64, Shaped

from leon_jax import sharding
from leon_jax.config import UserError
from leon_jax.data.config import DataConfig, ImageDataConfig
from leon_jax.data.document_folder import DocumentFolder


@dataclasses.dataclass(frozen=True)
class HeldOut[Folder: DocumentFolder]:
    """The held-out documents of one folder.

    Attributes:
      folder: the folder.
      split: the held-out split.
      documents: the numbers of the chosen documents in the split, in order.
    """

    folder: Folder
    split: str
    documents: Int64[np.ndarray, "n"]

    @property
    def name(self) -> str:
        """The folder and the split, for messages."""
        return f"{self.folder.address} ({self.split})"


def choose_held_out[Folder: DocumentFolder](
    data: DataConfig | ImageDataConfig, open_folder: Callable[[str], Folder]
) -> list[HeldOut[Folder]]:
    """Chooses the documents that a run is evaluated on: `data.eval_documents` of its folders.

    They lie at equal distances in all held-out splits together.

    Args:
      data: the data settings.
      open_folder: opens a folder by its path.

    Returns:
      The documents of each folder that has some. An empty list if `data.eval_split` is "" and no
      folder has a split that the run does not train on.

    Raises:
      UserError: `data.eval_split` is a split that the run trains on, or no folder has documents in
        it.
    """
    folders = {part.folder: open_folder(part.folder) for part in data.components}
    trained = {(part.folder, part.split) for part in data.components}
    splits = []
    for name, folder in folders.items():
        names = [split for split, count in folder.splits.items() if count]
        if data.eval_split:
            names = [split for split in names if split == data.eval_split]
            if (name, data.eval_split) in trained:
                raise UserError(
                    f"config.data.eval_split is {data.eval_split!r}, which the run trains on; name "
                    "another split"
                )
        names = [split for split in names if (name, split) not in trained]
        splits += [(folder, split) for split in names[:1]]
    if data.eval_split and not splits:
        known = dict.fromkeys(split for folder in folders.values() for split in folder.splits)
        raise UserError(
            f"config.data.eval_split is {data.eval_split!r}, but no folder has documents in this "
            f"split; the splits are {', '.join(known)}"
        )
    ends = np.cumsum([0, *(folder.splits[split] for folder, split in splits)])
    count = min(data.eval_documents, int(ends[-1]))
    numbers = np.arange(count, dtype=np.int64) * int(ends[-1]) // max(count, 1)
    chosen = [
        HeldOut(folder, split, numbers[(numbers >= start) & (numbers < end)] - start)
        for (folder, split), start, end in zip(splits, ends[:-1], ends[1:], strict=True)
    ]
    return [part for part in chosen if len(part.documents)]


def names(held_out: Sequence[HeldOut]) -> str:
    """Returns the folders and splits of held-out documents, for messages."""
    return " and ".join(part.name for part in held_out)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How a model is evaluated.

    Attributes:
      documents: what is evaluated, for messages, for example "200 documents of data/x (test)".
      rows: the inputs, {name: array[n, ...]} with the same n, at least 1.
      batch_size: largest number of rows in a batch, a multiple of the mesh axes data x fsdp.
      outputs: maps (model, batch of rows) to {name: array[rows, ...]}; pure. The outputs of a row
        must not depend on the other rows.
      metrics: maps the outputs of all rows, {name: array[n, ...]}, to numbers by name.
      loss: the metric whose lowest value is that of the best model.
    """

    documents: str
    rows: Mapping[str, Shaped[np.ndarray, "n *item"]]
    batch_size: int
    outputs: Callable[[Any, dict[str, Array]], dict[str, Array]]
    metrics: Callable[[Mapping[str, np.ndarray]], Mapping[str, float]]
    loss: str


def rows_of_batch(largest: int, count: int) -> int:
    """Returns the rows of a batch of an evaluation on the current mesh.

    Args:
      largest: `Evaluation.batch_size`.
      count: number of rows. A batch holds no more than these, rounded up to what the mesh splits.
    """
    axes = sharding.batch_sharding().mesh.shape
    parts = axes["data"] * axes["fsdp"]
    return min(largest, -(-count // parts) * parts)


def with_gathered_outputs(
    outputs: Callable[[Any, dict[str, Array]], dict[str, Array]],
) -> Callable[[Any, dict[str, Array]], dict[str, Array]]:
    """Returns the function that an evaluation compiles: every device gets all outputs."""

    def gathered(model: Any, batch: dict[str, Array]) -> dict[str, Array]:
        return jax.tree.map(lambda array: jax.reshard(array, jax.P()), outputs(model, batch))

    return gathered


class Evaluator:
    """Runs an evaluation on the current mesh; all processes must call it.

    Args:
      evaluation: the evaluation.
    """

    def __init__(self, evaluation: Evaluation) -> None:
        self._evaluation, self._layout = evaluation, sharding.batch_sharding()
        self._count = len(next(iter(evaluation.rows.values())))
        self._batch_size = rows_of_batch(evaluation.batch_size, self._count)

    def compile(self, model: Any) -> None:
        """Compiles the evaluation for a model with the shapes and shardings of `model`."""
        outputs = jax.jit(with_gathered_outputs(self._evaluation.outputs))
        self._outputs = outputs.lower(model, self._batch(0)).compile()

    def run(self, model: Any) -> dict[str, float]:
        """Returns the metrics of a model, numbers by name; the names begin with "heldout/"."""
        batches = []
        for start in range(0, self._count, self._batch_size):
            batches.append(jax.device_get(self._outputs(model, self._batch(start))))
        outputs = {
            name: np.concatenate([batch[name] for batch in batches])[: self._count]
            for name in batches[0]
        }
        metrics = self._evaluation.metrics(outputs)
        return {f"heldout/{name}": float(value) for name, value in metrics.items()}

    def loss(self, metrics: Mapping[str, float]) -> float:
        """Returns the metric that tells the best model; lower is better."""
        return metrics[f"heldout/{self._evaluation.loss}"]

    def _batch(self, start: int) -> dict[str, jax.Array]:
        """Returns the rows from `start`; the last row is repeated to fill the batch."""
        numbers = np.minimum(np.arange(start, start + self._batch_size), self._count - 1)

        def place(rows: Shaped[np.ndarray, "n *item"]) -> jax.Array:
            batch = rows[numbers]
            return jax.make_array_from_callback(batch.shape, self._layout, batch.__getitem__)

        return {name: place(rows) for name, rows in self._evaluation.rows.items()}
