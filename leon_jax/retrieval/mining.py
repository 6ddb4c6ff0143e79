"""The nearest rows of a bank for many queries: one SPMD program over all devices of the mesh.

The rows of a block are split over the devices, whatever the axes of the mesh mean otherwise. Every
device scores all queries against its own rows, a tile at a time, and keeps the k best; then each
query's lists go to one device (an all-to-all), which merges them with what earlier blocks gave. So
no more than a tile of scores exists at once, and devices exchange scores and ids, never rows.

An exact search multiplies in float32 and takes the best in two stages (`top_k`). An approximate one
multiplies in bfloat16 and, on TPUs, keeps the best of bins (`jax.lax.approx_max_k`; Chern et al.,
"TPU-KNN", 2022), which the compiler fuses into the product: no score is written to device memory.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, Num

from leon_jax import sharding
from leon_jax.retrieval.device_blocks import LANES, Blocks, next_power, put

NONE = -1  # stands where there is no row; its score is -inf
# Queries whose results are held while all blocks pass by.
PASS = 65_536


def nearest(
    blocks: Blocks,
    queries: Float32[np.ndarray, "q d"],
    k: int,
    keep: Bool[np.ndarray, "n"] | None = None,
    recall: float = 1.0,
) -> tuple[Float32[np.ndarray, "q k"], Int32[np.ndarray, "q k"]]:
    """The k rows with the largest inner products, best first, equal ones in the order of rows.

    All processes call it with the same arguments and get the same results.

    Args:
      blocks: of the bank.
      queries: finite.
      k: how many, at least 1.
      keep: which rows may be found; None: all.
      recall: 1 is an exact search. An approximate one finds this part of the true k best on average
        if they are spread evenly over the rows of a device (on CPUs and GPUs all of them), but for
        what bfloat16 products exchange.

    Returns:
      Scores and rows; -inf and `NONE` where fewer are left.

    Raises:
      NotFiniteError: rows are not finite.
    """
    scores = np.full((len(queries), k), -np.inf, np.float32)
    ids = np.full((len(queries), k), NONE, np.int32)
    with jax.set_mesh(blocks.mesh):
        for start in range(0, len(queries), PASS):
            some = slice(start, start + PASS)
            scores[some], ids[some] = _pass(blocks, queries[some], k, keep, recall)
    return scores, np.where(np.isneginf(scores), np.int32(NONE), ids)


def _pass(blocks: Blocks, queries: np.ndarray, k: int, keep: np.ndarray | None, recall: float):
    """`nearest` of up to `PASS` queries: every block passes by once."""
    most = blocks.sizes.queries_exact if recall == 1 else blocks.sizes.queries
    size = min(most, next_power(len(queries)))
    size = -(-size // blocks.mesh.size) * blocks.mesh.size
    batches = [
        put(blocks.layout, size, queries[i : i + size], 0) for i in range(0, len(queries), size)
    ]
    none = np.zeros((0, k), np.float32), np.zeros((0, k), np.int32)
    found = [
        (put(blocks.layout, size, none[0], -np.inf), put(blocks.layout, size, none[1], NONE))
        for _ in batches
    ]
    run = functools.partial(step, tile=blocks.tile, recall=recall)
    starts = blocks.starts(keep)
    ahead = [blocks.rows(start) for start in starts[:1]]
    for number, start in enumerate(starts):
        rows, allowed = ahead.pop(), blocks.allowed(start, keep)
        found = [
            run(*best, batch, rows, allowed, np.int32(start))
            for best, batch in zip(found, batches, strict=True)
        ]
        # The next block is read while the devices work on this one; a third is not begun.
        ahead = [blocks.rows(after) for after in starts[number + 1 : number + 2]]
        blocks.check(start, rows)
        jax.block_until_ready(found)
    scores, ids = zip(*sharding.fetch(found), strict=True)
    return np.concatenate(scores)[: len(queries)], np.concatenate(ids)[: len(queries)]


@functools.partial(jax.jit, static_argnames=("tile", "recall"), donate_argnames=("scores", "ids"))
def step(
    scores: Float[Array, "q k"],
    ids: Int[Array, "q k"],
    queries: Float[Array, "q d"],
    rows: Num[Array, "n d"],
    allowed: Bool[Array, "n"] | None,
    start: Int[Array, ""],
    *,
    tile: int,
    recall: float,
) -> tuple[Float[Array, "q k"], Int[Array, "q k"]]:
    """The best of those found so far and of one more block.

    Every array is split over all axes of the mesh on its first axis.

    Args:
      scores, ids: found so far, best first.
      queries: float32.
      rows: of the block.
      allowed: which of them may be found; None: all.
      start: the number of the block's first row, above all ids found so far.
      tile: rows scored at once; divides those of a device.
      recall: see `nearest`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    device = mesh.abstract_device
    run = functools.partial(
        _local,
        axes=mesh.axis_names,
        on_tpu=device is not None and "tpu" in device.device_kind.lower(),
        tile=tile,
        recall=recall,
    )
    split = jax.P(mesh.axis_names)
    return jax.shard_map(
        run, in_specs=(split, split, split, split, split, jax.P()), out_specs=(split, split)
    )(scores, ids, queries, rows, allowed, start)


def _local(scores, ids, queries, rows, allowed, start, *, axes, on_tpu, tile, recall):
    """One device's part: the rows are its own, the scores and ids those of its queries."""
    k, exact = scores.shape[1], recall == 1
    dtype = jnp.float32 if exact else jnp.bfloat16
    precision = jax.lax.Precision.HIGHEST if exact else None
    queries = jax.lax.all_gather(queries.astype(dtype), axes, tiled=True)
    start += jax.lax.axis_index(axes) * rows.shape[0]

    def look(best: tuple[Array, Array], first):
        part = jax.lax.dynamic_slice_in_dim(rows, first, tile).astype(dtype)
        found = jnp.einsum(
            "qd,nd->qn", queries, part, precision=precision, preferred_element_type=jnp.float32
        )
        if allowed is not None:
            found = jnp.where(jax.lax.dynamic_slice_in_dim(allowed, first, tile), found, -jnp.inf)
        if exact or not on_tpu:
            values, places = top_k(found, min(k, tile), LANES if on_tpu else 1)
        else:
            # As many bins as reach the recall if all of the best are rows of this device: what is
            # alike often stands side by side, so rows of the other devices must not count.
            values, places = jax.lax.approx_max_k(
                found,
                min(k, tile),
                recall_target=recall,
                reduction_input_size_override=rows.shape[0],
            )
        return _merge(*best, values, start + first + places), None

    shape = queries.shape[0], k
    empty = jnp.full(shape, -jnp.inf, jnp.float32), jnp.full(shape, NONE, jnp.int32)
    firsts = jnp.arange(0, rows.shape[0], tile, dtype=jnp.int32)
    best, _ = jax.lax.scan(look, jax.lax.pcast(empty, axes, to="varying"), firsts)
    # From all queries of some rows to all rows of some queries, in the order of the rows.
    values, places = (jax.lax.all_to_all(each, axes, 0, 1, tiled=True) for each in best)
    return _merge(scores, ids, values, places)


def _merge(scores, ids, more_scores, more_ids):
    """The best of both; of equals those of the first come first, then as they stand."""
    values, places = top_k(jnp.concatenate([scores, more_scores], axis=1), scores.shape[1])
    return values, _pick(jnp.concatenate([ids, more_ids], axis=1), places)


def top_k(
    scores: Float[Array, "q n"], k: int, smallest: int = 1
) -> tuple[Float[Array, "q k"], Int[Array, "q k"]]:
    """`jax.lax.top_k`, ties included, in two stages: it is slow where rows are long.

    The row is cut into groups. The k best lie in the k groups with the largest maxima (of equal
    ones the first): were one of them in another group, each of these k would hold something better,
    or as good and further to the front. The groups are taken in their order, so that equals are.

    Args:
      scores: any numbers but NaN.
      k: at most n.
      smallest: the least size of a group; it grows with sqrt(n / k), where both stages cost alike.
    """
    count, width = scores.shape
    group = max(smallest, 2 ** round(math.log2(width / k) / 2))
    group = min(group, width & -width)  # a power of two that divides the width
    if group < max(smallest, 2) or width < 2 * k * group:
        return jax.lax.top_k(scores, k)
    groups = scores.reshape(count, -1, group)
    _, chosen = jax.lax.top_k(groups.max(axis=-1), k)
    chosen = jnp.sort(chosen, axis=1)
    values, places = jax.lax.top_k(_pick(groups, chosen[:, :, None]).reshape(count, -1), k)
    return values, _pick(chosen, places // group) * group + places % group


def _pick(array, places):
    """Elements of each row by their places, which are never out of bounds."""
    return jnp.take_along_axis(array, places, axis=1, mode="promise_in_bounds")
