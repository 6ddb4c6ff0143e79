"""The key-value cache of the decode loop.

A layer scan only reads it; the new keys and values of all layers are written once a step, after
the scan. Prompts are padded on the right to a common number of slots, and the tokens decoded at one
step sit in the same slot in every row, so the write is one slice update whatever the lengths are.
"""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from leon_jax import sharding

SLOTS = ("layers", "batch", None, "heads", "head_dim")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of prompt and answer.

    Attributes:
      keys, values: [layers, batch, slots, heads, head_dim]; slots = padded prompt + answer.
      lengths: int32[batch], true prompt lengths.
      step: int32[], how many answer tokens have been written.
      prompt_slots: how many slots the padded prompts take.
    """

    keys: Float[Array, "layers batch slots heads head_dim"]
    values: Float[Array, "layers batch slots heads head_dim"]
    lengths: Int[Array, "batch"]
    step: Int[Array, ""]
    prompt_slots: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def from_prefill(
        cls,
        keys: Float[Array, "layers batch length heads head_dim"],
        values: Float[Array, "layers batch length heads head_dim"],
        lengths: Int[Array, "batch"],
        answer_slots: int,
    ) -> Self:
        """A cache holding the prompts, with room for `answer_slots` more tokens."""

        def room(array: Array) -> Array:
            array = jax.reshard(array, sharding.spec(*SLOTS))
            return jnp.pad(array, ((0, 0), (0, 0), (0, answer_slots), (0, 0), (0, 0)))

        return cls(room(keys), room(values), lengths, jnp.int32(0), keys.shape[2])

    def valid(self) -> Bool[Array, "batch slots"]:
        """Which slots hold a token: the true prompt, and the answer so far."""
        slot = jnp.arange(self.keys.shape[2])
        answer = (slot >= self.prompt_slots) & (slot < self.prompt_slots + self.step)
        return (slot[None, :] < self.lengths[:, None]) | answer[None, :]

    def append(
        self,
        keys: Float[Array, "layers batch heads head_dim"],
        values: Float[Array, "layers batch heads head_dim"],
    ) -> Self:
        """The cache with one more token a row."""

        def write(slots: Array, new: Array) -> Array:
            new = jax.reshard(new[:, :, None].astype(slots.dtype), sharding.spec(*SLOTS))
            index = (0, 0, self.prompt_slots + self.step, 0, 0)
            return jax.lax.dynamic_update_slice(slots, new, index)

        return dataclasses.replace(
            self,
            keys=write(self.keys, keys),
            values=write(self.values, values),
            step=self.step + 1,
        )
