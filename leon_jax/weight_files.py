"""One model is one safetensors file: arrays by dotted path, and its configuration in the header.

The header's metadata holds `kind` (tokenizer, encoder, decoder), `config` (JSON) and `format`, so a
file says by itself what it is and whether it fits. An array's name is the path of attributes that
leads to it in the module, for example `blocks.query`.

Files of the format `leon_jax/1` left out every path part called `value`, so that the decoder's
`blocks.value` was `blocks` there. They are read as before, under the true names. `upgrade` writes
such a file again.

What tells two files apart is not their bytes but a digest of their tensors under true names. A file
that `upgrade` wrote lists the digests of its former bytes in `replaces`, because folders and images
of older versions record those.
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

import leon_jax.models  # noqa: F401  # sets flax's mode before any module is made
from leon_jax import sharding, tensor_files
from leon_jax.config import UserError

FORMAT = "leon_jax/2"
_FORMER_FORMAT = "leon_jax/1"
# How much of a file `sampled_digest` reads.
_SAMPLES, _SAMPLE_BYTES = 64, 4096


def flatten(module: Any) -> dict[str, Any]:
    """The arrays of a module, or of any pytree, by dotted path, for example `blocks.query`."""
    arrays: dict[str, Any] = {}
    leaves = jax.tree_util.tree_flatten_with_path(
        module, is_leaf=lambda node: isinstance(node, nnx.Variable)
    )[0]
    for path, leaf in leaves:
        inner: list[Any] = [((), leaf)]
        if isinstance(leaf, nnx.Variable):
            # The first part of the path inside a variable is flax's own: `value`.
            inner = [(rest[1:], array) for rest, array in _with_paths(leaf)]
        for rest, array in inner:
            arrays[jax.tree_util.keystr((*path, *rest), simple=True, separator=".")] = array
    return arrays


def former_name(name: str) -> str:
    """What an array of this true name was called in `leon_jax/1` and in checkpoints of its time."""
    return ".".join(part for part in name.split(".") if part != "value")


def save(
    path: str | os.PathLike,
    module: nnx.Module,
    kind: str,
    config: dict[str, Any],
    dtype: Any = None,
) -> None:
    """Writes the module and its configuration to `path`, whole or not at all.

    Equal modules and configurations become equal bytes. Where there are several processes, all must
    call it and the first one writes.

    Args:
      path: the `.safetensors` file to write; parents are made.
      module: its floating-point arrays are cast to `dtype` if one is given.
      kind: what the file holds, checked by `load`.
      config: plain values (see `leon_jax.config.to_dict`).
      dtype: how floating-point arrays are stored, for example `jnp.bfloat16`.
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
    tensor_files.write(pathlib.Path(path), arrays, metadata)


def load(path: str | os.PathLike, kind: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Reads a file written by `save`, of either format.

    Returns:
      The arrays by true name, as stored, and the configuration.

    Raises:
      UserError: there is no such file, it is damaged, or it holds another kind of model.
    """
    metadata, arrays = _open(path, kind)
    return {name: np.array(array) for name, array in arrays.items()}, json.loads(metadata["config"])


def read_config(path: str | os.PathLike, kind: str) -> dict[str, Any]:
    """The configuration in the header of a file; no weights are read.

    Raises:
      UserError: as `load`.
    """
    return json.loads(_open(path, kind)[0]["config"])


def restore[M: nnx.Module](module: M, arrays: Mapping[str, np.ndarray], source: str = "file") -> M:
    """`module` with its arrays replaced by those of a file, in the module's dtypes and layout.

    Args:
      module: concrete, or abstract from `jax.eval_shape`.
      arrays: as returned by `load`; each is asked for once, so a mapping may make it then.
      source: what to call the file in errors.

    Raises:
      UserError: a name or a shape differs, which means the file is of another configuration; or a
        tensor holds NaN or infinite numbers.
      RuntimeError: no mesh is set.
    """
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        raise RuntimeError(
            "no mesh is set; load models under `with jax.set_mesh(leon_jax.sharding.make_mesh()):`"
        )
    leaves, structure = jax.tree.flatten(module)
    names = list(flatten(module))
    if missing := sorted(set(names) ^ set(arrays)):
        raise UserError(f"{source} is of another configuration: it disagrees about {missing[0]!r}")
    restored = []
    for name, leaf in zip(names, leaves, strict=True):
        array = arrays[name]
        if array.shape != leaf.shape:
            raise UserError(
                f"{source} is of another configuration: {name!r} has shape {array.shape}, "
                f"but {tuple(leaf.shape)} is expected"
            )
        array = array.astype(leaf.dtype)
        check_finite(array, name, source)
        layout = jax.NamedSharding(mesh, leaf.sharding.spec)
        restored.append(jax.device_put(array, layout))
    return jax.tree.unflatten(structure, restored)


def check_finite(array: np.ndarray, name: str, source: str) -> None:
    """Refuses a tensor that holds NaN or infinite numbers.

    Args:
      array: a host array of any dtype.
      name, source: what to call the tensor and its file in the error.

    Raises:
      UserError: it does.
    """
    if jnp.issubdtype(array.dtype, jnp.floating) and not np.isfinite(array).all():
        raise UserError(
            f"{source} holds NaN or infinite numbers in {name!r}; every weight of a model must be "
            "finite, so take another copy or an earlier checkpoint"
        )


def is_weight_file(path: str | os.PathLike) -> bool:
    """Whether this is a whole file of either format, of any kind."""
    try:
        metadata = tensor_files.read_metadata(pathlib.Path(path))
    except UserError:
        return False
    return metadata.get("format") in (FORMAT, _FORMER_FORMAT)


def content_digest(path: str | os.PathLike) -> str:
    """SHA-256 of what a file holds, in hexadecimal: tensors under true names, kind, configuration.

    Neither the format, nor the order of the tensors, nor `replaces` matters. The file is read in
    passing and never whole in memory.

    Raises:
      UserError: the file cannot be read or is not a weight file.
    """
    metadata, arrays = _open(path)
    digest = hashlib.sha256()
    config = json.dumps(json.loads(metadata["config"]), sort_keys=True)
    digest.update(f"{metadata['kind']}\n{config}\n".encode())
    for line, array in _described(arrays):
        digest.update(line)
        digest.update(tensor_files.content(array).data)
    return digest.hexdigest()


def same_weights(path: str | os.PathLike, recorded: str) -> bool:
    """Whether a recorded digest means this file: its contents, its bytes, or bytes it replaces.

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
    """Tells the weights of one file from those of another: 12 hexadecimal digits.

    Of the tensors' true names, types and shapes and of 64 samples of their contents, because a
    large model is read for minutes. Training changes every weight; a file that was changed in few
    places only may have the same digest.

    Raises:
      UserError: the file cannot be read or is not a weight file.
    """
    _, arrays = _open(path)
    digest, contents = hashlib.sha256(), []
    for line, array in _described(arrays):
        digest.update(line)
        contents.append(tensor_files.content(array))
    # The contents as if they stood one after the other.
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
    """The digests of 12 digits that older versions wrote into images made with these weights.

    Raises:
      UserError: the file cannot be read or is not a weight file.
    """
    metadata, _ = _open(path)
    replaced = [digest for digest in _replaces(metadata) if len(digest) == 12]
    return [_sampled_bytes(path), *replaced]


def upgrade(path: str | os.PathLike) -> bool:
    """Writes a file of the format `leon_jax/1` again, under true names; the weights stay the same.

    The digests of its former bytes are kept in the header, so that what records them stays valid.

    Returns:
      Whether it was one; a file of the present format is left as it is.

    Raises:
      UserError: the file cannot be read or is not a weight file.
    """
    metadata, arrays = _open(path)
    if metadata["format"] == FORMAT:
        return False
    replaces = [_byte_digest(path), _sampled_bytes(path)]
    metadata = metadata | {"format": FORMAT, "replaces": json.dumps(replaces)}
    tensor_files.write(pathlib.Path(path), arrays, metadata)
    return True


def _open(
    path: str | os.PathLike, kind: str | None = None
) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """The metadata and the mapped arrays by true name; `kind` is checked if one is given."""
    path, needed = pathlib.Path(path), kind or "model"
    if not path.is_file():
        raise UserError(f"there is no {needed} file at {path}")
    metadata, arrays = tensor_files.read(path)
    known = metadata.get("format") in (FORMAT, _FORMER_FORMAT)
    if not known or metadata.get("kind") != (kind or metadata.get("kind")):
        holds = metadata.get("kind", "no leon_jax model")
        raise UserError(f"{path} holds {holds}; a {needed} file is needed here")
    if metadata["format"] == _FORMER_FORMAT:
        arrays = {_true_name(name, arrays): array for name, array in arrays.items()}
    return metadata, arrays


def _true_name(name: str, names: Iterable[str]) -> str:
    """The true name of an array of `leon_jax/1`: what is both an array and a prefix lacks a part.

    `blocks` beside `blocks.query` can only be `blocks.value`.
    """
    lacks = any(other.startswith(name + ".") for other in names)
    return f"{name}.value" if lacks else name


def _described(arrays: Mapping[str, np.ndarray]) -> Iterator[tuple[bytes, np.ndarray]]:
    """The arrays in the order of their names, each after a line with its name, type and shape."""
    for name, array in sorted(arrays.items()):
        yield f"{name} {array.dtype.name} {list(array.shape)}\n".encode(), array


def _replaces(metadata: Mapping[str, str]) -> list[str]:
    """The digests of former bytes that a header lists."""
    return json.loads(metadata.get("replaces", "[]"))


def _byte_digest(path: str | os.PathLike) -> str:
    """SHA-256 of a file as it is: what older versions recorded in prepared folders."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sampled_bytes(path: str | os.PathLike) -> str:
    """What older versions recorded in images: of the file's size and 64 pieces of its bytes."""
    digest, size = hashlib.sha256(), os.stat(path).st_size
    digest.update(str(size).encode())
    with open(path, "rb") as file:
        for sample in range(_SAMPLES):
            file.seek(size * sample // _SAMPLES)
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:12]


def _with_paths(node: Any) -> list[tuple[tuple[Any, ...], Any]]:
    return jax.tree_util.tree_flatten_with_path(node)[0]
