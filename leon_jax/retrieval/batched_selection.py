"""`leon_jax.retrieval.neighbour_selection.select_diverse` for many queries, on all devices.

The queries are split over the devices. Each device compares the candidates of its queries with
each other. For that every process reads the candidates' rows of its local devices from the index.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32

from leon_jax import sharding
from leon_jax.retrieval.device_blocks import next_power_of_two, put_padded
from leon_jax.retrieval.exact_search import NONE
from leon_jax.retrieval.vector_index import VectorIndex
from leon_jax.sharding import current_mesh

# Queries of a device at once. The rows of 128 candidates, 512 wide, are 64 MB in float32.
QUERIES = 256


def select_diverse_batch(
    ids: Int32[np.ndarray, "q c"],
    index: VectorIndex,
    k: int,
    near_copy_chosen: float,
    comparisons: Sequence[tuple[VectorIndex, Float[np.ndarray, "q d"], float]] = (),
    sources: Int32[np.ndarray, "q c"] | None = None,
) -> Int32[np.ndarray, "q k"]:
    """Returns the positions (in `ids`) of the best k candidates of each query without near copies.

    Args:
      ids: candidates of each query, best first; -1 for none.
      index: the candidates' unit rows.
      k: the largest number of candidates to choose.
      near_copy_chosen: a candidate is skipped if its score against a chosen one is above this.
      comparisons: an index with rows of the candidates, a row for each query, and a limit. A
        candidate is skipped if its score against the query's row is above the limit.
      sources: a number for the source of each candidate; the sources then take turns. None: the
        sources do not matter.

    Returns:
      Positions in the order of choice; -1 where there are fewer than k.
    """
    mesh = current_mesh()
    layout = jax.NamedSharding(mesh, jax.P(mesh.axis_names))
    sources = np.zeros(ids.shape, np.int32) if sources is None else sources
    size = min(QUERIES, next_power_of_two(-(-len(ids) // mesh.size))) * mesh.size
    positions = np.full((len(ids), k), NONE, np.int32)
    with jax.set_mesh(mesh):
        for start in range(0, len(ids), size):
            batch = slice(start, start + size)
            # The padding has no candidates.
            arrays = [put_padded(layout, size, array[batch], NONE) for array in (ids, sources)]
            rows = _candidate_rows(index, layout, size, ids[batch])
            limits = [
                (
                    rows if other is index else _candidate_rows(other, layout, size, ids[batch]),
                    put_padded(layout, size, queries[batch].astype(np.float32), 0),
                    np.float32(limit),
                )
                for other, queries, limit in comparisons
            ]
            chosen = _choose(*arrays, rows, np.float32(near_copy_chosen), limits, k=k)
            positions[batch] = sharding.fetch(chosen)[: len(ids[batch])]
    return positions


def _candidate_rows(
    index: VectorIndex, layout: jax.NamedSharding, size: int, ids: np.ndarray
) -> jax.Array:
    """Returns the rows of the candidates of each query, zeros where there is no candidate."""

    def read_shard(slices: Any) -> np.ndarray:
        low, high, _ = slices[0].indices(size)
        rows = np.zeros((high - low, ids.shape[1], index.dimensions), np.float32)
        local_ids = ids[low:high]
        rows[: len(local_ids)] = index.take(local_ids)
        return rows

    return jax.make_array_from_callback((size, ids.shape[1], index.dimensions), layout, read_shard)


@functools.partial(jax.jit, static_argnames="k")
def _choose(ids, sources, rows, near_chosen, limits, *, k):
    split = jax.P(jax.sharding.get_abstract_mesh().axis_names)
    return jax.shard_map(
        functools.partial(_greedy, k=k),
        in_specs=(split, split, split, jax.P(), [(split, split, jax.P())] * len(limits)),
        out_specs=split,
    )(ids, sources, rows, near_chosen, limits)


def _greedy(ids, sources, rows, near_chosen, limits, *, k):
    """Chooses for the queries of one device, one candidate of each query in each scan step."""
    compare = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    alike = compare("qcd,qed->qce", rows, rows) > near_chosen

    def step(state: tuple[Bool[Array, "q c"], Int[Array, "q c"]], _):
        remaining, chosen_of_source = state
        fewest = jnp.where(remaining, chosen_of_source, k).min(axis=1, keepdims=True)
        best = (remaining & (chosen_of_source == fewest)).argmax(axis=1)
        copies = jnp.take_along_axis(alike, best[:, None, None], axis=1)[:, 0]
        is_best = jnp.arange(ids.shape[1]) == best[:, None]
        position = jnp.where(remaining.any(axis=1), best, NONE)
        chosen_of_source += sources == jnp.take_along_axis(sources, best[:, None], axis=1)
        return (remaining & ~copies & ~is_best, chosen_of_source), position

    remaining = ids != NONE
    for candidates, queries, limit in limits:
        remaining &= compare("qcd,qd->qc", candidates, queries) <= limit
    _, positions = jax.lax.scan(step, (remaining, jnp.zeros_like(sources)), length=k)
    return positions.T.astype(jnp.int32)
