"""Samplers: frozen dataclasses that choose one id for each row from its logits.

Each sampler is a pytree, so the decode loop is not compiled again for a new temperature or top-p.
Every row has its own random key, so its ids do not depend on the other rows of the batch.
"""

import dataclasses
import math
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from leon_jax.config import UserError

# The smallest normal float32. `make_sampler` treats a lower temperature as 0.
_SMALLEST_TEMPERATURE = float(np.finfo(np.float32).tiny)


class Sampler(Protocol):
    """A function from logits and one random key for each row to one id for each row."""

    def __call__(
        self, logits: Float[Array, "batch vocab"], keys: Key[Array, "batch"]
    ) -> Int[Array, "batch"]: ...

    def check(self) -> None: ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Greedy:
    """A sampler of the most likely id, or the lowest of several equally likely ids."""

    def __call__(
        self, logits: Float[Array, "batch vocab"], keys: Key[Array, "batch"]
    ) -> Int[Array, "batch"]:
        """Returns the ids, int32[batch]. `keys` are not used."""
        del keys
        # Not argmax: on CPUs XLA reduces its pairs of value and index one element at a time.
        return _first(logits == logits.max(axis=-1, keepdims=True))

    def check(self) -> None:
        """Does nothing, because there are no parameters."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Categorical:
    """A sampler from softmax(logits / temperature) within the top k ids, then the top-p nucleus.

    Attributes:
      temperature: above 0 and finite; 1 does not change the distribution.
      top_k: number of most likely ids to keep, 1 or more. Ids as likely as the k-th are also kept.
        None: all ids.
      top_p: total probability of the ids to keep, above 0 and at most 1. The smallest set of most
        likely ids whose total probability is at least `top_p` is kept. It includes the id that
        crosses `top_p`. Ids as likely as that id are also kept. The probabilities are those after
        temperature and top-k. None: all ids.
    """

    temperature: float = 1.0
    top_p: float | None = None
    top_k: int | None = dataclasses.field(default=None, metadata={"static": True})

    def __call__(
        self, logits: Float[Array, "batch vocab"], keys: Key[Array, "batch"]
    ) -> Int[Array, "batch"]:
        """Samples one id for each row, int32[batch], with one random number for each."""
        logits = self.process_logits(logits)
        weights = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
        return inverse_transform(weights, jax.vmap(jax.random.uniform)(keys))

    def check(self) -> None:
        """Checks the parameters.

        Raises:
          UserError: `temperature` is not above 0 or not finite, `top_p` is not above 0 and at most
            1, or `top_k` is below 1.
        """
        if not 0 < self.temperature < float("inf"):
            raise UserError(f"temperature is {self.temperature}; it must be above 0 to sample")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}; it must be 1 or more, or None for all")

    def process_logits(self, logits: Float[Array, "batch vocab"]) -> Float[Array, "batch vocab"]:
        """Divides the logits by the temperature, and sets the logits of dropped ids to -inf.

        Before the division, the largest logit of each row is subtracted, so that no quotient
        overflows.
        """
        highest = logits.max(axis=-1, keepdims=True)
        logits = (logits - highest) / jnp.maximum(self.temperature, _SMALLEST_TEMPERATURE)
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            kth = jax.lax.top_k(logits, self.top_k)[0][:, -1:]
            logits = jnp.where(logits >= kth, logits, -jnp.inf)
        if self.top_p is not None:
            logits = nucleus(logits, self.top_p)
        return logits


def inverse_transform(
    weights: Float[Array, "batch vocab"], u: Float[Array, "batch"]
) -> Int[Array, "batch"]:
    """Returns the first id at which the cumulative sum of the weights exceeds u times their sum.

    For u uniform in [0, 1), id i is sampled with probability weights[i] / sum(weights). This needs
    one random number for each row. The Gumbel trick needs one for each id. The cumulative sum is
    computed over blocks of ids, and then over the ids of one block.

    Args:
      weights: weights of the ids, 0 or more, at least one of each row above 0. An id of weight 0 is
        never sampled.
      u: a number for each row, 0 or more and below 1.

    Returns:
      int32[batch].
    """
    vocab = weights.shape[-1]
    width = max(1, math.isqrt(vocab))
    blocks = jnp.pad(weights, ((0, 0), (0, -vocab % width)))
    blocks = blocks.reshape(len(weights), -1, width)
    sums = blocks.sum(axis=-1)
    block, rest = _find_crossing(sums, u * sums.sum(axis=-1))
    entry, _ = _find_crossing(jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0], rest)
    return block * width + entry


def _find_crossing(
    weights: Float[Array, "batch n"], target: Float[Array, "batch"]
) -> tuple[Int[Array, "batch"], Float[Array, "batch"]]:
    """Returns the first index at which the cumulative sum exceeds the target, and the remainder.

    The remainder is the target minus the sum of the weights before the index.
    """
    sums = jnp.cumsum(weights, axis=-1)
    # Because of rounding, the target may exceed the last sum, or a sum may rise at a weight of 0.
    positive = weights > 0
    last = weights.shape[-1] - 1 - _first(positive[:, ::-1])
    passed = (sums > target[:, None]) & positive
    index = jnp.where(passed.any(axis=-1), _first(passed), last)
    before = jnp.take_along_axis(sums - weights, index[:, None], axis=-1)[:, 0]
    return index, target - before


def _first(mask: Bool[Array, "batch n"]) -> Int[Array, "batch"]:
    """Returns the index of the first True of each row, int32[batch]; 0 if there is none."""
    size = mask.shape[-1]
    index = jnp.where(mask, jnp.arange(size, dtype=jnp.int32), size).min(axis=-1)
    return jnp.where(index == size, 0, index)


def nucleus(
    logits: Float[Array, "batch vocab"], top_p: float | Float[Array, ""]
) -> Float[Array, "batch vocab"]:
    """Sets logits outside the nucleus (Holtzman et al. 2020) to -inf.

    The nucleus includes the id that crosses `top_p`, so it has at least the most likely id. It also
    includes all ids as likely as that id.

    The nucleus is the set of ids whose probability is at least a border. The border is the largest
    probability for which the set has a total probability of at least `top_p`. The border is found
    bit by bit, because non-negative floats are in the order of their bits as integers. The 30 sums
    need a small part of the time of a sort.

    Args:
      logits: the logits; -inf for forbidden ids.
      top_p: total probability, above 0 and at most 1.
    """
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    bits = jax.lax.bitcast_convert_type(probabilities, jnp.int32)

    def raise_border(
        number: Int[Array, ""], border: Int[Array, "batch 1"]
    ) -> Int[Array, "batch 1"]:
        higher = border | (1 << (29 - number))
        inside = jnp.where(bits >= higher, probabilities, 0).sum(axis=-1, keepdims=True)
        return jnp.where(inside >= top_p, higher, border)

    # Probabilities are at most 1, and the highest bit of 1.0 is bit 29.
    border = jax.lax.fori_loop(0, 30, raise_border, jnp.zeros_like(bits[:, :1]))
    return jnp.where(bits >= border, logits, -jnp.inf)


def make_sampler(
    temperature: float = 1.0, top_p: float | None = None, top_k: int | None = None
) -> Greedy | Categorical:
    """Returns the sampler for these settings.

    Args:
      temperature: 0 or more, finite. 0, or a number below the smallest normal float32, is greedy.
      top_p: see `Categorical`; 1: all ids.
      top_k: see `Categorical`; 0: all ids.

    Raises:
      UserError: `temperature` is negative or not finite, `top_p` is not above 0 and at most 1, or
        `top_k` is negative.
    """
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature is {temperature}; it must be 0 (greedy) or more")
    if top_k is not None and top_k < 0:
        raise UserError(f"top_k is {top_k}; it must be 0 (all) or more")
    sampler = Categorical(
        temperature=float(temperature) or 1.0,
        top_p=None if top_p is None or top_p == 1 else float(top_p),
        top_k=top_k or None,
    )
    sampler.check()
    return sampler if temperature >= _SMALLEST_TEMPERATURE else Greedy()


def drop_bad_logits(logits: Float[Array, "*batch vocab"]) -> Float[Array, "*batch vocab"]:
    """Replaces NaN by -inf, which is never sampled, and +inf by the largest float."""
    logits = jnp.where(jnp.isnan(logits), -jnp.inf, logits)
    return jnp.minimum(logits, jnp.finfo(logits.dtype).max)
