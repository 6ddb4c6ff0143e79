"""The key-value cache of the decode loop, one for each stream.

The layer scan only reads it. The new keys and values of all layers are written once a step, after
the scan. All samples of a group share one prompt. Outputs are rings: the token of step s is in slot
s modulo the ring's size in every row, whenever the row began, so the write is one slice update. The
number of tokens of a row tells which slots are valid.

    prompt    | </s> a  cat <break> . . |        valid: the first `lengths` slots
    output    | 7 8 3 4 5 6 |  at step 9         a row of 4 tokens: the slots of steps 5, 6, 7, 8
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from leon_jax import sharding
from leon_jax.models.decoder import DecoderConfig
from leon_jax.ops import int8
from leon_jax.ops.attention import CachedArray, LayerCache

# Axes of keys and values; scales of int8 lack the last.
PROMPT = ("layers", "batch", "heads", None, "head_dim")
OUTPUT = ("layers", "batch", None, "heads", None, "head_dim")

# The dtype of keys and values: the model's compute dtype, or 8 bits.
CacheDtype = Literal["compute", "int8"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of one stream, a list with one entry for each of `Decoder.stacks`.

    Attributes:
      prompt_keys, prompt_values: [layers, group, heads, prompt_slots, head_dim] each.
      output_keys, output_values: [layers, group, sample, heads, ring_size, head_dim] each.
      lengths: int32[group], of the prompts.
    """

    prompt_keys: list[CachedArray]
    prompt_values: list[CachedArray]
    output_keys: list[CachedArray]
    output_values: list[CachedArray]
    lengths: Int[Array, "group"]

    @classmethod
    def empty(
        cls,
        config: DecoderConfig,
        groups: int,
        samples: int,
        prompt_slots: int,
        ring_size: int,
        dtype: CacheDtype = "compute",
        stacks: int = 1,
    ) -> Self:
        """Zeros for prompts of up to `prompt_slots` tokens and outputs of up to `ring_size`."""

        def zeros(shape: tuple[int, ...], names: tuple[str | None, ...]) -> list[CachedArray]:
            shape = (config.layers // stacks, *shape)
            return [one_stack(shape, names) for _ in range(stacks)]

        def one_stack(shape: tuple[int, ...], names: tuple[str | None, ...]) -> CachedArray:
            array_dtype = jnp.int8 if dtype == "int8" else config.dtype
            values = jnp.zeros(shape, array_dtype, out_sharding=sharding.spec(*names))
            if dtype != "int8":
                return CachedArray(values)
            layout = sharding.spec(*names[:-1])
            return CachedArray(values, jnp.zeros(shape[:-1], jnp.float32, out_sharding=layout))

        prompt = (groups, config.heads, prompt_slots, config.head_dim)
        output = (groups, samples, config.heads, ring_size, config.head_dim)
        return cls(
            zeros(prompt, PROMPT), zeros(prompt, PROMPT),
            zeros(output, OUTPUT), zeros(output, OUTPUT),
            jnp.zeros(groups, jnp.int32, out_sharding=sharding.spec("batch")),
        )  # fmt: skip

    @property
    def ring_size(self) -> int:
        """The most tokens of an output."""
        return self.output_keys[0].values.shape[-2]

    def insert(
        self,
        source: Int[Array, "group"],
        keys: Sequence[Float[Array, "layers new heads length head_dim"]],
        values: Sequence[Float[Array, "layers new heads length head_dim"]],
        lengths: Int[Array, "new"],
    ) -> Self:
        """The cache with new prompts in some of its groups.

        Args:
          source: the index of the new prompt that a group takes; -1: the group stays as it is.
          keys, values, lengths: of the new prompts; `length` is at most `prompt_slots`.
        """

        def take(new: Array, layout: jax.P, axis: int) -> tuple[Array, Array]:
            """The new prompts of the groups, and which groups are new, laid out alike."""

            def layout_of(is_axis: bool) -> jax.P:
                return jax.P(*(s if (i == axis) == is_axis else None for i, s in enumerate(layout)))

            gathered = jax.reshard(new, layout_of(False))
            index = (*(slice(None),) * axis, jnp.maximum(source, 0))
            is_new = (source >= 0).reshape([-1 if i == axis else 1 for i in range(new.ndim)])
            rows = gathered.at[index].get(out_sharding=layout)
            return rows, jax.reshard(is_new, layout_of(True))

        def write(old: Array, new: Array) -> Array:
            rows, is_new = take(new, jax.typeof(old).sharding.spec, 1)
            padding = [(0, 0)] * old.ndim
            padding[3] = (0, old.shape[3] - new.shape[3])
            return jnp.where(is_new, jnp.pad(rows, padding).astype(old.dtype), old)

        rows, is_new = take(lengths, jax.typeof(self.lengths).sharding.spec, 0)
        return dataclasses.replace(
            self,
            prompt_keys=jax.tree.map(write, self.prompt_keys, _convert(self.prompt_keys, keys)),
            prompt_values=jax.tree.map(
                write, self.prompt_values, _convert(self.prompt_values, values)
            ),
            lengths=jnp.where(is_new, rows, self.lengths),
        )

    def prompt(self) -> LayerCache:
        """The prompts, as `Decoder.decode_step` takes them."""
        slot = jnp.arange(self.prompt_keys[0].values.shape[-2])
        return LayerCache(self.prompt_keys, self.prompt_values, slot < self.lengths[:, None])

    def output(self, valid: Bool[Array, "group sample ring_size"]) -> LayerCache:
        """The outputs, as `Decoder.decode_step` takes them.

        Args:
          valid: from `valid_slots`.
        """
        return LayerCache(self.output_keys, self.output_values, valid)

    def append(
        self,
        step: Int[Array, ""],
        keys: Sequence[Float[Array, "layers group sample heads head_dim"]],
        values: Sequence[Float[Array, "layers group sample heads head_dim"]],
    ) -> Self:
        """The cache with the tokens of one more step."""

        def write(old: Array, new: Array) -> Array:
            layout = jax.typeof(old).sharding.spec
            new = jax.reshard(jnp.expand_dims(new, 4).astype(old.dtype), layout)
            start: list[Any] = [0] * old.ndim
            start[4] = step % self.ring_size
            return jax.lax.dynamic_update_slice(old, new, start)

        return dataclasses.replace(
            self,
            output_keys=jax.tree.map(write, self.output_keys, _convert(self.output_keys, keys)),
            output_values=jax.tree.map(
                write, self.output_values, _convert(self.output_values, values)
            ),
        )


def _convert(old: Sequence[CachedArray], new: Sequence[Float[Array, "..."]]) -> list[CachedArray]:
    """New keys or values in the dtype of the old ones."""
    if old[0].scale is None:
        return [CachedArray(each) for each in new]
    quantized = [int8.quantize(each, (-1,)) for each in new]
    return [CachedArray(values, scale[..., 0]) for values, scale in quantized]


def valid_slots(
    ring_size: int, step: Int[Array, ""], counts: Int[Array, "group sample"]
) -> Bool[Array, "group sample ring_size"]:
    """Which slots of a ring hold the last `counts` tokens, at the beginning of a step."""
    age = (step - 1 - jnp.arange(ring_size)) % ring_size
    valid = age < counts[..., None]
    return jax.reshard(valid, sharding.spec("batch", None, None))
