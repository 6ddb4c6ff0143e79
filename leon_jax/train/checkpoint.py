"""Checkpoints of a training run: the whole state and the data position, saved while it goes on.

A thin layer over Orbax v1. A step's folder appears under its final name only when it is complete,
so whatever is found after a crash is whole.
"""

import json
import os
import pathlib
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from leon_jax import model_files
from leon_jax.config import UserError
from leon_jax.train.state import TrainState

# Where a run ends, and so the end of its learning-rate schedule.
MAY_CHANGE = ("steps", "optimizer.total_steps")


class Checkpoints:
    """The checkpoints of one run, in `directory`.

    Args:
      directory: made if it does not exist.
      keep: how many of the newest stay.

    Raises:
      UserError: `directory` cannot be written.
    """

    def __init__(self, directory: pathlib.Path, keep: int = 2) -> None:
        policies = ocp.training
        try:
            self._checkpointer = policies.Checkpointer(
                directory.absolute(),
                save_decision_policy=policies.save_decision_policies.FixedIntervalPolicy(1),
                preservation_policy=policies.preservation_policies.LatestN(keep),
                cleanup_tmp_directories=True,
            )
        except OSError as error:
            raise UserError(f"checkpoints cannot be kept in {directory}: {error}") from error

    def latest(self) -> int | None:
        """The newest complete step, or None."""
        newest = self._checkpointer.latest
        return None if newest is None else newest.step

    def save(self, state: TrainState, data: grain.DatasetIterator) -> None:
        """Starts saving; arrays are copied before it returns, files are written behind it."""
        arrays = {name: _raw(leaf) for name, leaf in model_files.flatten(state).items()}
        self._checkpointer.save_checkpointables_async(
            int(state.step), {"state": arrays, "data": data}, force=True
        )

    def restore(
        self, step: int, abstract: TrainState, data: grain.DatasetIterator
    ) -> tuple[TrainState, grain.DatasetIterator]:
        """The state and the data position as they were when `step` was saved, bit for bit.

        Args:
          step: a complete checkpoint.
          abstract: shapes, dtypes and shardings to restore into (`jax.eval_shape` of `init`);
            the mesh may differ from the one that saved.
          data: a fresh iterator of the same pipeline.

        Raises:
          UserError: the checkpoint's arrays are not those of this configuration.
        """
        leaves, structure = jax.tree.flatten(abstract)
        names = list(model_files.flatten(abstract))
        targets = {name: _target(leaf) for name, leaf in zip(names, leaves, strict=True)}
        try:
            loaded = self._checkpointer.load_checkpointables(step, {"state": targets, "data": data})
        except (ValueError, KeyError) as error:
            raise UserError(
                f"the checkpoint {self._checkpointer.directory / str(step)} does not fit this "
                f"configuration: {str(error).splitlines()[0]}"
            ) from error
        arrays = [
            jax.random.wrap_key_data(loaded["state"][name]) if _is_key(leaf) else array
            for name, leaf in zip(names, leaves, strict=True)
            for array in [loaded["state"][name]]
        ]
        return jax.tree.unflatten(structure, arrays), loaded.get("data") or data

    def close(self) -> None:
        """Waits for what is being written."""
        self._checkpointer.close()


def check_config(path: pathlib.Path, config: dict[str, Any]) -> None:
    """Keeps a run's configuration beside its checkpoints and refuses to go on with another.

    What is in `MAY_CHANGE` and in `loop` may differ between starts: a run can be made longer.

    Raises:
      UserError: the kept configuration differs; the message names the first key that does.
    """
    config = json.loads(json.dumps(config))
    if path.exists():
        kept = json.loads(path.read_text())
        for key, (old, new) in _differences(kept, config).items():
            if key not in MAY_CHANGE and not key.startswith("loop."):
                raise UserError(
                    f"{path.parent} holds a run with {key} = {old!r}, but it is now {new!r}; "
                    "use another --workdir or put the value back"
                )
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(config, indent=1))
    os.replace(temporary, path)


def _differences(old: Any, new: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return {} if old == new else {prefix.removesuffix("."): (old, new)}
    found: dict[str, tuple[Any, Any]] = {}
    for key in [*new, *(key for key in old if key not in new)]:
        found |= _differences(old.get(key), new.get(key), f"{prefix}{key}.")
    return found


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _raw(leaf: jax.Array) -> jax.Array:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _target(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    mesh = jax.sharding.get_mesh()
    if _is_key(leaf):
        shape = jax.eval_shape(jax.random.key_data, leaf).shape
        return jax.ShapeDtypeStruct(shape, np.uint32, sharding=jax.NamedSharding(mesh, jax.P()))
    sharding = jax.NamedSharding(mesh, leaf.sharding.spec if leaf.sharding else jax.P())
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
