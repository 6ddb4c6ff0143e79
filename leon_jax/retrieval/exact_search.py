"""The nearest rows of an index for many queries: one SPMD program over all devices of the mesh.

The rows of a block are split over all devices, whatever the mesh axes mean elsewhere. Each device
scores all queries against its rows, one tile at a time, and keeps the k best. An all-to-all then
sends all lists of a query to one device, which merges them with the result of earlier blocks. So
only one tile of scores is in memory at once, and devices exchange scores and ids, never rows.

An exact search multiplies in float32 and selects the best rows in two stages (`top_k`). An
approximate search multiplies in bfloat16. On TPUs it keeps the best of each bin
(`jax.lax.approx_max_k`; Chern et al., "TPU-KNN", 2022). The compiler fuses this into the product,
so no score is written to device memory.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, Num

from leon_jax import sharding
from leon_jax.retrieval.device_blocks import LANES, RowBlocks, next_power_of_two, put_padded

NONE = -1  # the id where there is no row; its score is -inf
# Queries whose results stay in memory during one pass over all blocks.
PASS = 65_536


def nearest(
    blocks: RowBlocks,
    queries: Float32[np.ndarray, "q d"],
    k: int,
    keep: Bool[np.ndarray, "n"] | None = None,
    recall: float = 1.0,
) -> tuple[Float32[np.ndarray, "q k"], Int32[np.ndarray, "q k"]]:
    """Returns the k rows with the largest inner products, best first, equal scores by row.

    All processes must call it with the same arguments. All get the same results.

    Args:
      blocks: the rows of the index.
      queries: finite.
      k: number of rows for each query, at least 1.
      keep: mask of the rows that may be returned; None: all.
      recall: 1 is an exact search. Below 1, an approximate search returns this part of the true k
        best on average, if they are spread evenly over the rows of a device. On CPUs and GPUs it
        returns all of them, except where bfloat16 products change the order.

    Returns:
      Scores and row ids; -inf and `NONE` where fewer than k rows remain.

    Raises:
      NotFiniteError: rows are not finite.
    """
    scores = np.full((len(queries), k), -np.inf, np.float32)
    ids = np.full((len(queries), k), NONE, np.int32)
    with jax.set_mesh(blocks.mesh):
        for start in range(0, len(queries), PASS):
            batch = slice(start, start + PASS)
            scores[batch], ids[batch] = _search_pass(blocks, queries[batch], k, keep, recall)
    return scores, np.where(np.isneginf(scores), np.int32(NONE), ids)


def _search_pass(
    blocks: RowBlocks, queries: np.ndarray, k: int, keep: np.ndarray | None, recall: float
):
    """Runs `nearest` for up to `PASS` queries, with one pass over all blocks."""
    largest = blocks.sizes.queries_exact if recall == 1 else blocks.sizes.queries
    size = min(largest, next_power_of_two(len(queries)))
    size = -(-size // blocks.mesh.size) * blocks.mesh.size
    put = functools.partial(put_padded, blocks.layout, size)
    batches = [put(queries[i : i + size], 0) for i in range(0, len(queries), size)]
    no_scores, no_ids = np.zeros((0, k), np.float32), np.zeros((0, k), np.int32)
    results = [(put(no_scores, -np.inf), put(no_ids, NONE)) for _ in batches]
    search_block = functools.partial(step, tile=blocks.tile, recall=recall)
    starts = blocks.starts(keep)
    prefetched = [blocks.rows(start) for start in starts[:1]]
    for number, start in enumerate(starts):
        rows, allowed = prefetched.pop(), blocks.allowed(start, keep)
        results = [
            search_block(*result, batch, rows, allowed, np.int32(start))
            for result, batch in zip(results, batches, strict=True)
        ]
        # Reads the next block while the devices work on this one, and no further block.
        prefetched = [blocks.rows(after) for after in starts[number + 1 : number + 2]]
        blocks.check_finite(start, rows)
        jax.block_until_ready(results)
    scores, ids = zip(*sharding.fetch(results), strict=True)
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
    """Merges the best rows of one more block into the best rows so far.

    The first axis of every array is split over all axes of the mesh.

    Args:
      scores, ids: the best so far, best first.
      queries: float32.
      rows: of the block.
      allowed: mask of the rows that may be returned; None: all.
      start: the id of the block's first row. It is above all ids so far.
      tile: rows scored at once; divides the rows of a device.
      recall: see `nearest`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    device = mesh.abstract_device
    run = functools.partial(
        _local_step,
        axes=mesh.axis_names,
        on_tpu=device is not None and "tpu" in device.device_kind.lower(),
        tile=tile,
        recall=recall,
    )
    split = jax.P(mesh.axis_names)
    return jax.shard_map(
        run, in_specs=(split, split, split, split, split, jax.P()), out_specs=(split, split)
    )(scores, ids, queries, rows, allowed, start)


def _local_step(scores, ids, queries, rows, allowed, start, *, axes, on_tpu, tile, recall):
    """Runs `step` on one device, which has a part of the rows and a part of the queries."""
    k, exact = scores.shape[1], recall == 1
    dtype = jnp.float32 if exact else jnp.bfloat16
    precision = jax.lax.Precision.HIGHEST if exact else None
    queries = jax.lax.all_gather(queries.astype(dtype), axes, tiled=True)
    start += jax.lax.axis_index(axes) * rows.shape[0]

    def score_tile(best: tuple[Array, Array], first):
        tile_rows = jax.lax.dynamic_slice_in_dim(rows, first, tile).astype(dtype)
        tile_scores = jnp.einsum(
            "qd,nd->qn", queries, tile_rows, precision=precision, preferred_element_type=jnp.float32
        )
        if allowed is not None:
            mask = jax.lax.dynamic_slice_in_dim(allowed, first, tile)
            tile_scores = jnp.where(mask, tile_scores, -jnp.inf)
        if exact or not on_tpu:
            values, positions = top_k(tile_scores, min(k, tile), LANES if on_tpu else 1)
        else:
            # Similar rows are often neighbours in the index, so all of the best may be on this
            # device. The bins must reach the recall then, too: only this device's rows count.
            values, positions = jax.lax.approx_max_k(
                tile_scores,
                min(k, tile),
                recall_target=recall,
                reduction_input_size_override=rows.shape[0],
            )
        return _merge(*best, values, start + first + positions), None

    shape = queries.shape[0], k
    empty = jnp.full(shape, -jnp.inf, jnp.float32), jnp.full(shape, NONE, jnp.int32)
    firsts = jnp.arange(0, rows.shape[0], tile, dtype=jnp.int32)
    best, _ = jax.lax.scan(score_tile, jax.lax.pcast(empty, axes, to="varying"), firsts)
    # From all queries of a part of the rows to all rows of a part of the queries, in row order.
    block_scores, block_ids = (jax.lax.all_to_all(array, axes, 0, 1, tiled=True) for array in best)
    return _merge(scores, ids, block_scores, block_ids)


def _merge(scores, ids, more_scores, more_ids):
    """Returns the best of both lists. Of equal scores, those of the first list come first."""
    values, positions = top_k(jnp.concatenate([scores, more_scores], axis=1), scores.shape[1])
    return values, _take(jnp.concatenate([ids, more_ids], axis=1), positions)


def top_k(
    scores: Float[Array, "q n"], k: int, smallest: int = 1
) -> tuple[Float[Array, "q k"], Int[Array, "q k"]]:
    """Computes `jax.lax.top_k`, ties included, in two stages, because it is slow for long rows.

    The row is cut into groups. The k best scores are in the k groups with the largest maxima (of
    equal maxima the first): if one were in another group, each of these k groups would have a score
    that is larger, or equal and further to the front. The groups keep their order, so ties do too.

    Args:
      scores: no NaN.
      k: at most n.
      smallest: the smallest size of a group. The size grows with sqrt(n / k), where both stages
        cost the same.
    """
    count, width = scores.shape
    group = max(smallest, 2 ** round(math.log2(width / k) / 2))
    group = min(group, width & -width)  # a power of two that divides the width
    if group < max(smallest, 2) or width < 2 * k * group:
        return jax.lax.top_k(scores, k)
    groups = scores.reshape(count, -1, group)
    _, chosen = jax.lax.top_k(groups.max(axis=-1), k)
    chosen = jnp.sort(chosen, axis=1)
    values, positions = jax.lax.top_k(_take(groups, chosen[:, :, None]).reshape(count, -1), k)
    return values, _take(chosen, positions // group) * group + positions % group


def _take(array, positions):
    """Takes elements of each row by position. Positions are never out of bounds."""
    return jnp.take_along_axis(array, positions, axis=1, mode="promise_in_bounds")
