"""Plans a search of the index on a TPU pod: compiles its program with the TPU compiler.

    TPU_LIBRARY_PATH=.tpu/libtpu/libtpu.so python -m benchmarks.mining_plan --topology=v5e:16x16

Prints one line of JSON, which benchmarks/mining.py formats for docs/mining.md.
"""

import argparse
import dataclasses
import json
import os

# As in `leon plan`: the program is compiled and never run.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import jax.numpy as jnp
import numpy as np

from leon_jax import sharding
from leon_jax.plan import topology as topologies
from leon_jax.plan.collectives import collectives
from leon_jax.plan.plan import Roofline, sent_bytes
from leon_jax.plan.roofline import Work
from leon_jax.retrieval import device_blocks, exact_search

# bfloat16 products per float32 product at `Precision.HIGHEST`.
PASSES = 6


def plan(topology: str, documents: int, dimensions: int, k: int, recall: float) -> dict:
    """Compiles the search of one batch of queries in a float16 index that is on the devices.

    Returns:
      Memory of a device in bytes: `held` from batch to batch (mainly the index), `working` memory,
      and its `capacity`; its `collectives`; and the minimum seconds for compute, memory and links
      of one `batch` and of `all` documents as queries.

    Raises:
      UserError: the topology is unknown, or the TPU compiler is not installed.
      ValueError: the index is larger than one block.
      JaxRuntimeError: the program does not fit.
    """
    pod = topologies.find(topology)
    mesh = sharding.make_mesh((-1, 1, 1, 1), pod.devices)
    size, tile = device_blocks.block_size(documents, mesh.size, 2 * dimensions, device_blocks.CHIP)
    if size < documents:
        raise ValueError(f"{documents} documents are more than one block on {topology}")
    exact = recall == 1
    queries = device_blocks.CHIP.queries_exact if exact else device_blocks.CHIP.queries
    queries = -(-queries // mesh.size) * mesh.size
    layout = jax.NamedSharding(mesh, jax.P(mesh.axis_names))

    def array(shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=layout)

    with jax.set_mesh(mesh):
        compiled = exact_search.step.lower(
            array((queries, k), jnp.float32),
            array((queries, k), jnp.int32),
            array((queries, dimensions), jnp.float32),
            array((size, dimensions), jnp.float16),
            array((size,), jnp.bool_),
            np.int32(0),
            tile=tile,
            recall=recall,
        ).compile()
    memory, by_kind = compiled.memory_analysis(), collectives(compiled.as_text())
    rows = size // mesh.size
    # Scores do not count as traffic: `working` shows that they are never in device memory.
    work = Work(
        flops=(PASSES if exact else 1) * 2.0 * queries * rows * dimensions,
        hbm_bytes=float(memory.argument_size_in_bytes),
    )
    bound = dataclasses.asdict(Roofline.of(work, sent_bytes(by_kind), pod))
    batches = -(-documents // queries)
    return {
        "recall": recall,
        "devices": mesh.size,
        "queries": queries,
        "rows": rows,
        "tile": tile,
        "held": memory.argument_size_in_bytes,
        "working": memory.temp_size_in_bytes,
        "capacity": pod.chip.hbm * pod.share,
        "collectives": {kind: dataclasses.asdict(count) for kind, count in by_kind.items()},
        "batch": bound,
        "all": {name: batches * seconds for name, seconds in bound.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--topology", default="v5e:16x16")
    parser.add_argument("--documents", type=int, default=340_000_000)
    parser.add_argument("--dimensions", type=int, default=512)
    parser.add_argument("--k", type=int, default=128)
    parser.add_argument("--recall", type=float, default=1.0)
    print(json.dumps(plan(**vars(parser.parse_args()))))


if __name__ == "__main__":
    main()
