"""Reads and writes models as safetensors files, with the configuration in the header.

The metadata in the header has `kind` (tokenizer, encoder, decoder), `config` (JSON) and `format`.
The name of an array is its dotted attribute path in the module, for example `blocks.query`.

Files of the format `leon_jax/1` left out every path part named `value`: the decoder's
`blocks.value` is `blocks` in them. They are read under the full names. `upgrade` rewrites such a
file in the present format.

Files are compared by a digest of their tensors under full names, not by their bytes. A file that
`upgrade` wrote lists the digests of its former bytes in `replaces`, because folders and images of
older versions record those digests.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import leon_jax.models  # noqa: F401  # sets flax's mode before any module is created
from leon_jax import safetensors_format, sharding
from leon_jax.config import UserError

FORMAT = "leon_jax/2"
_FORMER_FORMAT = "leon_jax/1"
# Number and size of the samples that `sampled_digest` reads.
_SAMPLES, _SAMPLE_BYTES = 64, 4096


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
    safetensors_format.write(pathlib.Path(path), arrays, metadata)


def load(path: str | os.PathLike, kind: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Reads a file that `save` wrote, of either format.

    Returns:
      The arrays by full name in their stored dtypes, and the configuration.

    Raises:
      UserError: the file is missing or damaged, or has another kind of model.
    """
    metadata, arrays = _open(path, kind)
    return {name: np.array(array) for name, array in arrays.items()}, json.loads(metadata["config"])


def read_config(path: str | os.PathLike, kind: str) -> dict[str, Any]:
    """Reads the configuration in the header of a file, without the weights.

    Raises:
      UserError: the file is missing or damaged, or has another kind of model.
    """
    return json.loads(_open(path, kind)[0]["config"])


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
        metadata = safetensors_format.read_metadata(pathlib.Path(path))
    except UserError:
        return False
    return metadata.get("format") in (FORMAT, _FORMER_FORMAT)


def content_digest(path: str | os.PathLike) -> str:
    """Returns a hexadecimal SHA-256 of the kind, the configuration and the tensors of a file.

    It does not depend on the format, the order of the tensors, or `replaces`. The file is streamed,
    so it may be larger than memory.

    Raises:
      UserError: the file cannot be read or is not a weight file.
    """
    metadata, arrays = _open(path)
    digest = hashlib.sha256()
    config = json.dumps(json.loads(metadata["config"]), sort_keys=True)
    digest.update(f"{metadata['kind']}\n{config}\n".encode())
    for line, array in _described(arrays):
        digest.update(line)
        digest.update(safetensors_format.content(array).data)
    return digest.hexdigest()


def same_weights(path: str | os.PathLike, recorded: str) -> bool:
    """Returns whether a recorded digest is of this file: its contents, bytes or former bytes.

    Raises:
      UserError: the file cannot be read or is not a weight file.
    """
    metadata, _ = _open(path)
    return (
        recorded in _replaces(metadata)
        or recorded == content_digest(path)
        or recorded == _byte_digest(path)
    )


def sampled_digest(path: str | os.PathLike) -> str:
    """Returns 12 hexadecimal digits that identify the weights of a file.

    They are a digest of the tensors' full names, types and shapes, and of 64 samples of their
    contents, because reading all of a large model takes minutes. Training changes every weight. A
    file with only a few changed weights may have the same digest.

    Raises:
      UserError: the file cannot be read or is not a weight file.
    """
    _, arrays = _open(path)
    digest, contents = hashlib.sha256(), []
    for line, array in _described(arrays):
        digest.update(line)
        contents.append(safetensors_format.content(array))
    # The samples are taken from the concatenated contents.
    ends = np.cumsum([len(content) for content in contents], dtype=np.int64)
    total = int(ends[-1]) if contents else 0
    for sample in range(_SAMPLES):
        start = total * sample // _SAMPLES
        stop = min(start + _SAMPLE_BYTES, total)
        for content, end in zip(contents, ends, strict=True):
            offset = int(end) - len(content)
            digest.update(content[max(start - offset, 0) : max(stop - offset, 0)].data)
    return digest.hexdigest()[:12]


def former_sampled_digests(path: str | os.PathLike) -> list[str]:
    """Returns the 12-digit digests that older versions wrote into images for these weights.

    Raises:
      UserError: the file cannot be read or is not a weight file.
    """
    metadata, _ = _open(path)
    former = [digest for digest in _replaces(metadata) if len(digest) == 12]
    return [_sampled_bytes_digest(path), *former]


def upgrade(path: str | os.PathLike) -> bool:
    """Rewrites a file of the format `leon_jax/1` in the present format, with the same weights.

    The header lists the digests of the former bytes, so that recorded digests stay valid.

    Returns:
      Whether the file was rewritten. A file of the present format does not change.

    Raises:
      UserError: the file cannot be read or is not a weight file.
    """
    metadata, arrays = _open(path)
    if metadata["format"] == FORMAT:
        return False
    replaces = [_byte_digest(path), _sampled_bytes_digest(path)]
    metadata = metadata | {"format": FORMAT, "replaces": json.dumps(replaces)}
    safetensors_format.write(pathlib.Path(path), arrays, metadata)
    return True


def _open(
    path: str | os.PathLike, kind: str | None = None
) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Returns the metadata and the mapped arrays by full name, and checks `kind` unless None."""
    path, expected = pathlib.Path(path), kind or "model"
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


def _described(arrays: Mapping[str, np.ndarray]) -> Iterator[tuple[bytes, np.ndarray]]:
    """Yields the arrays by name, each with a line that has its name, type and shape."""
    for name, array in sorted(arrays.items()):
        yield f"{name} {array.dtype.name} {list(array.shape)}\n".encode(), array


def _replaces(metadata: Mapping[str, str]) -> list[str]:
    """Returns the digests of former bytes in a header."""
    return json.loads(metadata.get("replaces", "[]"))


def _byte_digest(path: str | os.PathLike) -> str:
    """Returns the SHA-256 of a file's bytes, which older versions recorded in prepared folders."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sampled_bytes_digest(path: str | os.PathLike) -> str:
    """Returns the digest that older versions recorded in images: of the size and 64 samples."""
    digest, size = hashlib.sha256(), os.stat(path).st_size
    digest.update(str(size).encode())
    with open(path, "rb") as file:
        for sample in range(_SAMPLES):
            file.seek(size * sample // _SAMPLES)
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:12]


def _with_paths(node: Any) -> list[tuple[tuple[Any, ...], Any]]:
    return jax.tree_util.tree_flatten_with_path(node)[0]
