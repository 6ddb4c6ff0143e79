"""The state of a training run, and the interface between a kind of model and the loop."""

import dataclasses
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import grain
import jax
import numpy as np
from jaxtyping import Array, Int

from leon_jax.config import UserError
from leon_jax.train.evaluation import Evaluation


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """The training state as one pytree; an exact resume needs it and the data position.

    Attributes:
      step: int32[], number of updates so far.
      model: the module, a pytree of its parameters; its type depends on the program.
      opt_state: the optimizer's state.
      key: the run's random key, which is constant; a step uses `jax.random.fold_in(key, step)`.
    """

    step: Int[Array, ""]
    model: Any
    opt_state: Any
    key: jax.Array

    def step_key(self) -> jax.Array:
        """Returns the random key of the next step."""
        return jax.random.fold_in(self.key, self.step)


def rows_of_shard(batch_size: int, shards: int, name: str = "data shards") -> int:
    """Returns the number of rows in each of `shards` equal parts of a batch.

    Args:
      batch_size: rows of the batch.
      shards: number of parts.
      name: name of the parts in the error message.

    Raises:
      UserError: `batch_size` is not a multiple of `shards`.
    """
    rows, remainder = divmod(batch_size, shards)
    if remainder:
        raise UserError(
            f"config.batch_size is {batch_size}; it must be a multiple of the {shards} {name}"
        )
    return rows


def check_multiples(sizes: Iterable[tuple[str, int, int, str]]) -> None:
    """Checks that sizes split evenly.

    Args:
      sizes: (key of the configuration, its size, number of parts, name of the parts).

    Raises:
      UserError: a size is not a multiple of the number of its parts; the message names both.
    """
    for name, size, parts, axes in sizes:
        if size % parts:
            raise UserError(f"{name} is {size}; it must be a multiple of {axes}, {parts}")


class Program(Protocol):
    """The interface of the training loop to one kind of model (tokenizer, encoder, decoder).

    The constructor takes the kind's configuration and nothing else.

    Attributes:
      kind: the name of the kind in configs and model files.
      config: the configuration, a frozen dataclass.
      flops_per_token: floating-point operations of an update per token; 0 if MFU is not reported.
    """

    kind: str
    config: Any
    flops_per_token: float

    def check_mesh(self, mesh: Sequence[int]) -> None:
        """Checks that a mesh splits the batch and the model evenly.

        Args:
          mesh: sizes of the axes (data, fsdp, context, tensor).

        Raises:
          UserError: a size is not a multiple of the number of its parts; the message names both.
        """
        ...

    def init(self, key: jax.Array) -> TrainState:
        """Returns the initial state; a pure function that the loop jits.

        Raises:
          UserError: the current mesh cannot split the batch or the model evenly.
        """
        ...

    def step(
        self, state: TrainState, batch: dict[str, Array]
    ) -> tuple[TrainState, dict[str, Array]]:
        """Returns the updated state and scalar metrics; pure, jitted with `state` donated."""
        ...

    def batches(self, shard: int = 0, shards: int = 1) -> grain.IterDataset:
        """Returns endless host batches `{name: array[rows, ...]}` with a checkpointable iterator.

        Args:
          shard: index of the part of every batch to return.
          shards: number of equal parts of every batch.
        """
        ...

    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes and dtypes of the arrays of a global batch; reads no file."""
        ...

    def evaluation(self) -> Evaluation | None:
        """Prepares the evaluation on held-out documents; None: no folder has some.

        Raises:
          UserError: `config.data.eval_split` does not fit the folders, or a document cannot be
            read.
        """
        ...

    def evaluate(self, model: Any, batch: dict[str, Array]) -> dict[str, Array]:
        """Returns the outputs of each row of an evaluation's batch; pure, and reads no file.

        See `leon_jax.train.evaluation.Evaluation.outputs`. A batch has the arrays of a training
        batch, or some of them.
        """
        ...

    def samples(self, state: TrainState) -> dict[str, np.ndarray]:
        """Returns sample images of the current model, uint8[h, w, 3] by name; may be empty."""
        ...

    def export(self, state: TrainState, directory: pathlib.Path) -> None:
        """Writes the model as safetensors, with the files it depends on, into `directory`."""
        ...
