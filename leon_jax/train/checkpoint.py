"""Checkpoints of a training run: the whole state and the data position, saved while it goes on.

A thin layer over Orbax v1. A step's folder appears under its final name only when it is complete,
so what is found after a crash is whole, unless storage itself failed. For that case every array has
a checksum, and the newest checkpoint that reads back right is taken.
"""

import atexit
import errno
import functools
import json
import logging
import os
import pathlib
import shutil
import sys
import tempfile
import threading
import traceback
from collections.abc import Container, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, UInt32
from orbax.checkpoint import v1 as ocp

from leon_jax import weight_files
from leon_jax.config import UserError
from leon_jax.train.state import TrainState

# Where a run ends, and so the end of its learning-rate schedule; and what no result depends on.
MAY_CHANGE = ("steps", "optimizer.total_steps", "data.threads")
# Settings that earlier versions had, and the value that this version always takes.
REMOVED = {
    "data.spare_spans": 4,
    "data.flip": True,
    "data.min_crop": 0.75,
    "model.max_scale": 100.0,
    "model.pad_id": 1,
}


class Checkpoints:
    """The checkpoints of one run, in `directory`.

    Args:
      directory: made if it does not exist. What turns out damaged is moved beside it, into
        `damaged_checkpoints`.
      keep: how many of the newest stay.

    Raises:
      UserError: `directory` cannot be written.
    """

    def __init__(self, directory: pathlib.Path, keep: int = 2) -> None:
        logging.getLogger("absl").addFilter(_worth_telling)
        threading.excepthook = _thread_failed
        self._directory, self._keep = directory.absolute(), keep
        self._checkpointer = self._open()

    def latest(self) -> int | None:
        """The newest complete step, or None."""
        newest = self._checkpointer.latest
        return None if newest is None else newest.step

    def save(self, state: TrainState, data: Mapping[str, str]) -> None:
        """Starts saving; arrays are copied before it returns, files are written behind it.

        Args:
          state: the state after some step.
          data: the data position, texts by name.

        Raises:
          UserError: this or the last checkpoint could not be written (disk full, no permission).
        """
        arrays = {name: _raw(leaf) for name, leaf in weight_files.flatten(state).items()}
        sums = {name: str(value) for name, value in _checksums(arrays).items()}
        try:
            self._checkpointer.save_checkpointables_async(
                int(state.step),
                {"state": arrays, "data": dict(data), "checksums": sums},
                force=True,
            )
        except Exception as error:  # Orbax raises many kinds, most of them ValueError
            raise self._unwritten(error) from error

    def restore(self, abstract: TrainState) -> tuple[int, TrainState, dict[str, str]]:
        """The newest checkpoint that reads back as it was written, bit for bit.

        One that does not is named on stderr and moved away, and the one before is taken.

        Args:
          abstract: shapes, dtypes and shardings to restore into (`jax.eval_shape` of `init`);
            the mesh and the number of processes may differ from those that saved.

        Returns:
          The step, the state, and the data position given to `save`.

        Raises:
          UserError: no checkpoint fits this configuration and is whole.
        """
        steps = sorted((found.step for found in self._checkpointer.checkpoints), reverse=True)
        problems: dict[int, str] = {}
        for step in steps:
            loaded = None
            try:
                loaded = self._load(step, abstract)
            except Exception as error:  # Orbax raises many kinds; each means "not this one"
                problems[step] = _reason(error, "a file is missing, damaged or of other arrays")
            if not on_all_processes(loaded is not None):
                problems.setdefault(step, "another process could not read it")
                continue
            assert loaded is not None
            for damaged, problem in problems.items():
                self._put_away(damaged, problem)
            if problems:
                self._checkpointer.close()
                self._checkpointer = self._open()
            return step, *loaded
        newest = f"; of the newest, {steps[0]}, {problems[steps[0]]}" if steps else ""
        raise UserError(
            f"none of the {len(steps)} checkpoints in {self._directory} is whole and fits this "
            f"configuration{newest}; put the configuration back, or use another --workdir"
        )

    def close(self) -> None:
        """Waits for what is being written.

        Raises:
          UserError: it could not be written.
        """
        try:
            self._checkpointer.close()
        except Exception as error:
            raise self._unwritten(error) from error

    def _open(self) -> ocp.training.Checkpointer:
        policies = ocp.training
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            return policies.Checkpointer(
                _path_for_orbax(self._directory),
                save_decision_policy=policies.save_decision_policies.FixedIntervalPolicy(1),
                preservation_policy=policies.preservation_policies.LatestN(self._keep),
                cleanup_tmp_directories=True,
            )
        except OSError as error:
            raise UserError(
                f"checkpoints cannot be kept in {self._directory}: "
                f"{_reason(error, 'it is no folder that can be written')}"
            ) from error

    def _load(self, step: int, abstract: TrainState) -> tuple[TrainState, dict[str, str]]:
        leaves, structure = jax.tree.flatten(abstract)
        sums = self._checkpointer.load_checkpointables(step, {"checksums": None})["checksums"]
        names = _stored_names(weight_files.flatten(abstract), sums)
        targets = {name: _target(leaf) for name, leaf in zip(names, leaves, strict=True)}
        loaded = self._checkpointer.load_checkpointables(step, {"state": targets, "data": None})
        read = {name: str(value) for name, value in _checksums(loaded["state"]).items()}
        if wrong := [name for name in names if read[name] != sums[name]]:
            raise UserError(f"{wrong[0]} is not what was written")
        arrays = [
            jax.random.wrap_key_data(loaded["state"][name]) if _is_key(leaf) else array
            for name, leaf in zip(names, leaves, strict=True)
            for array in [loaded["state"][name]]
        ]
        return jax.tree.unflatten(structure, arrays), loaded["data"]

    def _put_away(self, step: int, problem: str) -> None:
        away = self._directory.with_name("damaged_checkpoints") / str(step)
        print(f"checkpoint {step} is damaged ({problem}); moved to {away}", file=sys.stderr)
        if jax.process_index() == 0:
            shutil.rmtree(away, ignore_errors=True)
            away.parent.mkdir(exist_ok=True)
            os.replace(self._directory / str(step), away)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"damaged checkpoint {step}")

    def _unwritten(self, error: Exception) -> UserError:
        whole = [int(path.name) for path in self._directory.iterdir() if path.name.isdigit()]
        last = f"the last good one, of step {max(whole)}, stays" if whole else "there is none yet"
        reason = _reason(error, "its storage did not take it")
        return UserError(
            f"a checkpoint could not be written into {self._directory}: {reason}; {last}"
        )


@functools.cache
def _path_for_orbax(directory: pathlib.Path) -> pathlib.Path:
    """A path to an absolute folder that means the same as a pattern.

    Orbax joins the arrays that processes wrote after looking for them with `glob`, and what the
    folder's own path says is part of the pattern. So a folder such as `lr[3e-4]` is reached
    through a link in a temporary folder, which this process removes at its end.
    """
    if not set("*?[]\\") & set(str(directory)):
        return directory
    folder = tempfile.mkdtemp(prefix="leon-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    link = pathlib.Path(folder, "checkpoints")
    link.symlink_to(directory, target_is_directory=True)
    return link


def on_all_processes(fact: bool) -> bool:
    """Whether a fact holds on all processes; collective."""
    if jax.process_count() == 1:
        return fact
    return bool(multihost_utils.process_allgather(np.array(fact)).all())


def load_weights(
    directory: pathlib.Path, names: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, Array]:
    """Some arrays of a run's newest checkpoint, for example its model without the optimizer.

    Args:
      directory: `checkpoints` of a run.
      names: dotted paths (see `leon_jax.weight_files.flatten`) to shapes, dtypes and shardings.

    Returns:
      The arrays by the same paths.

    Raises:
      UserError: there is no checkpoint, or it has no such arrays of these shapes.
    """
    steps = [int(path.name) for path in directory.glob("*") if path.name.isdigit()]
    if not steps:
        raise UserError(f"there is no checkpoint in {directory}")
    path = directory / str(max(steps))
    options = ocp.options.PyTreeOptions(
        loading=ocp.options.PyTreeOptions.Loading(partial_load=True)
    )
    try:
        with ocp.Context(pytree_options=options):
            orbax_path = _path_for_orbax(directory.absolute()) / path.name
            sums = ocp.load_checkpointables(orbax_path, {"checksums": None})["checksums"]
            stored = dict(zip(names, _stored_names(names, sums), strict=True))
            targets = {stored[name]: _target(leaf) for name, leaf in names.items()}
            arrays = ocp.load_checkpointables(orbax_path, {"state": targets})["state"]
            return {name: arrays[stored[name]] for name in names}
    except Exception as error:
        reason = _reason(error, "a file is damaged, or its model has another shape than this one")
        raise UserError(f"the weights in {path} cannot be used: {reason}") from error


def check_config(path: pathlib.Path, config: dict[str, Any]) -> None:
    """Keeps a run's configuration beside its checkpoints and refuses to go on with another.

    Where there are no checkpoints yet there is nothing to go on with, and the new one is kept.

    What is in `MAY_CHANGE` and in `loop` may differ between starts: a run can be made longer. What
    is in `REMOVED` may be missing now, if the run had the value that this version takes.

    Raises:
      UserError: the kept configuration differs; the message names the first key that does.
    """
    config = json.loads(json.dumps(config))
    if path.exists() and any(path.parent.glob("checkpoints/[0-9]*")):
        kept = json.loads(path.read_text())
        for key, (old, new) in _differences(kept, config).items():
            if key in REMOVED and new is None:
                if old != REMOVED[key]:
                    raise UserError(
                        f"{path.parent} holds a run with {key} = {old!r}, but this version always "
                        f"takes {REMOVED[key]!r}; use another --workdir"
                    )
            elif key not in MAY_CHANGE and not key.startswith("loop."):
                raise UserError(
                    f"{path.parent} holds a run with {key} = {old!r}, but it is now {new!r}; "
                    "use another --workdir or put the value back"
                )
    if jax.process_index() == 0:
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


def _stored_names(names: Iterable[str], stored: Container[str]) -> list[str]:
    """What a checkpoint calls these arrays: older versions left out path parts called `value`."""
    names = list(names)
    if all(name in stored for name in names):
        return names
    former = [weight_files.former_name(name) for name in names]
    return former if all(name in stored for name in former) else names


def _checksums(arrays: dict[str, Array]) -> dict[str, int]:
    """The sum of every array's 32-bit words modulo 2^32; however it is split, and in any order."""
    return {name: int(value) for name, value in jax.device_get(_word_sums(arrays)).items()}


@jax.jit
def _word_sums(arrays: dict[str, Array]) -> dict[str, UInt32[Array, ""]]:
    def words(array: Array) -> UInt32[Array, ""]:
        bits = array.dtype.itemsize * 8
        unsigned = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{bits}"))
        return unsigned.astype(jnp.uint32).sum(dtype=jnp.uint32)

    return jax.tree.map(words, arrays)


# What storage does to a run, as far as a person can do something about it.
_STORAGE_ERRORS = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO,
    errno.ESTALE, errno.ENOTDIR,
)  # fmt: skip


def _reason(error: Exception, otherwise: str) -> str:
    """Why, in the words of this project or of the operating system, never those of a library.

    Args:
      error: its causes are looked through; a library may name the system's error in its text.
      otherwise: what to say if none of them is known.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            return str(cause)
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        for number in _STORAGE_ERRORS:
            if os.strerror(number) in str(cause):
                return os.strerror(number)
        cause = cause.__cause__
    return otherwise


def _worth_telling(record: logging.LogRecord) -> bool:
    """Not Orbax's errors, which it raises as well, and nothing about folders without arrays."""
    if "orbax" in record.pathname and record.levelno >= logging.ERROR:
        return False
    return "No per-process OCDBT" not in record.getMessage()


def _thread_failed(failure: threading.ExceptHookArgs) -> None:
    """Prints what ended a thread, unless it was one of Orbax's, whose next call raises it again."""
    frames = traceback.extract_tb(failure.exc_traceback)
    if not any("orbax" in frame.filename for frame in frames):
        threading.__excepthook__(failure)


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
