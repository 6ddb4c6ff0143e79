"""Reads the arrays of training checkpoints.

Every process reads for itself: none waits for another one inside Orbax. So if one cannot read, all
of them learn it, and raise an error. Arrays that the first replica of the mesh can read for all are
read there (see `leon_jax.train.replicas`).
"""

import atexit
import contextlib
import errno
import functools
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Any

import jax
from jaxtyping import Array
from orbax.checkpoint import v1 as ocp

from leon_jax import storage, weight_files
from leon_jax.config import UserError
from leon_jax.train import replicas, stored_arrays
from leon_jax.train.state import TrainState


def load_model(directory: pathlib.Path, abstract: TrainState, step: int, model: Any = None) -> Any:
    """Loads the model of a checkpoint, without the other arrays of its state.

    Args:
      directory: the folder `checkpoints` of a run.
      abstract: shapes, dtypes and shardings of the state (`jax.eval_shape` of `init`).
      step: the step of the checkpoint.
      model: the part of `abstract` to load, for example the averaged weights; None:
        `abstract.model`.

    Raises:
      UserError: see `load_weights`.
    """
    leaves, structure = jax.tree.flatten(abstract.model if model is None else model)
    all_names = {id(leaf): name for name, leaf in weight_files.flatten(abstract).items()}
    names = [all_names[id(leaf)] for leaf in leaves]
    arrays = load_weights(directory, dict(zip(names, leaves, strict=True)), step)
    return jax.tree.unflatten(structure, [arrays[name] for name in names])


def load_data(directory: pathlib.Path, step: int) -> dict[str, str]:
    """Returns the data position of a checkpoint, by the number of the data shard.

    Raises:
      UserError: the checkpoint cannot be read.
    """
    with _explained(directory / str(step)) as path, _alone():
        return ocp.load_checkpointables(path, {"data": None})["data"]


def load_state(directory: pathlib.Path, abstract: TrainState, step: int) -> TrainState:
    """Loads the state of a checkpoint of another run, which may go on meanwhile.

    Args: as for `load_model`.

    Raises:
      UserError: the checkpoint is damaged or does not fit.
    """
    with _explained(directory / str(step)) as path:
        return read_checkpoint(path, abstract)[0]


def read_checkpoint(path: pathlib.Path, abstract: TrainState) -> tuple[TrainState, dict[str, str]]:
    """Reads a whole checkpoint; a collective operation.

    Args:
      path: the checkpoint; see `path_for_orbax`.
      abstract: shapes, dtypes and shardings of the state (`jax.eval_shape` of `init`).

    Returns:
      The state and the data position.

    Raises:
      Exception: on all processes: it cannot be read, is damaged or does not fit; `reason_of` says
        why.
    """
    leaves, structure = jax.tree.flatten(abstract)
    names = list(weight_files.flatten(abstract))
    arrays, sums, data = _read(path, dict(zip(names, leaves, strict=True)))
    for name, value in stored_arrays.checksums(arrays).items():
        if str(value) != sums[name]:
            raise UserError(f"{name} does not match its checksum")
    wrapped = [
        jax.random.wrap_key_data(arrays[name]) if stored_arrays.is_key(leaf) else arrays[name]
        for name, leaf in zip(names, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, wrapped), data


def load_weights(
    directory: pathlib.Path, names: Mapping[str, jax.ShapeDtypeStruct], step: int
) -> dict[str, Array]:
    """Loads some arrays of a checkpoint.

    Args:
      directory: the folder `checkpoints` of a run.
      names: shapes, dtypes and shardings by dotted path (see `leon_jax.weight_files.flatten`).
      step: the step of the checkpoint.

    Returns:
      The arrays by the same paths.

    Raises:
      UserError: the checkpoint cannot be read, or an array is missing or has another shape.
    """
    with _explained(directory / str(step)) as path:
        return _read(path, names, is_partial=True)[0]


def _read(
    path: pathlib.Path, leaves: Mapping[str, jax.ShapeDtypeStruct], is_partial: bool = False
) -> tuple[dict[str, Array], dict[str, str], dict[str, str]]:
    """Reads arrays onto the current mesh; a collective operation.

    Args:
      path: the checkpoint.
      leaves: shapes, dtypes and shardings by name.
      is_partial: the checkpoint has more arrays.

    Returns:
      The arrays and their stored checksums by name, and the data position.

    Raises:
      UserError: another process could not read.
      Exception: this process could not read; Orbax raises many types.
    """
    reading = replicas.reading_mesh(jax.sharding.get_mesh())
    is_sent = reading != jax.sharding.get_mesh()
    loaded: dict[str, Any] = {}

    def load(parts: dict[str, Any]) -> None:
        loaded.update(ocp.load_checkpointables(path, parts))

    with _alone(is_partial):
        # All processes load equally often, because Orbax numbers its operations.
        _on_every_process(lambda: load({"checksums": None}))
        stored = dict(zip(leaves, _stored_names(leaves, loaded["checksums"]), strict=True))
        targets = {stored[name]: stored_arrays.target(leaf) for name, leaf in leaves.items()}
        sources = {name: stored_arrays.on_mesh(leaf, reading) for name, leaf in targets.items()}
        state = {"state": sources} if replicas.is_reader(reading) else {}
        _on_every_process(lambda: load({**state, "data": None}))
    arrays = loaded.get("state", {})
    if is_sent:
        arrays = replicas.send(arrays, targets)
    return (
        {name: arrays[stored[name]] for name in leaves},
        {name: loaded["checksums"][stored[name]] for name in leaves},
        loaded["data"],
    )


def _alone(is_partial: bool = False) -> ocp.Context:
    """Returns Orbax's context in which this process reads without waiting for others.

    Args:
      is_partial: an abstract tree may lack arrays of the checkpoint.
    """
    process, options = jax.process_index(), ocp.options
    return ocp.Context(
        pytree_options=options.PyTreeOptions(
            loading=options.PyTreeOptions.Loading(partial_load=is_partial)
        ),
        multiprocessing_options=options.MultiprocessingOptions(
            primary_host=process, active_processes={process}
        ),
    )


def _on_every_process(function: Callable[[], None]) -> None:
    """Calls a function, and raises an error on every process if it fails on one."""
    error: Exception | None = None
    try:
        function()
    except Exception as reason:  # Orbax raises many types; all mean that it cannot be read
        error = reason
    if not replicas.on_all_processes(error is None):
        raise error or UserError("another process could not read it")


@contextlib.contextmanager
def _explained(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields the path of a checkpoint for Orbax, and converts its errors to a UserError."""
    try:
        yield path_for_orbax(storage.absolute(path.parent)) / path.name
    except Exception as error:  # Orbax raises many types; all mean it cannot be loaded
        reason = reason_of(error, "a file is damaged, or its model has another shape")
        raise UserError(f"the checkpoint {path} cannot be loaded: {reason}") from error


def _stored_names(names: Iterable[str], stored: Container[str]) -> list[str]:
    """Returns the names of these arrays in a checkpoint.

    Older versions left out path components called `value`.
    """
    names = list(names)
    if all(name in stored for name in names):
        return names
    old_names = [weight_files.former_name(name) for name in names]
    return old_names if all(name in stored for name in old_names) else names


@functools.cache
def path_for_orbax(directory: pathlib.Path) -> pathlib.Path:
    """Returns a path to `directory` without glob characters.

    Orbax finds the arrays of all processes with `glob` on the folder's path, which fails for a
    folder such as `lr[3e-4]`. Then this returns a symbolic link in a temporary folder, which this
    process removes at exit.
    """
    if storage.is_bucket(directory) or not set("*?[]\\") & set(str(directory)):
        return directory
    folder = tempfile.mkdtemp(prefix="leon-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    link = pathlib.Path(folder, "checkpoints")
    link.symlink_to(directory, target_is_directory=True)
    return link


# Storage errors that the user can fix.
_STORAGE_ERRORS = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO,
    errno.ESTALE, errno.ENOTDIR,
)  # fmt: skip


def reason_of(error: Exception, otherwise: str) -> str:
    """Returns the reason of an error: our own message or the operating system's, not a library's.

    Args:
      error: the error; its causes are searched too. A library may quote the system's error.
      otherwise: the reason if none is known.
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
