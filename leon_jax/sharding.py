"""Logical axis names, the table that maps them to the mesh, and the mesh itself.

Model code names what an axis *is* (`batch`, `embed`, `heads`, ...); `RULES` says which mesh axes
it is split over. The same model code therefore runs on one CPU device or on a pod.
"""

import math
from collections.abc import Sequence

import jax
import numpy as np

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
    shape: Sequence[int] = (-1, 1, 1, 1), devices: Sequence[jax.Device] | None = None
) -> jax.sharding.Mesh:
    """An explicit-mode mesh over `AXES`.

    Args:
      shape: sizes of (data, fsdp, context, tensor); one of them may be -1, "all that is left".
      devices: which devices to use; all of them by default.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = list(shape)
    if len(sizes) != len(AXES) or sizes.count(-1) > 1:
        raise ValueError(
            f"mesh shape {tuple(shape)} must give {len(AXES)} sizes {AXES}, at most one -1"
        )
    if -1 in sizes:
        sizes[sizes.index(-1)] = len(devices) // math.prod(size for size in sizes if size != -1)
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"mesh {dict(zip(AXES, sizes, strict=True))} does not cover {len(devices)} devices"
        )
    kinds = (jax.sharding.AxisType.Explicit,) * len(AXES)
    return jax.make_mesh(tuple(sizes), AXES, axis_types=kinds, devices=np.array(devices).tolist())


def batch_sharding() -> jax.NamedSharding:
    """How a host batch is laid out on the current mesh: its first axis split, the rest whole."""
    return jax.NamedSharding(jax.sharding.get_mesh(), spec("batch"))
