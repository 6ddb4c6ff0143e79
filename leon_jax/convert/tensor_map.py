"""Maps the arrays of a module to tensors of a foreign checkpoint, in both directions."""

import dataclasses
from collections.abc import Iterable, Mapping

import numpy as np

from leon_jax.config import UserError

# PyTorch's convolutions are [out, in, height, width], ours are [height, width, in, out].
CONVOLUTION = (2, 3, 1, 0)


@dataclasses.dataclass(frozen=True)
class Entry:
    """An array of the module and the tensors that it consists of.

    Attributes:
      ours: name of the array (see `leon_jax.weight_files`).
      theirs: names of the tensors. Several are concatenated along the last axis of the array.
      axes: axes of a tensor in the order of the array's axes; None: the same order.
    """

    ours: str
    theirs: tuple[str, ...]
    axes: tuple[int, ...] | None = None

    def to_ours(self, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
        """Returns the array of the tensors in `tensors`, which has at least those of `theirs`.

        Raises:
          UserError: the tensors have different numbers of axes.
        """
        parts = []
        for name in self.theirs:
            tensor = tensors[name]
            if self.axes is not None and tensor.ndim != len(self.axes):
                raise UserError(
                    f"the tensor {name} has the shape {tensor.shape}; it must have "
                    f"{len(self.axes)} axes"
                )
            parts.append(tensor if self.axes is None else tensor.transpose(self.axes))
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)

    def to_theirs(self, array: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the tensors of an array by name."""
        parts = np.split(array, len(self.theirs), axis=-1)
        if self.axes is not None:
            parts = [part.transpose(np.argsort(self.axes)) for part in parts]
        return dict(zip(self.theirs, parts, strict=True))


def to_ours(
    entries: Iterable[Entry],
    tensors: Mapping[str, np.ndarray],
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, np.ndarray]:
    """Returns the arrays of a module.

    Args:
      entries: one entry for each array of the module.
      tensors: the foreign tensors by name, all of which are used.
      shapes: shape of each array of the module.

    Raises:
      UserError: tensors are missing, unknown or misshaped, or have NaN or infinite numbers; the
        message names them.
    """
    entries = list(entries)
    expected = {name for entry in entries for name in entry.theirs}
    if missing := sorted(expected - set(tensors)):
        raise UserError(f"the checkpoint lacks {listed(missing)}")
    if unknown := sorted(set(tensors) - expected):
        raise UserError(f"the checkpoint has unknown tensors: {listed(unknown)}")
    arrays = {}
    for entry in entries:
        array, shape = entry.to_ours(tensors), shapes[entry.ours]
        if array.shape != shape:
            shapes_text = " and ".join(f"{name} {tensors[name].shape}" for name in entry.theirs)
            raise UserError(
                f"a tensor has another shape than the configuration says: {shapes_text} would give "
                f"{array.shape} instead of {shape}"
            )
        if not np.isfinite(array.astype(np.float32)).all():
            raise UserError(f"{' or '.join(entry.theirs)} has NaN or infinite numbers")
        arrays[entry.ours] = array
    return arrays


def to_theirs(entries: Iterable[Entry], arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the foreign tensors of the arrays of a module."""
    tensors: dict[str, np.ndarray] = {}
    for entry in entries:
        tensors |= entry.to_theirs(arrays[entry.ours])
    return tensors


def listed(names: list[str], most: int = 8) -> str:
    """Returns the first names, and how many follow."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
