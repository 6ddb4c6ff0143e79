"""Reads and writes safetensors files. Equal contents give equal bytes.

    8 bytes      length of the header, little-endian
    header       JSON: `__metadata__`, then dtype, shape and data_offsets of each tensor;
                 padded with spaces to a multiple of 8
    data         the tensors in sequence, little-endian, C order

The safetensors library writes the metadata in random order. Here metadata and tensors are sorted by
name. Tensors of wider types come first, so that each tensor is aligned to its type.
"""

import dataclasses
import json
import math
import mmap
import pathlib
from collections.abc import Callable, Iterator, Mapping

import jax.numpy as jnp
import numpy as np

from leon_jax import storage
from leon_jax.config import UserError

_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
_CODES = {name: code for code, name in _DTYPES.items()}
_METADATA = "__metadata__"


@dataclasses.dataclass(frozen=True)
class PartedArray:
    """A tensor that is made part by part while it is written, so that it is never in memory.

    Attributes:
      shape, dtype: those of the whole tensor.
      parts: makes its parts in order. The bytes of the tensor are those of its parts.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    parts: Callable[[], Iterator[np.ndarray]]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


def write(
    path: pathlib.Path,
    arrays: Mapping[str, np.ndarray | PartedArray],
    metadata: Mapping[str, str],
) -> None:
    """Writes a file atomically, and creates its parent folders.

    Args:
      path: the file to write or replace.
      arrays: tensors by name, of any memory layout.
      metadata: strings by key, for the header.

    Raises:
      ValueError: the parts of a tensor have other sizes than the tensor.
    """
    names = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    header: dict[str, object] = {_METADATA: dict(sorted(metadata.items()))}
    end = 0
    for name in names:
        array = arrays[name]
        start, end = end, end + array.nbytes
        header[name] = {
            "dtype": _CODES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    storage.make_folder(path.parent)
    with storage.writing(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            written = sum(file.write(part.data) for part in contents(arrays[name]))
            if written != arrays[name].nbytes:
                raise ValueError(
                    f"{name} has parts of {written} bytes; it needs {arrays[name].nbytes}"
                )


def read_metadata(path: pathlib.Path) -> dict[str, str]:
    """Reads the metadata in the header of a file.

    Raises:
      UserError: the file cannot be read, or it is not a whole safetensors file.
    """
    return read(path)[0]


def read(path: pathlib.Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Reads the metadata, and maps the tensors from the file, by name, read-only.

    A tensor uses memory only when it is read. Copy a tensor that must outlive the file.

    Raises:
      UserError: the file cannot be read, or it is not a whole safetensors file.
    """
    try:
        with storage.local(path).open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # an empty file
        raise UserError(f"{path} is not a whole safetensors file; it is empty") from error
    try:
        begin = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:begin])
        metadata = header.pop(_METADATA, {})
        arrays, end = {}, begin
        for name, entry in header.items():
            dtype, shape = jnp.dtype(_DTYPES[entry["dtype"]]), tuple(entry["shape"])
            start, stop = (begin + offset for offset in entry["data_offsets"])
            if stop - start != math.prod(shape) * dtype.itemsize:
                raise ValueError(name)
            arrays[name] = np.ndarray(shape, dtype, data, start)
            end = max(end, stop)
        if end != len(data):
            raise ValueError("length")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not a whole safetensors file; its header does not match its length"
        ) from error
    return metadata, arrays


def contents(array: np.ndarray | PartedArray) -> Iterator[np.ndarray]:
    """Yields the bytes of a tensor as uint8[bytes], in one part or in several."""
    yield from map(content, array.parts() if isinstance(array, PartedArray) else (array,))


def content(array: np.ndarray) -> np.ndarray:
    """Returns the bytes of a tensor as uint8[bytes], without a copy if possible."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
