"""Samplers: frozen dataclasses that turn logits into one id a row.

Each is a pytree, so a new temperature or top-p does not compile the decode loop again. Every row
has a random key of its own, so its ids do not depend on its neighbours in the batch.
"""

import dataclasses
import math
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from leon_jax.config import UserError

# The smallest float32 that is not denormal. A temperature below it counts as 0.
_SMALLEST_TEMPERATURE = float(np.finfo(np.float32).tiny)


class Sampler(Protocol):
    """Anything that maps logits and one key a row to one id a row."""

    def __call__(
        self, logits: Float[Array, "batch vocab"], keys: Key[Array, "batch"]
    ) -> Int[Array, "batch"]: ...

    def check(self) -> None: ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Greedy:
    """The most likely id; ties go to the lowest id."""

    def __call__(
        self, logits: Float[Array, "batch vocab"], keys: Key[Array, "batch"]
    ) -> Int[Array, "batch"]:
        """Returns int32[batch]; `keys` are not used."""
        del keys
        # XLA's argmax carries value and index together, one element at a time on CPUs.
        return _first(logits == logits.max(axis=-1, keepdims=True))

    def check(self) -> None:
        """Does nothing: there is no setting."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Categorical:
    """Samples from softmax(logits / temperature), cut to the top k ids, then to the top-p nucleus.

    Attributes:
      temperature: above 0; 1 leaves the distribution as it is.
      top_k: keep the k most likely ids (None: all). Ties with the k-th are kept.
      top_p: keep the smallest set of most likely ids whose probability reaches p, the id that
        crosses p included, and its equals (None: all). The probabilities are those after
        temperature and top-k.
    """

    temperature: float = 1.0
    top_p: float | None = None
    top_k: int | None = dataclasses.field(default=None, metadata={"static": True})

    def __call__(
        self, logits: Float[Array, "batch vocab"], keys: Key[Array, "batch"]
    ) -> Int[Array, "batch"]:
        """Returns int32[batch]."""
        logits = self.process_logits(logits)
        weights = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
        return inverse_transform(weights, jax.vmap(jax.random.uniform)(keys))

    def check(self) -> None:
        """Checks the numbers.

        Raises:
          UserError: temperature is not above 0, top_p is outside (0, 1] or top_k below 1.
        """
        if not 0 < self.temperature < float("inf"):
            raise UserError(f"temperature is {self.temperature}; it must be above 0 to sample")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}; it must be 1 or more, or None for all")

    def process_logits(self, logits: Float[Array, "batch vocab"]) -> Float[Array, "batch vocab"]:
        """Scales the logits and sets ids outside the top k and the nucleus to -inf.

        The largest logit becomes 0 first, so that no quotient overflows.
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
    """The first id at which the running sum of the weights passes u times their whole sum.

    For u uniform in [0, 1) id i is sampled with probability weights[i] / sum(weights). It takes one
    random number a row, where the Gumbel trick takes one an id. The sum runs over blocks of ids,
    and then over the ids of one block.

    Args:
      weights: at least 0, and not all of them 0. An id of weight 0 is never sampled.
      u: in [0, 1).

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
    """The index at which the running sum passes the target, and the target minus the sum before."""
    sums = jnp.cumsum(weights, axis=-1)
    # Rounding may put the target past the last sum, or let a sum rise where the weight is 0.
    positive = weights > 0
    last = weights.shape[-1] - 1 - _first(positive[:, ::-1])
    passed = (sums > target[:, None]) & positive
    index = jnp.where(passed.any(axis=-1), _first(passed), last)
    before = jnp.take_along_axis(sums - weights, index[:, None], axis=-1)[:, 0]
    return index, target - before


def _first(mask: Bool[Array, "batch n"]) -> Int[Array, "batch"]:
    """The index of the first True of each row; 0 if there is none."""
    size = mask.shape[-1]
    index = jnp.where(mask, jnp.arange(size, dtype=jnp.int32), size).min(axis=-1)
    return jnp.where(index == size, 0, index)


def nucleus(
    logits: Float[Array, "batch vocab"], top_p: float | Float[Array, ""]
) -> Float[Array, "batch vocab"]:
    """-inf outside the nucleus of Holtzman et al. 2020; the id that crosses `top_p` stays inside.

    At least the most likely id survives. Ids of equal probability at the border stay together.

    The nucleus holds all ids at least as likely as a border. The border is the largest probability
    for which these ids still sum to `top_p`. It is found bit by bit: floats that are not negative
    have the order of their bits. 30 sums take a small part of the time of a sort.
    """
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    bits = jax.lax.bitcast_convert_type(probabilities, jnp.int32)

    def raise_border(
        number: Int[Array, ""], border: Int[Array, "batch 1"]
    ) -> Int[Array, "batch 1"]:
        higher = border | (1 << (29 - number))
        inside = jnp.where(bits >= higher, probabilities, 0).sum(axis=-1, keepdims=True)
        return jnp.where(inside >= top_p, higher, border)

    # No probability is above 1, and no bit of 1.0 is above the 29th.
    border = jax.lax.fori_loop(0, 30, raise_border, jnp.zeros_like(bits[:, :1]))
    return jnp.where(bits >= border, logits, -jnp.inf)


def make_sampler(
    temperature: float = 1.0, top_p: float | None = None, top_k: int | None = None
) -> Greedy | Categorical:
    """The sampler for these settings; temperature 0 is greedy, top_p 1 and top_k 0 mean "all".

    A temperature too small for float32 is greedy as well.

    Raises:
      UserError: temperature below 0, top_p outside (0, 1] or top_k below 0.
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
    """NaN becomes -inf, which is never sampled, and +inf the largest float; others stay."""
    logits = jnp.where(jnp.isnan(logits), -jnp.inf, logits)
    return jnp.minimum(logits, jnp.finfo(logits.dtype).max)
