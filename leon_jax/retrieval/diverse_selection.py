"""The greedy choice of `leon_jax.retrieval.selection.diverse` for many queries, on all devices.

The queries are split over the devices. Each compares the candidates of its own queries with each
other, which takes their rows from the bank: every process reads those of its own devices only.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32

from leon_jax import sharding
from leon_jax.retrieval.device_blocks import next_power, put
from leon_jax.retrieval.mining import NONE
from leon_jax.retrieval.vector_index import VectorIndex
from leon_jax.sharding import current_mesh

# Queries of a device at once: the rows of 128 candidates, 512 wide, are 64 MB in float32.
QUERIES = 256


def choose(
    ids: Int32[np.ndarray, "q c"],
    bank: VectorIndex,
    k: int,
    near_copy_chosen: float,
    asking: Sequence[tuple[VectorIndex, Float[np.ndarray, "q d"], float]] = (),
    sources: Int32[np.ndarray, "q c"] | None = None,
) -> Int32[np.ndarray, "q k"]:
    """Positions (into `ids`) of the best k candidates of each query, none of them near copies.

    Args:
      ids: candidates of each query, best first; -1 is none.
      bank: has their unit rows.
      k: how many to choose at most.
      near_copy_chosen: a candidate that scores above this against a chosen document is skipped.
      asking: rows of the candidates in a bank, a row for each query, and a limit: a candidate that
        scores above it against that row is skipped too.
      sources: a number for the source of each candidate; sources then take turns.

    Returns:
      Positions in the order of choice; -1 where there are fewer.
    """
    mesh = current_mesh()
    layout = jax.NamedSharding(mesh, jax.P(mesh.axis_names))
    sources = np.zeros(ids.shape, np.int32) if sources is None else sources
    size = min(QUERIES, next_power(-(-len(ids) // mesh.size))) * mesh.size
    places = np.full((len(ids), k), NONE, np.int32)
    with jax.set_mesh(mesh):
        for start in range(0, len(ids), size):
            some = slice(start, start + size)
            # Candidates that are added to fill the array up are none.
            arrays = [put(layout, size, array[some], NONE) for array in (ids, sources)]
            rows = _rows(bank, layout, size, ids[some])
            copies = [
                (
                    rows if other is bank else _rows(other, layout, size, ids[some]),
                    put(layout, size, asked[some].astype(np.float32), 0),
                    np.float32(limit),
                )
                for other, asked, limit in asking
            ]
            chosen = _choose(*arrays, rows, np.float32(near_copy_chosen), copies, k=k)
            places[some] = sharding.fetch(chosen)[: len(ids[some])]
    return places


def _rows(bank: VectorIndex, layout: jax.NamedSharding, size: int, ids: np.ndarray) -> jax.Array:
    """The rows of the candidates of each query, zeros where there is none."""

    def local(index: Any) -> np.ndarray:
        low, high, _ = index[0].indices(size)
        rows = np.zeros((high - low, ids.shape[1], bank.dimensions), np.float32)
        own = ids[low:high]
        rows[: len(own)] = bank.take(own)
        return rows

    return jax.make_array_from_callback((size, ids.shape[1], bank.dimensions), layout, local)


@functools.partial(jax.jit, static_argnames="k")
def _choose(ids, sources, rows, near_chosen, copies, *, k):
    split = jax.P(jax.sharding.get_abstract_mesh().axis_names)
    return jax.shard_map(
        functools.partial(_greedy, k=k),
        in_specs=(split, split, split, jax.P(), [(split, split, jax.P())] * len(copies)),
        out_specs=split,
    )(ids, sources, rows, near_chosen, copies)


def _greedy(ids, sources, rows, near_chosen, copies, *, k):
    """One device's queries; every step of the scan chooses one candidate of each."""
    compare = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    alike = compare("qcd,qed->qce", rows, rows) > near_chosen

    def step(state: tuple[Bool[Array, "q c"], Int[Array, "q c"]], _):
        left, taken = state  # candidates; how many were chosen from the source of each
        fewest = jnp.where(left, taken, k).min(axis=1, keepdims=True)
        best = (left & (taken == fewest)).argmax(axis=1)
        copies = jnp.take_along_axis(alike, best[:, None, None], axis=1)[:, 0]
        itself = jnp.arange(ids.shape[1]) == best[:, None]
        place = jnp.where(left.any(axis=1), best, NONE)
        taken += sources == jnp.take_along_axis(sources, best[:, None], axis=1)
        return (left & ~copies & ~itself, taken), place

    left = ids != NONE
    for candidates, asked, limit in copies:
        left &= compare("qcd,qd->qc", candidates, asked) <= limit
    _, places = jax.lax.scan(step, (left, jnp.zeros_like(sources)), length=k)
    return places.T.astype(jnp.int32)
