"""Arrays as a checkpoint stores them, and their checksums."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32


def is_key(leaf: Any) -> bool:
    """Returns whether an array has random keys, which a checkpoint stores as numbers."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def raw(leaf: jax.Array) -> jax.Array:
    """Returns an array as a checkpoint stores it."""
    return jax.random.key_data(leaf) if is_key(leaf) else leaf


def target(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Returns shape, dtype and sharding of a stored array on the current mesh."""
    mesh = jax.sharding.get_mesh()
    if is_key(leaf):
        shape = jax.eval_shape(jax.random.key_data, leaf).shape
        return jax.ShapeDtypeStruct(shape, np.uint32, sharding=jax.NamedSharding(mesh, jax.P()))
    sharding = jax.NamedSharding(mesh, leaf.sharding.spec if leaf.sharding else jax.P())
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def on_mesh(leaf: jax.ShapeDtypeStruct, mesh: jax.sharding.Mesh) -> jax.ShapeDtypeStruct:
    """Returns a stored array's shape and dtype with its sharding on another mesh."""
    sharding = jax.NamedSharding(mesh, leaf.sharding.spec)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def checksums(arrays: dict[str, Array]) -> dict[str, int]:
    """Returns the sum of each array's words modulo 2^32, which is independent of the sharding."""
    return {name: int(value) for name, value in jax.device_get(_word_sums(arrays)).items()}


@jax.jit
def _word_sums(arrays: dict[str, Array]) -> dict[str, UInt32[Array, ""]]:
    def words(array: Array) -> UInt32[Array, ""]:
        bits = array.dtype.itemsize * 8
        unsigned = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{bits}"))
        return unsigned.astype(jnp.uint32).sum(dtype=jnp.uint32)

    return jax.tree.map(words, arrays)
