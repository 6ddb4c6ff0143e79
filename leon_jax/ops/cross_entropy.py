"""Next-token cross-entropy against a large tied table, without ever holding all logits.

The tokens of each device are cut into chunks; a scan computes one chunk's logits, reduces them to
losses and forgets them. When a gradient is wanted, the same pass over the logits makes it, because
the gradient of a weighted sum of losses is known as soon as the logits are: nothing is computed
again, and the backward pass only scales. Memory is chunk x vocabulary instead of tokens x
vocabulary.

Sharding (explicit mode): the tokens may be split in any way, the table over its rows (vocabulary)
and its columns (embedding). The table is gathered over its columns once, *outside* the scan, and
marked as varying there, so its gradient is summed on every device over all chunks and reduced over
the mesh once, not once a chunk.

Axes: c chunks, n tokens of a chunk, d embed, v vocab.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def chunked_cross_entropy(
    hidden: Float[Array, "batch length embed"],
    table: Float[Array, "vocab embed"],
    targets: Int[Array, "batch length"],
    weights: Float[Array, "batch length"],
    *,
    chunk: int = 512,
    z_loss: float = 0.0,
) -> tuple[Float[Array, ""], Float[Array, "batch length"]]:
    """Sums weights * (-log softmax(logits)[targets] + z_loss log(sum(exp(logits)))^2).

    The logits are hidden table^T, in float32.

    Args:
      hidden: final hidden states; its dtype is the dtype of the matmuls.
      table: the tied embedding table; its gradient is accumulated in its own dtype.
      targets: ids 0..vocab - 1; anything where the weight is 0.
      weights: 0 leaves a token out. They are constants: no gradient goes to them.
      chunk: tokens a device handles at a time.
      z_loss: keeps logits from drifting (PaLM, section 5: 1e-4); 0: plain cross-entropy.

    Returns:
      The sum over all tokens, and its terms, both in float32. Only the sum has a gradient.
    """
    batch, length, _ = jax.typeof(hidden).sharding.spec
    rows, columns = jax.typeof(table).sharding.spec
    tokens, whole = jax.P(batch, length), jax.P(batch, length, None)
    run = functools.partial(
        _local_loss,
        rows=_axes(rows),
        columns=_axes(columns),
        batch=(*_axes(batch), *_axes(length)),
        chunk=chunk,
        z_loss=z_loss,
    )
    total, losses = jax.shard_map(
        run,
        in_specs=(whole, jax.P(rows, columns), tokens, tokens),
        out_specs=(jax.P(), tokens),
    )(
        jax.reshard(hidden, whole),
        table,
        jax.reshard(targets, tokens),
        jax.reshard(jax.lax.stop_gradient(weights).astype(jnp.float32), tokens),
    )
    return total, jax.lax.stop_gradient(losses)


def _local_loss(hidden, table, targets, weights, *, rows, columns, batch, chunk, z_loss):
    """(sum, losses) of one device's tokens; `table` is its part. The sum is of all devices."""
    if columns:
        table = jax.lax.all_gather(table, columns, axis=1, tiled=True)
    if others := tuple(axis for axis in batch if axis not in columns):
        table = jax.lax.pcast(table, others, to="varying")
    shape, embed, size = targets.shape, hidden.shape[-1], targets.size
    count = -(-size // min(chunk, size))
    width = -(-size // count)
    padding = count * width - size

    def cut(array, *rest):
        flat = jnp.pad(array.reshape(size, *rest), ((0, padding), *((0, 0) for _ in rest)))
        return flat.reshape(count, width, *rest)

    total, losses = _chunks(rows, z_loss, cut(hidden, embed), table, cut(targets), cut(weights))
    return jax.lax.psum(total, batch), losses.reshape(-1)[:size].reshape(shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunks(rows, z_loss, hidden, table, targets, weights):
    """(sum, [c, n] terms) of this device's chunks; the vocabulary is split over the axes `rows`."""

    def step(total, chunk):
        loss, _ = _losses_and_slopes(rows, z_loss, table, *chunk)
        return total + loss.sum(), loss

    return jax.lax.scan(step, _zero(weights), (hidden, targets, weights))


def _chunks_forward(rows, z_loss, hidden, table, targets, weights):
    """The same, and the gradients of the sum with respect to hidden states and table."""

    def step(carry, chunk):
        total, table_gradient = carry
        states, _, _ = chunk
        loss, slope = _losses_and_slopes(rows, z_loss, table, *chunk)
        slope = slope.astype(states.dtype)
        gradient = jnp.einsum(
            "nv,vd->nd", slope, table.astype(states.dtype), preferred_element_type=jnp.float32
        )
        if rows:
            gradient = jax.lax.psum(gradient, rows)
        table_gradient += jnp.einsum(
            "nv,nd->vd", slope, states, preferred_element_type=table_gradient.dtype
        )
        return (total + loss.sum(), table_gradient), (loss, gradient.astype(states.dtype))

    start = _zero(weights), jnp.zeros_like(table)
    (total, table_gradient), (losses, gradients) = jax.lax.scan(
        step, start, (hidden, targets, weights)
    )
    return (total, losses), (gradients, table_gradient)


def _chunks_backward(rows, z_loss, saved, cotangents):
    """Scales; the terms have no gradient (see `chunked_cross_entropy`)."""
    del rows, z_loss
    gradients, table_gradient = saved
    scale, _ = cotangents
    return (
        (gradients * scale).astype(gradients.dtype),
        (table_gradient * scale).astype(table_gradient.dtype),
        None,
        None,
    )


_chunks.defvjp(_chunks_forward, _chunks_backward)


def _losses_and_slopes(rows, z_loss, table, hidden, targets, weights):
    """Weighted losses [n] of one chunk, and their slopes d loss / d logits [n, v], in float32."""
    logits = jnp.einsum(
        "nd,vd->nv", hidden, table.astype(hidden.dtype), preferred_element_type=jnp.float32
    )
    top = logits.max(axis=-1)
    if rows:
        top = jax.lax.pmax(top, rows)
    total = jnp.exp(logits - top[:, None]).sum(axis=-1)
    # A comparison instead of a gather: the target may be a row of another device.
    first = jax.lax.axis_index(rows) * table.shape[0] if rows else 0
    here = first + jnp.arange(table.shape[0]) == targets[:, None]
    picked = jnp.where(here, logits, 0.0).sum(axis=-1)
    if rows:
        total, picked = jax.lax.psum((total, picked), rows)
    log_total = jnp.log(total) + top
    losses = weights * (log_total - picked + z_loss * jnp.square(log_total))
    probabilities = jnp.exp(logits - log_total[:, None])
    slopes = probabilities * (1 + 2 * z_loss * log_total[:, None]) - here
    return losses, slopes * weights[:, None]


def _zero(weights):
    """A scalar that varies over devices as a sum of weights would."""
    return weights.sum() * 0


def _axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
