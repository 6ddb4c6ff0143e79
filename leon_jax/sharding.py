"""Logical axis names, the table that maps them to the mesh, and the mesh itself.

Model code names what an axis *is* (`batch`, `embed`, `heads`, ...); `RULES` says which mesh axes
it is split over. The same model code therefore runs on one CPU device or on a pod.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils

AXES = ("data", "fsdp", "context", "tensor")

# Weights are split over `fsdp` on their embedding axis and over `tensor` on their widest axis;
# activations over (`data`, `fsdp`) on the batch and over `tensor` on heads or the hidden layer.
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
    """The PartitionSpec of an array whose axes have these logical names (None: not split).

    Raises:
      KeyError: a name is not in `RULES`.
    """
    return jax.P(*(None if name is None else RULES[name] for name in names))


def make_mesh(
    shape: Sequence[int] = (-1, 1, 1, 1),
    devices: Sequence[jax.Device] | None = None,
    slices: int = 1,
) -> jax.sharding.Mesh:
    """An explicit-mode mesh over `AXES`.

    Args:
      shape: sizes of (data, fsdp, context, tensor); one of them may be -1, "all that is left".
      devices: which devices to use; all of them by default.
      slices: islands of fast links (TPU slices; elsewhere processes) that slower ones connect.
        Only `data` reaches across them, so only gradients do, once a step.

    Raises:
      ValueError: the sizes do not multiply to the number of devices, `data` is no multiple of
        `slices`, or the devices are not so many slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = list(shape)
    wrong = any(size < 1 and size != -1 for size in sizes)
    if wrong or len(sizes) != len(AXES) or sizes.count(-1) > 1:
        raise ValueError(
            f"mesh shape {tuple(shape)} must give {len(AXES)} positive sizes {AXES}, at most one -1"
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
        within, across = (sizes[0] // slices, *sizes[1:]), (slices, 1, 1, 1)
        # Devices that are no TPUs, and a single slice, all say slice 0.
        by_process = len({getattr(device, "slice_index", 0) for device in devices}) == 1
        try:
            grid = mesh_utils.create_hybrid_device_mesh(
                within,
                across,
                devices,
                process_is_granule=by_process,
                allow_split_physical_axes=True,
            )
        except ValueError as error:
            raise ValueError(
                f"slices is {slices}; it must be the number of TPU slices, or of processes where "
                "there is one slice"
            ) from error
        return jax.sharding.Mesh(grid, AXES, axis_types=kinds)
    # Neighbours on the torus where they can be; an axis of it may be split where they cannot.
    grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return jax.sharding.Mesh(grid, AXES, axis_types=kinds)


def current_mesh() -> jax.sharding.Mesh:
    """The mesh that is set; one over all devices if none is."""
    mesh = jax.sharding.get_mesh()
    return make_mesh() if mesh.empty else mesh


def batch_sharding() -> jax.NamedSharding:
    """How a host batch is laid out on the current mesh: its first axis split, the rest whole."""
    return jax.NamedSharding(jax.sharding.get_mesh(), spec("batch"))


def fetch[Tree](arrays: Tree) -> Tree:
    """Host copies of a tree of arrays, whole ones on every process; all processes must call it."""

    def whole(array: Any) -> Any:
        if array.is_fully_addressable or array.is_fully_replicated:
            return array
        return jax.reshard(array, jax.P())

    return jax.device_get(jax.tree.map(whole, arrays))
