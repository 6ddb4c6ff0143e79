"""Scaled dot-product attention in plain XLA: the oracle, and the signature every fast path keeps.

One signature: a faster implementation (splash attention on TPU, cuDNN flash attention on GPU) is a
function with exactly the arguments of `attention`, so that a model picks one by name and a test
compares it with this file. Nothing here is tuned; everything here is meant to be obviously right.

Sharding (explicit mode): outputs are laid out like the queries. The axis the queries' length is
split over is gathered for keys and values, so splitting the context is correct without a ring.

Axes: b batch, t query length, s key length, h heads, k head_dim.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Finite, so that a row without a single visible key gives a uniform mixture and not NaN.
_HIDDEN = -1e30


def attention(
    q: Float[Array, "batch length heads head_dim"],
    k: Float[Array, "batch length heads head_dim"],
    v: Float[Array, "batch length heads head_dim"],
    *,
    segment_ids: Int[Array, "batch length"] | None = None,
    causal: bool = True,
) -> Float[Array, "batch length heads head_dim"]:
    """softmax(q k^T / sqrt(head_dim)) v, with the softmax in float32.

    Args:
      q, k, v: queries, keys and values, any floating dtype (the output has the dtype of `v`).
      segment_ids: a position sees only positions of its own segment; None: one segment.
      causal: position i sees positions 0..i only.

    For example, causal with segment ids [1, 1, 2, 2] lets query (row) see key (column)

        1 . . .
        1 1 . .
        . . 1 .
        . . 1 1
    """
    batch, length, heads, _ = _spec(q)
    k, v = (jax.reshard(x, jax.P(batch, None, heads, None)) for x in (k, v))
    logits = jnp.einsum(
        "bthk,bshk->bhts",
        q * q.shape[-1] ** -0.5,
        k,
        preferred_element_type=jnp.float32,
        out_sharding=jax.P(batch, heads, length, None),
    )
    if causal:
        visible = jnp.tril(jnp.ones((q.shape[1], k.shape[1]), bool))
        logits = jnp.where(visible, logits, _HIDDEN)
    if segment_ids is not None:
        rows = jax.reshard(segment_ids, jax.P(batch, length))
        columns = jax.reshard(segment_ids, jax.P(batch, None))
        same = rows[:, None, :, None] == columns[:, None, None, :]
        logits = jnp.where(same, logits, _HIDDEN)
    mixture = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("bhts,bshk->bthk", mixture, v, out_sharding=jax.P(batch, length, heads, None))


def cached_attention(
    q: Float[Array, "batch heads head_dim"],
    k: Float[Array, "batch heads head_dim"],
    v: Float[Array, "batch heads head_dim"],
    keys: Float[Array, "batch length heads head_dim"],
    values: Float[Array, "batch length heads head_dim"],
    valid: Bool[Array, "batch length"],
) -> Float[Array, "batch heads head_dim"]:
    """Attention of one new token over a read-only cache and over itself.

    The softmax is taken over both parts without ever writing the new key and value into the cache:
    both share one maximum and one sum, which is the softmax of the concatenation.

    Args:
      q, k, v: query, key and value of the new token.
      keys, values: the cache; where `valid` is False its content does not matter (but is finite).
      valid: which cache slots the token sees. It always sees itself.
    """
    batch, heads, _ = _spec(q)
    q = q * q.shape[-1] ** -0.5
    past = jnp.einsum(
        "bhk,bshk->bhs",
        q,
        keys,
        preferred_element_type=jnp.float32,
        out_sharding=jax.P(batch, heads, None),
    )
    past = jnp.where(valid[:, None, :], past, _HIDDEN)
    own = jnp.sum(q.astype(jnp.float32) * k.astype(jnp.float32), axis=-1)
    top = jnp.maximum(past.max(axis=-1), own)
    past, own = jnp.exp(past - top[..., None]), jnp.exp(own - top)
    total = past.sum(axis=-1) + own
    mixed = jnp.einsum(
        "bhs,bshk->bhk",
        (past / total[..., None]).astype(values.dtype),
        values,
        out_sharding=jax.P(batch, heads, None),
    )
    return mixed + (own / total)[..., None].astype(v.dtype) * v


def _spec(x: Array) -> jax.P:
    """How `x` is split; one entry an axis."""
    return jax.typeof(x).sharding.spec
