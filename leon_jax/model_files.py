"""One model is one safetensors file: arrays by dotted path, and its configuration in the header.

The header's metadata holds `kind` (tokenizer, encoder, decoder), `config` (JSON) and the format's
version, so a file says by itself what it is and whether it fits.
"""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx

from leon_jax import sharding
from leon_jax.config import UserError

FORMAT = "leon_jax/1"


def flatten(module: Any) -> dict[str, jax.Array]:
    """The arrays of a module, or of any pytree, by dotted path, for example `blocks.query`."""
    leaves = jax.tree_util.tree_flatten_with_path(module)[0]
    return {_name(path): leaf for path, leaf in leaves}


def save(
    path: str | os.PathLike,
    module: nnx.Module,
    kind: str,
    config: dict[str, Any],
    dtype: Any = None,
) -> None:
    """Writes the module and its configuration to `path`, whole or not at all.

    Where there are several processes, all must call it and the first one writes.

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
        arrays[name] = np.asarray(array, order="C")  # keeps arrays without axes as they are
    if jax.process_index() != 0:
        return
    metadata = {"format": FORMAT, "kind": kind, "config": json.dumps(config)}
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    # Not `save_file`, which makes files that only their owner can read.
    temporary.write_bytes(safetensors.numpy.save(arrays, metadata))
    os.replace(temporary, path)


def load(path: str | os.PathLike, kind: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Reads a file written by `save`.

    Returns:
      The arrays by dotted path, as stored, and the configuration.

    Raises:
      UserError: there is no such file, it is damaged, or it holds another kind of model.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"there is no {kind} file at {path}")
    try:
        with safetensors.safe_open(path, framework="flax") as file:
            metadata = file.metadata() or {}
            arrays = {name: np.asarray(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # the library raises several kinds for damaged files
        raise UserError(f"{path} is not a whole safetensors file") from error
    if metadata.get("format") != FORMAT or metadata.get("kind") != kind:
        found = metadata.get("kind", "no leon_jax model")
        raise UserError(f"{path} holds {found}; a {kind} file is needed here")
    return arrays, json.loads(metadata["config"])


def restore[M: nnx.Module](module: M, arrays: Mapping[str, np.ndarray], source: str = "file") -> M:
    """`module` with its arrays replaced by those of a file, in the module's dtypes and layout.

    Args:
      module: concrete, or abstract from `jax.eval_shape`.
      arrays: as returned by `load`; each is asked for once, so a mapping may make it then.
      source: what to call the file in errors.

    Raises:
      UserError: a name or a shape differs, which means the file is of another configuration.
      RuntimeError: no mesh is set.
    """
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        raise RuntimeError(
            "no mesh is set; load models under `with jax.set_mesh(leon_jax.sharding.make_mesh()):`"
        )
    leaves, structure = jax.tree_util.tree_flatten_with_path(module)
    names = [_name(path) for path, _ in leaves]
    if missing := sorted(set(names) ^ set(arrays)):
        raise UserError(f"{source} is of another configuration: it disagrees about {missing[0]!r}")
    restored = []
    for name, (_, leaf) in zip(names, leaves, strict=True):
        array = arrays[name]
        if array.shape != leaf.shape:
            raise UserError(
                f"{source} is of another configuration: {name!r} has shape {array.shape}, "
                f"but {tuple(leaf.shape)} is expected"
            )
        layout = jax.NamedSharding(mesh, leaf.sharding.spec)
        restored.append(jax.device_put(array.astype(leaf.dtype), layout))
    return jax.tree_util.tree_unflatten(structure, restored)


def _name(path: tuple[Any, ...]) -> str:
    parts = [
        str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", "")))) for key in path
    ]
    return ".".join(part for part in parts if part not in ("", "value"))
