"""Samplers: frozen dataclasses that turn logits into one id a row.

Each is a pytree, so a new temperature or top-p does not compile the decode loop again. Every row
draws from a key of its own, so what a row receives does not depend on its neighbours in the batch.
"""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from leon_jax.config import UserError


class Sampler(Protocol):
    """Anything that maps logits and one key a row to one id a row."""

    def __call__(
        self, logits: Float[Array, "batch vocab"], keys: Key[Array, "batch"]
    ) -> Int[Array, "batch"]: ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Greedy:
    """The most likely id; ties go to the lowest id."""

    def __call__(
        self, logits: Float[Array, "batch vocab"], keys: Key[Array, "batch"]
    ) -> Int[Array, "batch"]:
        """Returns int32[batch]; `keys` are not used."""
        del keys
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Categorical:
    """Draws from softmax(logits / temperature), cut to the top k ids and then to the top-p nucleus.

    Attributes:
      temperature: above 0; 1 leaves the distribution as it is.
      top_k: keep the k most likely ids (None: all). Ties with the k-th are kept.
      top_p: keep the smallest set of most likely ids whose probability reaches p, the id that
        crosses p included (None: all). The probabilities are those after temperature and top-k.
    """

    temperature: float = 1.0
    top_p: float | None = None
    top_k: int | None = dataclasses.field(default=None, metadata={"static": True})

    def __call__(
        self, logits: Float[Array, "batch vocab"], keys: Key[Array, "batch"]
    ) -> Int[Array, "batch"]:
        """Returns int32[batch]."""
        return jax.vmap(jax.random.categorical)(keys, self.shape(logits)).astype(jnp.int32)

    def shape(self, logits: Float[Array, "batch vocab"]) -> Float[Array, "batch vocab"]:
        """The logits that are drawn from: scaled, and -inf outside the kept set."""
        logits = logits / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            kth = jax.lax.top_k(logits, self.top_k)[0][:, -1:]
            logits = jnp.where(logits >= kth, logits, -jnp.inf)
        if self.top_p is not None:
            logits = nucleus(logits, self.top_p)
        return logits


def nucleus(
    logits: Float[Array, "batch vocab"], top_p: float | Float[Array, ""]
) -> Float[Array, "batch vocab"]:
    """-inf outside the nucleus of Holtzman et al. 2020; the id that crosses `top_p` stays inside.

    At least the most likely id survives. Ids of equal probability at the border stay together.
    """
    ordered = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    # An id is kept while the ids before it have not yet reached top_p.
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = (before < top_p).at[:, 0].set(True)
    threshold = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= threshold, logits, -jnp.inf)


def make_sampler(
    temperature: float = 1.0, top_p: float | None = None, top_k: int | None = None
) -> Greedy | Categorical:
    """The sampler for these settings; temperature 0 is greedy, top_p 1 and top_k 0 mean "all".

    Raises:
      UserError: temperature below 0, top_p outside (0, 1] or top_k below 0.
    """
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature is {temperature}; it must be 0 (greedy) or more")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p}; it must be above 0 and at most 1")
    if top_k is not None and top_k < 0:
        raise UserError(f"top_k is {top_k}; it must be 0 (all) or more")
    if temperature == 0:
        return Greedy()
    return Categorical(
        temperature=float(temperature),
        top_p=None if top_p is None or top_p == 1 else float(top_p),
        top_k=top_k or None,
    )
