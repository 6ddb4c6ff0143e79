"""Next-token cross-entropy against a large tied table, without ever holding all logits.

The tokens of each device are cut into chunks; a scan computes one chunk's logits, reduces them to
log-probabilities and forgets them, and the backward pass computes them again. Memory is
chunk x vocabulary instead of tokens x vocabulary.

Sharding (explicit mode): the tokens may be split in any way, the table over its rows (vocabulary)
and its columns (embedding). The table is gathered over its columns once, *outside* the scan, and
marked as varying there, so its gradient is summed on every device over all chunks and reduced over
the mesh once, not once a chunk.

Axes: n tokens of a chunk, d embed, v vocab.
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
    chunk: int = 1024,
    z_loss: float = 0.0,
) -> Float[Array, "batch length"]:
    """Computes weights * (-log softmax(logits)[targets] + z_loss log(sum(exp(logits)))^2).

    The logits are hidden table^T, in float32.

    Args:
      hidden: final hidden states; its dtype is the dtype of the matmuls.
      table: the tied embedding table; its gradient is accumulated in its own dtype.
      targets: ids 0..vocab - 1; anything where the weight is 0.
      weights: 0 leaves a token out.
      chunk: tokens a device handles at a time.
      z_loss: keeps logits from drifting (PaLM, section 5: 1e-4); 0: plain cross-entropy.

    Returns:
      One weighted loss a token; the mean loss is its sum over the sum of the weights.
    """
    batch, length, _ = jax.typeof(hidden).sharding.spec
    rows, columns = jax.typeof(table).sharding.spec
    tokens, whole = jax.P(batch, length), jax.P(batch, length, None)
    run = functools.partial(
        _local_loss,
        rows=_axes(rows),
        columns=_axes(columns),
        others=tuple(a for a in (*_axes(batch), *_axes(length)) if a not in _axes(columns)),
        chunk=chunk,
        z_loss=z_loss,
    )
    losses = jax.shard_map(run, in_specs=(whole, jax.P(rows, columns), tokens), out_specs=tokens)(
        jax.reshard(hidden, whole), table, jax.reshard(targets, tokens)
    )
    return losses * jax.reshard(weights, tokens).astype(jnp.float32)


def _local_loss(hidden, table, targets, *, rows, columns, others, chunk, z_loss):
    """Loss of one device's tokens; `table` is its part. Collectives go over the named axes."""
    if columns:
        table = jax.lax.all_gather(table, columns, axis=1, tiled=True)
    if others:
        table = jax.lax.pcast(table, others, to="varying")
    shape, embed = targets.shape, hidden.shape[-1]
    size = targets.size
    count = -(-size // min(chunk, size))
    width = -(-size // count)
    padding = count * width - size
    hidden = jnp.pad(hidden.reshape(size, embed), ((0, padding), (0, 0)))
    targets = jnp.pad(targets.reshape(size), (0, padding))
    first = jax.lax.axis_index(rows) * table.shape[0] if rows else 0

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def losses(table, hidden, targets):
        logits = jnp.einsum(
            "nd,vd->nv", hidden, table.astype(hidden.dtype), preferred_element_type=jnp.float32
        )
        top = jax.lax.stop_gradient(logits).max(axis=-1)
        if rows:
            top = jax.lax.pmax(top, rows)
        total = jnp.exp(logits - top[:, None]).sum(axis=-1)
        # A comparison instead of a gather: the target may be a row of another device.
        here = first + jnp.arange(table.shape[0]) == targets[:, None]
        picked = jnp.where(here, logits, 0.0).sum(axis=-1)
        if rows:
            total, picked = jax.lax.psum((total, picked), rows)
        log_total = jnp.log(total) + top
        return log_total - picked + z_loss * jnp.square(log_total)

    chunks = hidden.reshape(count, width, embed), targets.reshape(count, width)
    _, found = jax.lax.scan(lambda _, inputs: (None, losses(table, *inputs)), None, chunks)
    return found.reshape(-1)[:size].reshape(shape)


def _axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
