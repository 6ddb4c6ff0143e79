"""One replica of the state is read, and sent to the others.

The mesh axis `data` does not split the state: every index of it holds a whole copy, a *replica*. So
the processes of one replica read a checkpoint, and the others receive it over the links of the
mesh. A bucket is read once, however many slices there are.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array

_AXIS = "data"


def on_all_processes(condition: bool) -> bool:
    """Returns whether `condition` holds on all processes; a collective operation."""
    if jax.process_count() == 1:
        return condition
    return bool(multihost_utils.process_allgather(np.array(condition)).all())


def reading_mesh(mesh: jax.sharding.Mesh) -> jax.sharding.Mesh:
    """Returns the mesh of the first replica; all of `mesh` if all processes are part of it."""
    replica = jax.sharding.Mesh(mesh.devices[:1], mesh.axis_names, axis_types=mesh.axis_types)
    return replica if _processes(replica) != _processes(mesh) else mesh


def is_reader(mesh: jax.sharding.Mesh) -> bool:
    """Returns whether this process has devices of a mesh."""
    return jax.process_index() in _processes(mesh)


def send(
    arrays: Mapping[str, Array], targets: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, Array]:
    """Sends the arrays of the first replica to all; a collective operation.

    The other replicas add zeros, in integers of the same width, so that every bit arrives. (In
    floating point, -0.0 + 0.0 is 0.0.) One array is sent at a time: meanwhile a device holds its
    part of it three times.

    Args:
      arrays: arrays on `reading_mesh`, which are deleted; empty on processes that are not readers.
      targets: shapes, dtypes and shardings of the arrays on the current mesh, all of it.
    """
    sent = {}
    for name, target in targets.items():
        total = _stacked(arrays.get(name), target)
        sent[name] = jax.block_until_ready(_sum(total, target.dtype, target.sharding))
    return sent


def _stacked(array: Array | None, target: jax.ShapeDtypeStruct) -> Array:
    """Returns the words of an array with a leading axis of replicas, all but the first zeros."""
    mesh = jax.sharding.get_mesh()
    sharding = jax.NamedSharding(mesh, jax.P(_AXIS, *target.sharding.spec))
    shape = (mesh.shape[_AXIS], *target.shape)
    dtype = jnp.dtype(f"uint{target.dtype.itemsize * 8}")
    pieces: dict[jax.Device, Array] = {}
    if array is not None:
        with jax.set_mesh(reading_mesh(mesh)):
            words = _words(array, dtype)
        pieces = {shard.device: shard.data for shard in words.addressable_shards}
        array.delete()
    zeros = np.zeros(sharding.shard_shape(shape), dtype)
    return jax.make_array_from_single_device_arrays(
        shape,
        sharding,
        [
            pieces[device] if device in pieces else jax.device_put(zeros, device)
            for device in sharding.addressable_devices
        ],
        dtype=dtype,
    )


@functools.partial(jax.jit, static_argnames="dtype")
def _words(array: Array, dtype: np.dtype) -> Array:
    return jax.lax.bitcast_convert_type(array, dtype)[None]


@functools.partial(jax.jit, static_argnames=("dtype", "sharding"))
def _sum(words: Array, dtype: np.dtype, sharding: jax.NamedSharding) -> Array:
    array = jax.lax.bitcast_convert_type(words.sum(0, dtype=words.dtype), dtype)
    return jax.reshard(array, sharding)


def _processes(mesh: jax.sharding.Mesh) -> set[int]:
    return {device.process_index for device in mesh.devices.flat}
