"""Strategies: how a row's ids are drawn, for batches in which every row may have its own.

A strategy is made of small pytrees whose numbers are leaves. Strategies of one make (the same types
and static fields) are stacked, so rows that differ in weight, temperature or top-p share one
computation; each further make in a batch is computed for all rows and taken where it is meant.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from leon_jax.config import UserError
from leon_jax.decode.guidance import Guidance, Plain
from leon_jax.decode.sampling import Categorical, Sampler


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Strategy:
    """How the ids of one row are drawn.

    Attributes:
      guidance: how the streams of a picture's ids are merged. Texts read stream 0 alone.
      image, text: how an id is drawn.
      start, stop: which ids of a picture, counted from 0, are guided; the others are drawn from
        stream 0. Once all rows of a batch are past theirs, the other streams are not computed; a
        late start saves nothing, for the other streams have to read what comes before.
    """

    guidance: Guidance = dataclasses.field(default_factory=Plain)
    image: Sampler = dataclasses.field(default_factory=Categorical)
    text: Sampler = dataclasses.field(default_factory=Categorical)
    start: int = 0
    stop: int = 2**30

    def check(self) -> None:
        """Checks the numbers; inside compiled programs they are not known.

        Raises:
          UserError: one means nothing.
        """
        if not isinstance(self.guidance, Guidance):
            raise UserError(f"guidance is {self.guidance!r}; give one as ClassifierFree(3.0)")
        for sampler in (self.image, self.text):
            if not callable(sampler):
                raise UserError(f"a sampler is {sampler!r}; give one as Categorical(top_p=0.9)")
        for part in (self.guidance, self.image, self.text):
            part.check()
        if not 0 <= self.start <= self.stop:
            raise UserError(
                f"guidance from id {self.start} to {self.stop}; it needs 0 <= start <= stop"
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Strategies:
    """The strategies of all rows.

    Attributes:
      makes: one strategy a make, every leaf [group, sample].
      which: int32[group, sample], the make of each row.
    """

    makes: tuple[Strategy, ...]
    which: Int[Array, "group sample"]

    @classmethod
    def of(
        cls, strategies: Sequence[Sequence[Strategy]], makes: Sequence[Strategy]
    ) -> "Strategies":
        """The strategies of [group][sample] as NumPy arrays.

        Args:
          makes: one strategy of every make that there is.
        """
        flat = [strategy for samples in strategies for strategy in samples]
        shape = len(strategies), len(strategies[0])
        stacked, which = [], np.zeros(shape, np.int32)
        for number, example in enumerate(makes):
            make: Any = jax.tree.structure(example)
            ours = [jax.tree.structure(strategy) == make for strategy in flat]
            which[np.reshape(ours, shape)] = number
            rows = [s if is_ours else example for s, is_ours in zip(flat, ours, strict=True)]
            stacked.append(jax.tree.map(lambda *leaves: _stacked(leaves, shape), *rows))
        return cls(tuple(stacked), which)  # type: ignore[arg-type]

    def guided(
        self, used: Int[Array, "group sample"], later: Bool[Array, "group sample"]
    ) -> Bool[Array, "group sample"]:
        """Whether a row still has a guided id of a picture to come.

        Args:
          used: how many ids of its picture are written.
          later: whether another picture comes after the span that the row is in.
        """
        ahead = [
            (later | (used < make.stop)) & (make.guidance.streams > 1) & (self.which == number)
            for number, make in enumerate(self.makes)
        ]
        return jnp.stack(ahead).any(axis=0)

    def draw_image(
        self,
        logits: Float[Array, "streams group sample ids"],
        used: Int[Array, "group sample"],
        keys: Key[Array, "group sample"],
    ) -> Int[Array, "group sample"]:
        """An id a row, counted from the first that `logits` scores."""

        def draw(make: Strategy, logits, used, key):
            alone = logits[:, None]
            merged = make.guidance(alone[: make.guidance.streams])
            guided = (used >= make.start) & (used < make.stop)
            return make.image(jnp.where(guided, merged, alone[0]), key[None])[0]

        return self._choose(draw, 1, logits, used, keys)

    def draw_text(
        self, logits: Float[Array, "group sample ids"], keys: Key[Array, "group sample"]
    ) -> Int[Array, "group sample"]:
        """An id a row, likewise."""

        def draw(make: Strategy, logits, key):
            return make.text(logits[None], key[None])[0]

        return self._choose(draw, 0, logits, keys)

    def _choose(self, draw, axis: int, logits: Array, *others: Array) -> Int[Array, "group sample"]:
        """`draw` for each make and row; what each row's own make says."""
        inner = jax.vmap(draw, (0, axis, *[0] * len(others)))
        rows = jax.vmap(inner, (0, axis, *[0] * len(others)))
        drawn = [rows(make, logits, *others) for make in self.makes]
        chosen = drawn[0]
        for number, ids in enumerate(drawn[1:], start=1):
            chosen = jnp.where(self.which == number, ids, chosen)
        return chosen.astype(jnp.int32)


def distinct(strategies: Sequence[Strategy]) -> tuple[Strategy, ...]:
    """One strategy of every make, in an order that does not depend on theirs."""
    found: dict[str, Strategy] = {}
    for strategy in strategies:
        found.setdefault(str(jax.tree.structure(strategy)), strategy)
    return tuple(found[make] for make in sorted(found))


def _stacked(leaves: Sequence[float], shape: tuple[int, int]) -> np.ndarray:
    return np.array(leaves, np.float32).reshape(shape)
