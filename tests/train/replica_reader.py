"""One process of several that restore a checkpoint, and save another one.

`python -m tests.train.replica_reader CHECKPOINTS OUT ADDRESS PROCESSES PROCESS` restores the newest
intact checkpoint on a mesh with two replicas, writes the state as host PROCESS sees it to
OUT/PROCESS.npz, and saves step 9.
"""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from leon_jax import sharding, storage, weight_files
from leon_jax.train import stored_arrays
from leon_jax.train.checkpoint import Checkpoints
from leon_jax.train.state import TrainState

# Negative zeros, which a sum with zeros would lose, and numbers that are not finite.
SPECIAL = np.array([-0.0, 0.0, np.nan, np.inf, -np.inf, -1e-45, 1.0, -0.0], np.float32)


class Weights(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        large = jax.random.normal(rngs.params(), (64, 500)).at[:, :8].set(SPECIAL)
        self.large = nnx.Param(jax.reshard(large, jax.P("fsdp")))
        self.half = nnx.Param(jnp.asarray(SPECIAL[:7], jnp.bfloat16))


def state(step: int) -> TrainState:
    model = Weights(rngs=nnx.Rngs(step))
    return TrainState(jnp.int32(step), model, {"count": jnp.int32(-step)}, jax.random.key(step))


def words(tree: TrainState) -> dict[str, np.ndarray]:
    """Returns the words of all arrays by name."""
    arrays = {name: stored_arrays.raw(leaf) for name, leaf in weight_files.flatten(tree).items()}
    return {
        name: array.view(f"uint{array.dtype.itemsize * 8}")
        for name, array in sharding.fetch(arrays).items()
    }


if __name__ == "__main__":
    directory, out, address, *numbers = sys.argv[1:]
    processes, process = map(int, numbers)
    jax.distributed.initialize(address, processes, process)
    with jax.set_mesh(sharding.make_mesh((2, -1, 1, 1))):
        checkpoints = Checkpoints(storage.path(directory))
        abstract = jax.eval_shape(lambda: state(0))
        _, restored, data = checkpoints.restore(abstract)
        np.savez(pathlib.Path(out, f"{process}.npz"), **words(restored), data=data["0"])
        checkpoints.save(jax.jit(lambda: state(9))(), data)
        checkpoints.close()
