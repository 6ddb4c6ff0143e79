"""The mesh, and the rules that map logical axis names to mesh axes.

Model code uses logical axis names (`batch`, `embed`, `heads`, ...). `RULES` maps each of them to
the mesh axes that it is split over, so the same model code runs on one CPU device or on a pod.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils

AXES = ("data", "fsdp", "context", "tensor")

# Weights are split over `fsdp` on the embedding axis, and over `tensor` on the widest axis.
# Activations are split over (`data`, `fsdp`) on the batch axis, and over `tensor` on the heads or
# the hidden layer.
RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "length": "context",
    "embed": None,
    "heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "vocab": "tensor",
    "layers": None,
    "weight_embed": "fsdp",
}


def spec(*names: str | None) -> jax.P:
    """Returns the PartitionSpec of an array with these logical axis names (None: not split).

    Raises:
      KeyError: a name is not in `RULES`.
    """
    return jax.P(*(None if name is None else RULES[name] for name in names))


def make_mesh(
    shape: Sequence[int] = (-1, 1, 1, 1),
    devices: Sequence[jax.Device] | None = None,
    slices: int = 1,
) -> jax.sharding.Mesh:
    """Creates an explicit-mode mesh over `AXES`.

    Args:
      shape: sizes of (data, fsdp, context, tensor). One of them may be -1: all remaining devices.
      devices: devices of the mesh; None: all devices.
      slices: number of TPU slices (elsewhere processes), which slower links connect. Only the
        `data` axis crosses slices, so only gradients do, once a step.

    Raises:
      ValueError: the product of the sizes is not the number of devices, `data` is not a multiple of
        `slices`, or the devices have another number of slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = list(shape)
    invalid = any(size < 1 and size != -1 for size in sizes)
    if invalid or len(sizes) != len(AXES) or sizes.count(-1) > 1:
        raise ValueError(
            f"mesh shape {tuple(shape)} must have {len(AXES)} positive sizes {AXES}, at most one -1"
        )
    if -1 in sizes:
        sizes[sizes.index(-1)] = len(devices) // math.prod(size for size in sizes if size != -1)
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"mesh {dict(zip(AXES, sizes, strict=True))} does not cover {len(devices)} devices"
        )
    kinds = (jax.sharding.AxisType.Explicit,) * len(AXES)
    if slices > 1:
        if sizes[0] % slices:
            raise ValueError(f"data is {sizes[0]}; it must be a multiple of the {slices} slices")
        # Devices other than TPUs, and all devices of a single slice, have slice_index 0.
        by_process = len({getattr(device, "slice_index", 0) for device in devices}) == 1
        try:
            grid = mesh_utils.create_hybrid_device_mesh(
                (sizes[0] // slices, *sizes[1:]),
                (slices, 1, 1, 1),
                devices,
                process_is_granule=by_process,
                allow_split_physical_axes=True,
            )
        except ValueError as error:
            raise ValueError(
                f"slices is {slices}; it must be the number of TPU slices or, with one slice, the "
                "number of processes"
            ) from error
        return jax.sharding.Mesh(grid, AXES, axis_types=kinds)
    # Mesh neighbours are neighbours on the torus if possible; otherwise a torus axis is split.
    grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return jax.sharding.Mesh(grid, AXES, axis_types=kinds)


def current_mesh() -> jax.sharding.Mesh:
    """Returns the current mesh or, if none is set, a mesh over all devices."""
    mesh = jax.sharding.get_mesh()
    return make_mesh() if mesh.empty else mesh


def batch_sharding() -> jax.NamedSharding:
    """Returns the sharding of a batch on the current mesh: only the first axis is split."""
    return jax.NamedSharding(jax.sharding.get_mesh(), spec("batch"))


def fetch[Tree](arrays: Tree) -> Tree:
    """Copies a tree of arrays to the host of every process. All processes must call it."""

    def replicate(array: Any) -> Any:
        if array.is_fully_addressable or array.is_fully_replicated:
            return array
        return jax.reshard(array, jax.P())

    return jax.device_get(jax.tree.map(replicate, arrays))
