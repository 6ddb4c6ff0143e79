"""Searches an index on meshes of eight devices; test_exact_search.py runs it.

One process has all eight devices, or several processes share them (`launch/local.py` passes the
flags).
"""

import argparse
import os

if "device_count" not in os.environ.get("XLA_FLAGS", ""):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    os.environ["XLA_FLAGS"] = flags.strip()
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np

from leon_jax import sharding
from leon_jax.retrieval import device_blocks
from leon_jax.retrieval.neighbour_selection import SelectionConfig, find_neighbours, select_diverse
from leon_jax.retrieval.vector_index import VectorIndex

parser = argparse.ArgumentParser()
parser.add_argument("--distributed", action="store_true")
parser.add_argument("--coordinator")
parser.add_argument("--processes", type=int)
parser.add_argument("--process_id", type=int, default=0)
arguments = parser.parse_args()
if arguments.distributed:
    jax.distributed.initialize(arguments.coordinator, arguments.processes, arguments.process_id)

device_blocks.CPU = device_blocks.BlockSizes(
    tile=128, queries=16, queries_exact=16, block=256 * 8 * 2
)
MESHES = [(8, 1, 1, 1), (2, 2, 1, 2)]

rng = np.random.default_rng(0)
rows = rng.integers(-2, 3, (5000, 8)).astype(np.float16)
queries = rng.integers(-2, 3, (37, 8)).astype(np.float32)
keep = rng.random(5000) < 0.7
exclude = rng.integers(-1, 5000, 37).astype(np.int32)
exact = queries.astype(np.float64) @ rows.astype(np.float64).T
exact[:, ~keep] = -np.inf
exact[exclude >= 0, exclude[exclude >= 0]] = -np.inf
best = np.argsort(-exact, axis=1, kind="stable")[:, :30]

unit = rng.normal(size=(900, 8)) * [4, 4, 1, 1, 1, 1, 1, 1]  # so that there are near copies
unit = (unit / np.linalg.norm(unit, axis=1, keepdims=True)).astype(np.float16)
unit_queries = unit[:37].astype(np.float32)
config = SelectionConfig(
    5, 40, near_copy_query=0.98, near_copy_document=0.9, alternate_sources=True
)
sources = rng.integers(0, 3, 900)

for shape in MESHES:
    with jax.set_mesh(sharding.make_mesh(shape)):
        read = []

        class CountingIndex(VectorIndex):
            def rows(self, start, stop, read=read):
                read.append(stop - start)
                return super().rows(start, stop)

        scores, ids = CountingIndex([rows[:1000], rows[1000:]]).search(
            queries, 30, exclude=exclude, keep=keep
        )
        np.testing.assert_array_equal(ids, best)
        np.testing.assert_array_equal(scores, np.take_along_axis(exact, best, axis=1))
        # Each process reads its part of the rows.
        assert sum(read) * jax.process_count() <= 5000 + 2 * 8 * 256, sum(read)
        assert len(read) > jax.local_device_count(), "the index must have several blocks"

        query_ids, index = np.arange(37), VectorIndex([unit])
        neighbours, _ = find_neighbours(
            unit_queries, index, config,
            documents=unit_queries, query_ids=query_ids, sources=sources,
        )  # fmt: skip
        _, candidates = index.search(unit_queries, 40, exclude=query_ids)
        for row, ids in enumerate(candidates):
            chosen = select_diverse(
                ids, index.take(ids), 5, config, unit_queries[row], source_of=sources.__getitem__
            )
            expected = [*ids[chosen], -1, -1, -1, -1, -1][:5]
            assert neighbours[row].tolist() == expected, (row, neighbours[row], expected)
    if arguments.process_id == 0:
        print(shape, "equal", flush=True)
