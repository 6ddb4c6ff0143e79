"""The key-value cache of the decode loop, one for each stream.

A layer scan only reads it; the new keys and values of all layers are written once a step, after
the scan. A prompt is kept once for all samples of its group. Answers are rings: the token of step s
sits in slot s modulo the ring in every row, whenever the row began, so the write is one slice
update; which of the slots are a row's own follows from how many tokens it has.

    prompt    | </s> a  cat <break> . . |        valid: the first `lengths` slots
    answer    | 7 8 3 4 5 6 |  at step 9         a row of 4 tokens: the slots of steps 5, 6, 7, 8
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
from leon_jax.ops.attention import Kept, Past

# Axes of keys and values; scales of int8 lack the last.
PROMPT = ("layers", "batch", "heads", None, "head_dim")
ANSWER = ("layers", "batch", None, "heads", None, "head_dim")

# What keys and values are kept in: the model's compute dtype, or 8 bits.
CacheType = Literal["compute", "int8"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of one stream, by stacks of the decoder (`Decoder.stacks`).

    Attributes:
      prompt_keys, prompt_values: [layers, group, heads, slots, head_dim] each.
      answer_keys, answer_values: [layers, group, sample, heads, ring, head_dim] each.
      lengths: int32[group], of the prompts.
    """

    prompt_keys: list[Kept]
    prompt_values: list[Kept]
    answer_keys: list[Kept]
    answer_values: list[Kept]
    lengths: Int[Array, "group"]

    @classmethod
    def empty(
        cls,
        config: DecoderConfig,
        groups: int,
        samples: int,
        slots: int,
        ring: int,
        kept: CacheType = "compute",
        pieces: int = 1,
    ) -> Self:
        """Room for prompts of up to `slots` tokens and answers of up to `ring`."""

        def zeros(shape: tuple[int, ...], names: tuple[str | None, ...]) -> list[Kept]:
            shape = (config.layers // pieces, *shape)
            return [one(shape, names) for _ in range(pieces)]

        def one(shape: tuple[int, ...], names: tuple[str | None, ...]) -> Kept:
            dtype = jnp.int8 if kept == "int8" else config.dtype
            values = jnp.zeros(shape, dtype, out_sharding=sharding.spec(*names))
            if kept != "int8":
                return Kept(values)
            layout = sharding.spec(*names[:-1])
            return Kept(values, jnp.zeros(shape[:-1], jnp.float32, out_sharding=layout))

        prompt = (groups, config.heads, slots, config.head_dim)
        answer = (groups, samples, config.heads, ring, config.head_dim)
        return cls(
            zeros(prompt, PROMPT), zeros(prompt, PROMPT),
            zeros(answer, ANSWER), zeros(answer, ANSWER),
            jnp.zeros(groups, jnp.int32, out_sharding=sharding.spec("batch")),
        )  # fmt: skip

    @property
    def ring(self) -> int:
        """How many tokens an answer may have."""
        return self.answer_keys[0].values.shape[-2]

    def insert(
        self,
        source: Int[Array, "group"],
        keys: Sequence[Float[Array, "layers new heads length head_dim"]],
        values: Sequence[Float[Array, "layers new heads length head_dim"]],
        lengths: Int[Array, "new"],
    ) -> Self:
        """The cache with new prompts in some of its groups.

        Args:
          source: which of the new prompts a group takes; -1: it keeps its own.
          keys, values, lengths: of the new prompts; `length` is at most `slots`.
        """

        def taken(new: Array, layout: jax.P, axis: int) -> tuple[Array, Array]:
            """The rows of the groups, and which of the groups are new, split alike."""

            def alone(entry: int) -> jax.P:
                return jax.P(*(s if (i == axis) == entry else None for i, s in enumerate(layout)))

            whole = jax.reshard(new, alone(0))
            index = (*(slice(None),) * axis, jnp.maximum(source, 0))
            fresh = (source >= 0).reshape([-1 if i == axis else 1 for i in range(new.ndim)])
            return whole.at[index].get(out_sharding=layout), jax.reshard(fresh, alone(1))

        def put(old: Array, new: Array) -> Array:
            rows, fresh = taken(new, jax.typeof(old).sharding.spec, 1)
            room = [(0, 0)] * old.ndim
            room[3] = (0, old.shape[3] - new.shape[3])
            return jnp.where(fresh, jnp.pad(rows, room).astype(old.dtype), old)

        rows, fresh = taken(lengths, jax.typeof(self.lengths).sharding.spec, 0)
        return dataclasses.replace(
            self,
            prompt_keys=jax.tree.map(put, self.prompt_keys, _as(self.prompt_keys, keys)),
            prompt_values=jax.tree.map(put, self.prompt_values, _as(self.prompt_values, values)),
            lengths=jnp.where(fresh, rows, self.lengths),
        )

    def prompt(self) -> Past:
        """The prompts, as `Decoder.decode_step` takes them."""
        slot = jnp.arange(self.prompt_keys[0].values.shape[-2])
        return Past(self.prompt_keys, self.prompt_values, slot < self.lengths[:, None])

    def answer(self, seen: Bool[Array, "group sample ring"]) -> Past:
        """The answers, likewise; `seen` is `own`'s."""
        return Past(self.answer_keys, self.answer_values, seen)

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
            start[4] = step % self.ring
            return jax.lax.dynamic_update_slice(old, new, start)

        return dataclasses.replace(
            self,
            answer_keys=jax.tree.map(write, self.answer_keys, _as(self.answer_keys, keys)),
            answer_values=jax.tree.map(write, self.answer_values, _as(self.answer_values, values)),
        )


def _as(old: Sequence[Kept], new: Sequence[Float[Array, "..."]]) -> list[Kept]:
    """New keys or values, kept as old ones are."""
    if old[0].scale is None:
        return [Kept(each) for each in new]
    small = [int8.quantize(each, (-1,)) for each in new]
    return [Kept(values, scale[..., 0]) for values, scale in small]


def own(
    ring: int, step: Int[Array, ""], counts: Int[Array, "group sample"]
) -> Bool[Array, "group sample ring"]:
    """Which slots of a ring hold the last `counts` tokens, at the beginning of a step."""
    age = (step - 1 - jnp.arange(ring)) % ring
    seen = age < counts[..., None]
    return jax.reshard(seen, sharding.spec("batch", None, None))
