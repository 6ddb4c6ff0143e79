"""Reads and writes files of `torch.save` without PyTorch. Nothing in a file that is read runs.

A pickle can name any function and ask for its call. This reader knows the names that build tensors
and plain containers. Every other name becomes an empty placeholder, which is never imported or
called. Lightning's checkpoints, for example, name callbacks and configurations beside the weights.

Two formats are read: a zip archive with `data.pkl` and one member for each storage (PyTorch 1.6 and
later), and a sequence of pickles that the storages follow (before). The first one is written.
Tensors are mapped from the file, so they use memory only when they are read.
"""

import dataclasses
import io
import math
import mmap
import pathlib
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import IO, Any

import jax.numpy as jnp
import numpy as np

from leon_jax import safetensors_format, storage
from leon_jax.config import UserError

_DTYPES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16", "LongStorage": "int64", "IntStorage": "int32",
    "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8", "BoolStorage": "bool",
}  # fmt: skip
# The first number of a file in the older format.
_MAGIC = 0x1950A86A20F9469CFC6C
# Keys under which programs store the weights, the averaged ones first.
_ENVELOPES = ("ema", "state_dict", "model", "module")


class Placeholder:
    """Stands for an object of an unknown class. It ignores everything that is done to it."""

    def __new__(cls, *args, **kwargs):
        del args, kwargs
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        del args, kwargs

    def __call__(self, *args, **kwargs):
        del args, kwargs
        return Placeholder()

    def __setstate__(self, state):
        del state

    def __setitem__(self, key, value):
        del key, value

    def append(self, item):
        """Ignores the item of a list."""
        del item

    def extend(self, items):
        """Ignores the items of a list."""
        del items

    def add(self, item):
        """Ignores the item of a set."""
        del item


class _Dict(dict):
    """A dictionary that ignores attributes, such as `_metadata` of a module's state."""

    def __setstate__(self, state):
        del state


@dataclasses.dataclass(frozen=True)
class _Storage:
    """The numbers of one or more tensors.

    Attributes:
      dtype: their dtype.
      buffer: the bytes, or None while the file is scanned for their positions.
      offset: position of the first number, in bytes.
      size: how many numbers there are.
    """

    dtype: np.dtype
    buffer: Any
    offset: int
    size: int


def read(path: pathlib.Path) -> Any:
    """Reads a file of `torch.save`.

    Returns:
      Plain containers and values, with read-only arrays for tensors and `Placeholder` for objects
      of other classes.

    Raises:
      UserError: the file is missing or damaged, is a TorchScript archive, or has no known format.
    """
    path = pathlib.Path(storage.local(storage.path(path)))
    try:
        with path.open("rb") as file:
            if zipfile.is_zipfile(file):
                return _read_archive(path, file)
            file.seek(0)
            return _read_sequence(path, file)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (
        pickle.UnpicklingError, zipfile.BadZipFile, EOFError, ValueError, TypeError, KeyError,
        AttributeError, IndexError, struct.error, RecursionError, MemoryError, OverflowError,
        NotImplementedError,
    ) as error:  # fmt: skip
        raise UserError(f"{path} is damaged, or it is no file of torch.save: {error}") from error


def read_weights(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Reads the tensors of a checkpoint by name.

    They may be in the file itself, or under `ema`, `state_dict`, `model` or `module`, in this
    order. Values that are no tensors are left out.

    Raises:
      UserError: as `read`, or the file has no tensors by name.
    """
    content = read(path)
    for _ in range(3):  # an envelope may be inside another one
        if not isinstance(content, Mapping):
            break
        tensors = {
            name: value
            for name, value in content.items()
            if isinstance(name, str) and isinstance(value, np.ndarray)
        }
        inner = [content[key] for key in _ENVELOPES if isinstance(content.get(key), Mapping)]
        if tensors and not inner:
            return tensors
        if not inner:
            break
        content = inner[0]
    keys = ", ".join(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
    raise UserError(f"{path} has no tensors by name; it has {keys[:200] or 'nothing'}")


class _Unpickler(pickle.Unpickler):
    """An unpickler that builds tensors and plain containers, and nothing else.

    Args:
      file: the pickle.
      find: returns the storage of (key, dtype, number of elements).
    """

    def __init__(self, file: IO[bytes], find: Callable[[str, np.dtype, int], _Storage]) -> None:
        super().__init__(file, encoding="utf-8", errors="replace")
        self._find = find

    def find_class(self, module: str, name: str) -> Any:
        """Returns what stands for a name in the pickle. It imports nothing."""
        match module, name:
            case "collections", "OrderedDict":
                return _Dict
            case "torch._utils", "_rebuild_tensor" | "_rebuild_tensor_v2":
                return _tensor
            case "torch._utils", "_rebuild_parameter":
                return _parameter
            case "torch", "Size":
                return tuple
            case "builtins" | "__builtin__", "set" | "frozenset":
                return set
            case "torch" | "torch.storage", _ if name in _DTYPES:
                return type(name, (Placeholder,), {"dtype": jnp.dtype(_DTYPES[name])})
        return type(name, (Placeholder,), {})

    def persistent_load(self, identifier: Any) -> _Storage:
        """Returns the storage that a tensor names.

        Raises:
          ValueError: its type is unknown.
        """
        kind, storage_type, key, _, size, *rest = identifier
        dtype = getattr(storage_type, "dtype", None)
        if kind != "storage" or dtype is None:
            raise ValueError(f"the storage {key!r} has an unknown type")
        numbers = self._find(str(key), dtype, int(size))
        if rest and rest[0] is not None:  # a part of another storage, in the older format
            _, start, length = rest[0]
            return _part(numbers, int(start), int(length))
        return numbers


def _part(whole: _Storage, start: int, length: int) -> _Storage:
    if start < 0 or length < 0 or start + length > whole.size:
        raise ValueError("a part of a storage is outside of it")
    return dataclasses.replace(
        whole, offset=whole.offset + start * whole.dtype.itemsize, size=length
    )


def _tensor(numbers: _Storage, start: int, shape: Any, strides: Any, *rest: Any) -> np.ndarray:
    """Returns a tensor as a view of its storage; zeros while the file is scanned."""
    del rest
    shape, strides = tuple(map(int, shape)), tuple(map(int, strides))
    last = start + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    is_empty = 0 in shape
    if min((start, *shape, *strides)) < 0 or (not is_empty and last >= numbers.size):
        raise ValueError("a tensor is outside of its storage")
    item = numbers.dtype.itemsize
    if numbers.buffer is None or is_empty:
        return np.zeros(shape if is_empty else (), numbers.dtype)
    return np.ndarray(
        shape,
        numbers.dtype,
        numbers.buffer,
        numbers.offset + start * item,
        [stride * item for stride in strides],
    )


def _parameter(data: Any, *rest: Any) -> Any:
    del rest
    return data


def _read_archive(path: pathlib.Path, file: IO[bytes]) -> Any:
    """Reads the newer format.

    Raises:
      ValueError: it is a TorchScript archive, or its numbers are big-endian.
    """
    data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    with zipfile.ZipFile(file) as archive:
        members = {name.partition("/")[2]: name for name in archive.namelist()}
        if "constants.pkl" in members or any(name.startswith("code/") for name in members):
            raise UserError(
                f"{path} is a TorchScript archive, which is a program; save its state_dict with "
                "torch.save instead"
            )
        if "data.pkl" not in members:
            raise ValueError("data.pkl is missing")
        if "byteorder" in members and archive.read(members["byteorder"]).strip() != b"little":
            raise ValueError("its numbers are big-endian")

        def find(key: str, dtype: np.dtype, size: int) -> _Storage:
            member = archive.getinfo(members[f"data/{key}"])
            if member.file_size != size * dtype.itemsize:
                raise ValueError(f"the storage {key} has {member.file_size} bytes")
            if member.compress_type != zipfile.ZIP_STORED:
                return _Storage(dtype, archive.read(member), 0, size)
            # A local header, whose name and extra field have their own lengths, precedes the data.
            name_length, extra_length = struct.unpack_from("<HH", data, member.header_offset + 26)
            start = member.header_offset + 30 + name_length + extra_length
            if start + member.file_size > len(data):
                raise ValueError(f"the storage {key} is outside of the file")
            return _Storage(dtype, data, start, size)

        return _Unpickler(io.BytesIO(archive.read(members["data.pkl"])), find).load()


def _read_sequence(path: pathlib.Path, file: IO[bytes]) -> Any:
    """Reads the older format.

    Raises:
      ValueError: the file has another format.
    """
    data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    sizes: dict[str, tuple[np.dtype, int]] = {}

    def scan(key: str, dtype: np.dtype, size: int) -> _Storage:
        sizes[key] = dtype, size
        return _Storage(dtype, None, 0, size)

    if _Unpickler(file, scan).load() != _MAGIC:
        raise ValueError("the first number is another one")
    _, machine = _Unpickler(file, scan).load(), _Unpickler(file, scan).load()
    if not machine.get("little_endian", True):
        raise ValueError("its numbers are big-endian")
    start = file.tell()
    _Unpickler(file, scan).load()
    keys = _Unpickler(file, scan).load()
    storages, position = {}, file.tell()
    for key in map(str, keys):
        dtype, size = sizes[key]
        (stored,) = struct.unpack_from("<q", data, position)
        position += 8
        if stored != size or position + size * dtype.itemsize > len(data):
            raise ValueError(f"the storage {key} has {stored} numbers")
        storages[key] = _Storage(dtype, data, position, size)
        position += size * dtype.itemsize
    file.seek(start)
    return _Unpickler(file, lambda key, dtype, size: storages[key]).load()


def write(
    path: pathlib.Path,
    tensors: Mapping[str, np.ndarray | safetensors_format.PartedArray],
    envelope: str = "",
) -> None:
    """Writes tensors by name as `torch.save` does, atomically. Equal tensors give equal bytes.

    Args:
      path: the file.
      tensors: arrays in a dtype that PyTorch has.
      envelope: the key that the tensors are under, for example "state_dict"; "": none.
    """
    storages = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
    program = [pickle.PROTO, b"\x02"]
    if envelope:
        program += [pickle.EMPTY_DICT, _text(envelope)]
    program += [pickle.EMPTY_DICT, pickle.MARK]
    for key, (name, array) in enumerate(tensors.items()):
        program += [_text(name), _tensor_program(str(key), array, storages[array.dtype])]
    program += [pickle.SETITEMS, *([pickle.SETITEM] if envelope else []), pickle.STOP]
    with (
        storage.writing(storage.path(path)) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive,
    ):

        def add(member: str, content: bytes) -> None:
            # A fixed date, so that equal tensors give equal bytes.
            entry = zipfile.ZipInfo(f"{path.stem}/{member}", (1980, 1, 1, 0, 0, 0))
            archive.writestr(entry, content)

        add("data.pkl", b"".join(program))
        add("byteorder", b"little")
        for key, array in enumerate(tensors.values()):
            add(f"data/{key}", b"".join(safetensors_format.contents(array)))
        add("version", b"3\n")


def _tensor_program(
    key: str, array: np.ndarray | safetensors_format.PartedArray, storage_type: str
) -> bytes:
    """Returns the part of a pickle that builds a tensor."""
    strides = [math.prod(array.shape[axis + 1 :]) for axis in range(len(array.shape))]
    stored = [
        pickle.MARK, _text("storage"), _global("torch", storage_type), _text(key), _text("cpu"),
        _integer(math.prod(array.shape)), pickle.TUPLE, pickle.BINPERSID,
    ]  # fmt: skip
    hooks = [_global("collections", "OrderedDict"), pickle.EMPTY_TUPLE, pickle.REDUCE]
    return b"".join(
        [
            _global("torch._utils", "_rebuild_tensor_v2"), pickle.MARK, *stored, _integer(0),
            pickle.MARK, *map(_integer, array.shape), pickle.TUPLE,
            pickle.MARK, *map(_integer, strides), pickle.TUPLE,
            pickle.NEWFALSE, *hooks, pickle.TUPLE, pickle.REDUCE,
        ]
    )  # fmt: skip


def _text(value: str) -> bytes:
    data = value.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(data)) + data


def _integer(value: int) -> bytes:
    return pickle.LONG1 + b"\x08" + struct.pack("<q", value)


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()
