"""Opens the files of a foreign checkpoint: safetensors, whole or in shards, or those of PyTorch."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping

import numpy as np

from leon_jax import safetensors_format, storage
from leon_jax.config import UserError
from leon_jax.convert import torch_file

_INDEX = "model.safetensors.index.json"
_TORCH = (".ckpt", ".pt", ".pth", ".bin")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The tensors of a checkpoint.

    Attributes:
      tensors: read-only arrays by name, mapped from the files.
      files: the files, in order.
    """

    tensors: Mapping[str, np.ndarray]
    files: tuple[pathlib.Path, ...]


def open_checkpoint(source: pathlib.Path) -> Checkpoint:
    """Opens a file, or a folder with model.safetensors, its shards, or one file of PyTorch.

    Raises:
      UserError: the files are missing, damaged or ambiguous, or a tensor is in two shards.
    """
    files = _files(source)
    tensors: dict[str, np.ndarray] = {}
    for path in files:
        if path.suffix == ".safetensors":
            read = safetensors_format.read(path)[1]
        else:
            read = torch_file.read_weights(path)
        if twice := sorted(set(read) & set(tensors)):
            raise UserError(f"{path} has the tensor {twice[0]}, which another file has too")
        tensors |= read
    return Checkpoint(tensors, files)


def _files(source: pathlib.Path) -> tuple[pathlib.Path, ...]:
    source = pathlib.Path(storage.local(storage.path(source)))
    if source.is_file():
        return (source,)
    if not source.is_dir():
        raise UserError(f"there is no checkpoint at {source}; --source names a file or a folder")
    if (source / _INDEX).is_file():
        try:
            shards = sorted(set(json.loads((source / _INDEX).read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{source / _INDEX} is damaged: {error}") from error
        if missing := [name for name in shards if not (source / name).is_file()]:
            raise UserError(f"{source} lacks {missing[0]}, which {_INDEX} names")
        return tuple(source / name for name in shards)
    for suffixes in ((".safetensors",), _TORCH):
        files = sorted(path for path in source.iterdir() if path.suffix in suffixes)
        if len(files) == 1:
            return tuple(files)
        if files:
            names = ", ".join(path.name for path in files)
            raise UserError(f"{source} has {names}; name one of them as --source")
    raise UserError(
        f"{source} has no weights: no model.safetensors and no file ending in {', '.join(_TORCH)}"
    )
