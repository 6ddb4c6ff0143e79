"""Reads and writes models as safetensors files, with the configuration in the header.

The metadata in the header has `kind` (tokenizer, encoder, decoder), `config` (JSON) and `format`.
The name of an array is its dotted attribute path in the module, for example `blocks.query`.

Files of the format `leon_jax/1` left out every path part named `value`: the decoder's
`blocks.value` is `blocks` in them. They are read under the full names.
`leon_jax.weight_digests.upgrade` rewrites such a file in the present format.

`leon_jax.weight_digests` compares files.
"""

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

import leon_jax.models  # noqa: F401  # sets flax's mode before any module is created
from leon_jax import safetensors_format, sharding, storage
from leon_jax.config import UserError

FORMAT = "leon_jax/2"
_FORMER_FORMAT = "leon_jax/1"


def flatten(module: Any) -> dict[str, Any]:
    """Returns the arrays of a module, or of any pytree, by dotted path, such as `blocks.query`."""
    arrays: dict[str, Any] = {}
    leaves = jax.tree_util.tree_flatten_with_path(
        module, is_leaf=lambda node: isinstance(node, nnx.Variable)
    )[0]
    for path, leaf in leaves:
        inner: list[Any] = [((), leaf)]
        if isinstance(leaf, nnx.Variable):
            # The first part of the path inside a variable is `value`, which flax adds.
            inner = [(rest[1:], array) for rest, array in _with_paths(leaf)]
        for rest, array in inner:
            arrays[jax.tree_util.keystr((*path, *rest), simple=True, separator=".")] = array
    return arrays


def former_name(name: str) -> str:
    """Returns an array's name in `leon_jax/1`, and in training checkpoints of that version."""
    return ".".join(part for part in name.split(".") if part != "value")


def save(
    path: str | os.PathLike,
    module: nnx.Module,
    kind: str,
    config: dict[str, Any],
    dtype: Any = None,
) -> None:
    """Writes a module and its configuration to `path` atomically.

    Equal modules and configurations give equal bytes. With several processes, all must call it, and
    the first one writes.

    Args:
      path: the `.safetensors` file to write. Its parent folders are created.
      module: the module.
      kind: kind of the model, which `load` checks.
      config: plain values (see `leon_jax.config.to_dict`).
      dtype: floating-point arrays are stored in this dtype, for example `jnp.bfloat16`. None: in
        their own.
    """
    arrays = {}
    for name, leaf in flatten(module).items():
        array = np.asarray(sharding.fetch(leaf))
        if dtype is not None and jnp.issubdtype(array.dtype, jnp.floating):
            array = array.astype(dtype)
        arrays[name] = array
    if jax.process_index() != 0:
        return
    metadata = {"format": FORMAT, "kind": kind, "config": json.dumps(config)}
    safetensors_format.write(storage.path(path), arrays, metadata)


def convert(source: str | os.PathLike, out: str | os.PathLike, dtype: DTypeLike) -> None:
    """Writes a copy of a file with all floating-point arrays in another dtype.

    Raises:
      UserError: the file is missing or damaged.
    """
    metadata, arrays = read_mapped(source)
    converted = {
        name: array.astype(dtype) if jnp.issubdtype(array.dtype, jnp.floating) else array
        for name, array in arrays.items()
    }
    safetensors_format.write(storage.path(out), converted, metadata | {"format": FORMAT})


def load(path: str | os.PathLike, kind: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Reads a file that `save` wrote, of either format.

    Returns:
      The arrays by full name in their stored dtypes, and the configuration.

    Raises:
      UserError: the file is missing or damaged, or has another kind of model.
    """
    metadata, arrays = read_mapped(path, kind)
    return {name: np.array(array) for name, array in arrays.items()}, json.loads(metadata["config"])


def read_config(path: str | os.PathLike, kind: str) -> dict[str, Any]:
    """Reads the configuration in the header of a file, without the weights.

    Raises:
      UserError: the file is missing or damaged, or has another kind of model.
    """
    return json.loads(read_mapped(path, kind)[0]["config"])


def restore[M: nnx.Module](module: M, arrays: Mapping[str, np.ndarray], source: str = "file") -> M:
    """Returns `module` with the arrays of a file, in the module's dtypes and shardings.

    Args:
      module: concrete, or abstract from `jax.eval_shape`.
      arrays: arrays by name, for example from `load`. Each is looked up once, so a mapping may
        read an array at that time.
      source: name of the file in error messages.

    Raises:
      UserError: a name or a shape differs, so the file has another configuration; or a tensor has
        NaN or infinite numbers.
      RuntimeError: no mesh is set.
    """
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        raise RuntimeError(
            "no mesh is set; load models under `with jax.set_mesh(leon_jax.sharding.make_mesh()):`"
        )
    leaves, structure = jax.tree.flatten(module)
    names = list(flatten(module))
    if differences := sorted(set(names) ^ set(arrays)):
        problem = "lacks" if differences[0] in names else "has"
        raise UserError(
            f"{source} has another configuration: it {problem} the array {differences[0]!r}"
        )
    restored = []
    for name, leaf in zip(names, leaves, strict=True):
        array = arrays[name]
        if array.shape != leaf.shape:
            raise UserError(
                f"{source} has another configuration: {name!r} has shape {array.shape}, "
                f"but {tuple(leaf.shape)} is expected"
            )
        array = array.astype(leaf.dtype)
        check_finite(array, name, source)
        layout = jax.NamedSharding(mesh, leaf.sharding.spec)
        restored.append(jax.device_put(array, layout))
    return jax.tree.unflatten(structure, restored)


def check_finite(array: np.ndarray, name: str, source: str) -> None:
    """Checks that a tensor is finite.

    Args:
      array: a host array of any dtype.
      name: name of the tensor in the error message.
      source: name of the file in the error message.

    Raises:
      UserError: the tensor has NaN or infinite numbers.
    """
    if jnp.issubdtype(array.dtype, jnp.floating) and not np.isfinite(array).all():
        raise UserError(
            f"{source} has NaN or infinite numbers in {name!r}; every weight of a model must be "
            "finite, so take another copy or an earlier checkpoint"
        )


def is_weight_file(path: str | os.PathLike) -> bool:
    """Returns whether this is a complete weight file of either format, of any kind."""
    try:
        metadata = safetensors_format.read_metadata(storage.path(path))
    except UserError:
        return False
    return metadata.get("format") in (FORMAT, _FORMER_FORMAT)


def read_mapped(
    path: str | os.PathLike, kind: str | None = None
) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Opens a file of either format without reading its tensors into memory.

    Args:
      path: the file.
      kind: the kind of model that the file must have; None: any.

    Returns:
      The metadata of the header, and the memory-mapped arrays by full name.

    Raises:
      UserError: the file is missing or damaged, or has another kind of model.
    """
    path, expected = storage.path(path), kind or "model"
    if not path.is_file():
        raise UserError(f"there is no {expected} file at {path}")
    metadata, arrays = safetensors_format.read(path)
    known = metadata.get("format") in (FORMAT, _FORMER_FORMAT)
    if not known or metadata.get("kind") != (kind or metadata.get("kind")):
        actual = metadata.get("kind", "no leon_jax model")
        raise UserError(f"{path} has {actual}; a {expected} file is needed here")
    if metadata["format"] == _FORMER_FORMAT:
        arrays = {_full_name(name, arrays): array for name, array in arrays.items()}
    return metadata, arrays


def _full_name(name: str, names: Iterable[str]) -> str:
    """Returns the full name of an array of `leon_jax/1`.

    A name that is a prefix of another name lacks its last part: `blocks` beside `blocks.query` can
    only be `blocks.value`.
    """
    is_prefix = any(other.startswith(name + ".") for other in names)
    return f"{name}.value" if is_prefix else name


def _with_paths(node: Any) -> list[tuple[tuple[Any, ...], Any]]:
    return jax.tree_util.tree_flatten_with_path(node)[0]
