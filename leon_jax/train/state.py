"""The state of a training run, and the interface between a kind of model and the loop."""

import dataclasses
import pathlib
from typing import Any, Protocol

import grain
import jax
import numpy as np
from jaxtyping import Array, Int

from leon_jax.config import UserError


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

    def init(self, key: jax.Array) -> TrainState:
        """Returns the initial state; a pure function that the loop jits."""
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

    def samples(self, state: TrainState) -> dict[str, np.ndarray]:
        """Returns sample images of the current model, uint8[h, w, 3] by name; may be empty."""
        ...

    def export(self, state: TrainState, directory: pathlib.Path) -> None:
        """Writes the model as safetensors, with the files it depends on, into `directory`."""
        ...
