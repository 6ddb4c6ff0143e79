"""What a training run carries from step to step, and what a kind of model tells the loop."""

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
    """Everything an exact resume needs, as one pytree.

    Attributes:
      step: int32[], updates done so far.
      model: the module (tree mode: a pytree of its parameters); of the program's own type.
      opt_state: the optimizer's state.
      key: the run's random key; a step uses `jax.random.fold_in(key, step)` and never changes it.
    """

    step: Int[Array, ""]
    model: Any
    opt_state: Any
    key: jax.Array

    def step_key(self) -> jax.Array:
        """The random key of the coming step."""
        return jax.random.fold_in(self.key, self.step)


def rows_of_shard(batch_size: int, shards: int, name: str = "data shards") -> int:
    """Rows of a batch that one of `shards` equal parts, called `name`, holds.

    Raises:
      UserError: the parts would not be equal.
    """
    rows, rest = divmod(batch_size, shards)
    if rest:
        raise UserError(
            f"config.batch_size is {batch_size}; it must be a multiple of the {shards} {name}"
        )
    return rows


class Program(Protocol):
    """One kind of model (tokenizer, encoder, decoder) as the training loop sees it.

    Its constructor takes the kind's frozen configuration and nothing else.

    Attributes:
      kind: the name used in configs and model files.
      config: the frozen dataclass the program was built from.
      flops_per_token: floating-point operations of an update for each of its `tokens`; 0 where
        utilisation means little.
    """

    kind: str
    config: Any
    flops_per_token: float

    def init(self, key: jax.Array) -> TrainState:
        """The state before the first step; pure, the loop jits it."""
        ...

    def step(
        self, state: TrainState, batch: dict[str, Array]
    ) -> tuple[TrainState, dict[str, Array]]:
        """One update and its scalar metrics; pure, the loop jits it and donates `state`."""
        ...

    def batches(self, shard: int = 0, shards: int = 1) -> grain.IterDataset:
        """Endless host batches `{name: array[rows, ...]}` whose iterator can be checkpointed.

        Args:
          shard, shards: which of how many equal parts of every batch.
        """
        ...

    def samples(self, state: TrainState) -> dict[str, np.ndarray]:
        """Images, uint8[h, w, 3] by name, that show how far training is; may be empty."""
        ...

    def export(self, state: TrainState, directory: pathlib.Path) -> None:
        """Writes the model as safetensors, with all that a user of it needs, into `directory`."""
        ...
