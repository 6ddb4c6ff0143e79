"""The KV cache of the decode loop. Each stream has its own.

The scan over layers only reads the cache. The new keys and values of all layers are written once a
step, after the scan. All samples of a group share one prompt. Outputs are ring buffers: the token
of step s is in slot s modulo the ring size in every row, even if the rows began at different steps.
So the write is one slice update. The number of tokens of a row determines its valid slots. In this
example, the slots of the output show the step that wrote them:

    prompt    | </s> a  cat <break> . . |        valid: the first `lengths` slots
    output    | 6 7 8 3 4 5 |  at step 9         a row of 4 tokens: the slots of steps 5, 6, 7, 8
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from leon_jax import sharding
from leon_jax.models.decoder_config import DecoderConfig
from leon_jax.ops import int8
from leon_jax.ops.attention import CachedArray, LayerCache

# Logical axes of keys and values. The scales of int8 have the same axes without the last one.
PROMPT = ("layers", "batch", "heads", None, "head_dim")
OUTPUT = ("layers", "batch", None, "heads", None, "head_dim")

# The dtype of cached keys and values: the decoder's compute dtype, or int8 with scales.
CacheDtype = Literal["compute", "int8"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """The cached keys and values of one stream.

    Keys and values are lists with one entry for each stack of layers (`Decoder.stacks`).

    Attributes:
      prompt_keys, prompt_values: [layers, group, kv_heads, prompt_slots, head_dim] each.
      output_keys, output_values: [layers, group, sample, kv_heads, ring_size, head_dim] each.
      lengths: int32[group], the number of tokens of each prompt.
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
        """Returns a cache of zeros.

        Args:
          config: the decoder's configuration.
          groups: number of groups.
          samples: number of samples in a group.
          prompt_slots: maximum number of tokens of a prompt.
          ring_size: maximum number of tokens of an output.
          dtype: dtype of keys and values.
          stacks: number of stacks of layers, which all have the same number of layers.
        """

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

        prompt = (groups, config.key_heads, prompt_slots, config.head_dim)
        output = (groups, samples, config.key_heads, ring_size, config.head_dim)
        return cls(
            zeros(prompt, PROMPT), zeros(prompt, PROMPT),
            zeros(output, OUTPUT), zeros(output, OUTPUT),
            jnp.zeros(groups, jnp.int32, out_sharding=sharding.spec("batch")),
        )  # fmt: skip

    @property
    def ring_size(self) -> int:
        """Maximum number of tokens of an output."""
        return self.output_keys[0].values.shape[-2]

    def insert(
        self,
        source: Int[Array, "group"],
        keys: Sequence[Float[Array, "layers new kv_heads length head_dim"]],
        values: Sequence[Float[Array, "layers new kv_heads length head_dim"]],
        lengths: Int[Array, "new"],
    ) -> Self:
        """Returns the cache with new prompts in some of its groups.

        Args:
          source: index of the new prompt of each group; -1: the group does not change.
          keys, values: keys and values of the new prompts by stack; `length` is at most
            `prompt_slots`.
          lengths: number of tokens of each new prompt, without padding.
        """

        def take(new: Array, layout: jax.P, axis: int) -> tuple[Array, Array]:
            """Returns the new array by group, and the mask of new groups, with matching shardings.

            Groups without a new prompt get the first one. The mask broadcasts against the array.
            """

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
        """Returns the cached prompts for `Decoder.decode_step`."""
        slot = jnp.arange(self.prompt_keys[0].values.shape[-2])
        return LayerCache(self.prompt_keys, self.prompt_values, slot < self.lengths[:, None])

    def output(self, valid: Bool[Array, "group sample ring_size"]) -> LayerCache:
        """Returns the cached outputs for `Decoder.decode_step`.

        Args:
          valid: True for the slots of each row that hold its tokens; see `valid_slots`.
        """
        return LayerCache(self.output_keys, self.output_values, valid)

    def append(
        self,
        step: Int[Array, ""],
        keys: Sequence[Float[Array, "layers group sample kv_heads head_dim"]],
        values: Sequence[Float[Array, "layers group sample kv_heads head_dim"]],
    ) -> Self:
        """Returns the cache with the tokens of one more step.

        Args:
          step: number of the step. Its tokens are written to slot `step` modulo `ring_size`.
          keys, values: keys and values of the tokens, by stack.
        """

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
    """Quantizes new keys or values if the old ones are int8. Otherwise they stay unchanged."""
    if old[0].scale is None:
        return [CachedArray(each) for each in new]
    quantized = [int8.quantize(each, (-1,)) for each in new]
    return [CachedArray(values, scale[..., 0]) for values, scale in quantized]


def valid_slots(
    ring_size: int, step: Int[Array, ""], counts: Int[Array, "group sample"]
) -> Bool[Array, "group sample ring_size"]:
    """Returns the mask of the slots that hold the tokens of each row at the start of a step.

    Args:
      ring_size: number of slots of the ring buffer.
      step: number of the step.
      counts: number of tokens of each row, at most `ring_size`.
    """
    age = (step - 1 - jnp.arange(ring_size)) % ring_size
    valid = age < counts[..., None]
    return jax.reshard(valid, sharding.spec("batch", None, None))
