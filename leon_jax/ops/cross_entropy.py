"""Next-token cross-entropy with a large tied table, without all logits in memory.

The tokens of each device are split into chunks. A scan computes the logits of one chunk and reduces
them to losses. The gradient of a weighted sum of losses depends only on the logits, so the same
scan computes it if it is needed. The backward pass computes nothing again; it only scales the
gradient. The memory is chunk x vocabulary instead of tokens x vocabulary.

Sharding (explicit mode): the tokens may be split in any way, and the table over its rows
(vocabulary) and columns (embedding). The table is gathered over its columns once, *outside* the
scan, and marked as varying there. So each device sums the gradient of the table over all chunks,
and the mesh reduces it once, not once for each chunk.

Axes: c chunks, n tokens of a chunk, d embed, v vocab.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from leon_jax.ops.products import on_cpu, sum_in_float32, transpose


def chunked_cross_entropy(
    hidden: Float[Array, "batch length embed"],
    table: Float[Array, "vocab embed"],
    targets: Int[Array, "batch length"],
    weights: Float[Array, "batch length"],
    *,
    chunk: int = 512,
    z_loss: float = 0.0,
    operands: DTypeLike | None = None,
    exchange: DTypeLike | None = None,
) -> tuple[Float[Array, ""], Float[Array, "batch length"]]:
    """Sums weights * (-log softmax(logits)[targets] + z_loss log(sum(exp(logits)))^2).

    The logits are hidden table^T, in float32.

    Args:
      hidden: final hidden states.
      table: the tied embedding table. Each device sums its gradient in float32.
      targets: ids 0..vocab - 1; any id where the weight is 0.
      weights: weight of each token; 0 ignores the token. They have no gradient.
      chunk: tokens of a device in one step.
      z_loss: coefficient that prevents drifting logits (PaLM, section 5: 1e-4); 0: plain
        cross-entropy.
      operands: dtype of the operands of the matmuls; None: that of `hidden`.
      exchange: dtype in which devices exchange the table and its gradient; None: that of the table.

    Returns:
      The sum over all tokens, and the term of each token, both in float32. Only the sum has a
      gradient.
    """
    batch, length, _ = jax.typeof(hidden).sharding.spec
    rows, columns = jax.typeof(table).sharding.spec
    tokens, states = jax.P(batch, length), jax.P(batch, length, None)
    exchange = table.dtype if exchange is None else jnp.dtype(exchange)
    run = functools.partial(
        _local_loss,
        rows=_axes(rows),
        columns=_axes(columns),
        batch=(*_axes(batch), *_axes(length)),
        chunk=chunk,
        z_loss=z_loss,
        operands=hidden.dtype if operands is None else jnp.dtype(operands),
    )
    total, losses = jax.shard_map(
        run,
        in_specs=(states, jax.P(rows, columns), tokens, tokens),
        out_specs=(jax.P(), tokens),
    )(
        jax.reshard(hidden, states),
        table.astype(exchange),
        jax.reshard(targets, tokens),
        jax.reshard(jax.lax.stop_gradient(weights).astype(jnp.float32), tokens),
    )
    return total, jax.lax.stop_gradient(losses)


def _local_loss(hidden, table, targets, weights, *, rows, columns, batch, chunk, z_loss, operands):
    """Returns the sum over all devices, and the losses of this device's tokens."""
    # Marked before it is gathered, so that each device reduces its columns of the gradient alone.
    if other_axes := tuple(axis for axis in batch if axis not in columns):
        table = jax.lax.pcast(table, other_axes, to="varying")
    if columns:
        table = jax.lax.all_gather(table.T, columns, axis=0, tiled=True)
        if not on_cpu():
            # The TPU compiler scatters a gradient along the major axis; along the minor one it
            # sends the whole gradient to every device.
            table = with_layout_constraint(table, Layout((0, 1)))
        table = table.T
    shape, embed, size = targets.shape, hidden.shape[-1], targets.size
    count = -(-size // min(chunk, size))
    width = -(-size // count)
    padding = count * width - size

    def split(array, *trailing):
        flat = array.reshape(size, *trailing)
        padded = jnp.pad(flat, ((0, padding), *((0, 0) for _ in trailing)))
        return padded.reshape(count, width, *trailing)

    chunks = split(hidden, embed), table, split(targets), split(weights)
    total, losses = _chunks(rows, z_loss, operands, *chunks)
    return jax.lax.psum(total, batch), losses.reshape(-1)[:size].reshape(shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _chunks(rows, z_loss, operands, hidden, table, targets, weights):
    """Returns the sum and the [c, n] losses of this device's chunks.

    The vocabulary is split over the mesh axes `rows`.
    """

    def step(total, chunk):
        loss, _ = _losses_and_slopes(rows, z_loss, operands, table, *chunk)
        return total + loss.sum(), loss

    return jax.lax.scan(step, _zero(weights), (hidden, targets, weights))


def _chunks_forward(rows, z_loss, operands, hidden, table, targets, weights):
    """Runs `_chunks`, and computes the gradients of the sum for the hidden states and the table."""
    # Then the gradient of the table is summed transposed, which is faster (see `ops.products`).
    is_rounded = operands != hidden.dtype

    def step(carry, chunk):
        total, table_gradient = carry
        states, _, _ = chunk
        loss, slope = _losses_and_slopes(rows, z_loss, operands, table, *chunk)
        slope = slope.astype(operands)
        gradient = jnp.einsum(
            "nv,vd->nd", slope, table.astype(operands), preferred_element_type=jnp.float32
        )
        if rows:
            gradient = jax.lax.psum(gradient, rows)
        if is_rounded:
            table_gradient += sum_in_float32("nd,nv->dv", states.astype(operands), slope)
        else:
            table_gradient += jnp.einsum(
                "nv,nd->vd", slope, states, preferred_element_type=jnp.float32
            )
        return (total + loss.sum(), table_gradient), (loss, gradient.astype(states.dtype))

    shape = table.shape[::-1] if is_rounded else table.shape
    start = _zero(weights), jnp.zeros_like(table, jnp.float32, shape=shape)
    (total, table_gradient), (losses, gradients) = jax.lax.scan(
        step, start, (hidden, targets, weights)
    )
    if is_rounded:
        table_gradient = transpose(table_gradient, "dv", "vd")
    # Zeros of no size carry the table's dtype, which its gradient has.
    return (total, losses), (gradients, table_gradient, table[:0])


def _chunks_backward(rows, z_loss, operands, saved, cotangents):
    """Scales the gradients of the sum. The losses have no gradient."""
    del rows, z_loss, operands
    gradients, table_gradient, empty_table = saved
    scale, _ = cotangents
    return (
        (gradients * scale).astype(gradients.dtype),
        (table_gradient * scale).astype(empty_table.dtype),
        None,
        None,
    )


_chunks.defvjp(_chunks_forward, _chunks_backward)


def _losses_and_slopes(rows, z_loss, operands, table, hidden, targets, weights):
    """Returns the weighted losses [n] of one chunk and d loss / d logits [n, v], in float32."""
    logits = jnp.einsum(
        "nd,vd->nv",
        hidden.astype(operands),
        table.astype(operands),
        preferred_element_type=jnp.float32,
    )
    top = logits.max(axis=-1)
    if rows:
        top = jax.lax.pmax(top, rows)
    total = jnp.exp(logits - top[:, None]).sum(axis=-1)
    first = jax.lax.axis_index(rows) * table.shape[0] if rows else 0
    is_target = first + jnp.arange(table.shape[0]) == targets[:, None]
    parts = jax.lax.axis_size(rows) if rows else 1
    if on_cpu() and parts == 1:
        target_logits = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    else:
        # The target may be a row of another device, and on accelerators a gather is slower.
        target_logits = jnp.where(is_target, logits, 0.0).sum(axis=-1)
    if rows:
        total, target_logits = jax.lax.psum((total, target_logits), rows)
    log_total = jnp.log(total) + top
    losses = weights * (log_total - target_logits + z_loss * jnp.square(log_total))
    probabilities = jnp.exp(logits - log_total[:, None])
    slopes = probabilities * (1 + 2 * z_loss * log_total[:, None]) - is_target
    return losses, slopes * weights[:, None]


def _zero(weights):
    """Returns a zero that varies over the same mesh axes as a sum of the weights."""
    return weights.sum() * 0


def _axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
