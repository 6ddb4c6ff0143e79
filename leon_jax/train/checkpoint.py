"""Saves and restores training checkpoints: the training state and the data position.

A thin layer over Orbax v1, which writes while training continues. A step's folder gets its final
name only when it is complete, so a crash leaves no partial checkpoint. Every array has a checksum,
so that storage errors are detected too. Restoring takes the newest checkpoint that is intact.
"""

import atexit
import contextlib
import errno
import functools
import logging
import math
import os
import pathlib
import shutil
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array
from orbax.checkpoint import v1 as ocp

from leon_jax import storage, weight_files
from leon_jax.config import UserError
from leon_jax.train import stored_arrays
from leon_jax.train.state import TrainState

# What Orbax stores with a checkpoint that was the best when it was saved: its held-out loss, the
# documents of the loss in words, and its step (earlier versions: the loss). The newest is the best.
_LOSS, _DOCUMENTS, _STEP = "held_out_loss", "documents", "step"
# The file that Orbax writes last into a checkpoint in a bucket.
_COMMIT = "commit_success.txt"


class Checkpoints:
    """Saves and restores the checkpoints of one run.

    Args:
      directory: folder of the checkpoints; created if missing. Damaged checkpoints are moved to
        `damaged_checkpoints` next to it.
      keep: number of newest checkpoints to keep. The best one is kept, too.
      documents: the held-out documents in words. Losses on other documents are not compared.

    Attributes:
      best_loss: the lowest held-out loss of a saved checkpoint; infinity if none has one.

    Raises:
      UserError: `directory` cannot be written.
    """

    def __init__(self, directory: pathlib.Path, keep: int = 2, documents: str = "") -> None:
        logging.getLogger("absl").addFilter(_is_useful)
        threading.excepthook = _thread_failed
        self._directory, self._keep, self._documents = storage.absolute(directory), keep, documents
        self.best_loss = math.inf
        self._open()

    def latest(self) -> int | None:
        """Returns the step of the newest complete checkpoint, or None."""
        newest = self._checkpointer.latest
        return None if newest is None else newest.step

    def save(
        self, state: TrainState, data: Mapping[str, str], held_out_loss: float | None = None
    ) -> None:
        """Copies the arrays, then writes the checkpoint in the background.

        Args:
          state: the state after a step.
          data: the data position, strings by name.
          held_out_loss: the loss of the state, if it is lower than `best_loss`, which it replaces.
            The checkpoint is kept until a later one has a lower loss.

        Raises:
          UserError: this or the previous checkpoint could not be written, for example because the
            disk is full.
        """
        step, metrics = int(state.step), None
        if held_out_loss is not None:
            metrics = {_LOSS: held_out_loss, _DOCUMENTS: self._documents, _STEP: step}
        arrays = {
            name: stored_arrays.raw(leaf) for name, leaf in weight_files.flatten(state).items()
        }
        sums = {name: str(value) for name, value in stored_arrays.checksums(arrays).items()}
        try:
            self._checkpointer.save_checkpointables_async(
                step,
                {"state": arrays, "data": dict(data), "checksums": sums},
                force=True,
                metrics=metrics,
            )
            self.best_loss = self.best_loss if held_out_loss is None else held_out_loss
        except Exception as error:  # Orbax raises many types, mostly ValueError
            raise self._write_error(error) from error

    def restore(self, abstract: TrainState) -> tuple[int, TrainState, dict[str, str]]:
        """Restores the newest intact checkpoint.

        Damaged checkpoints are reported on stderr and moved to `damaged_checkpoints`.

        Args:
          abstract: shapes, dtypes and shardings to restore into (`jax.eval_shape` of `init`). The
            mesh and the number of processes may differ from those that saved.

        Returns:
          The step, the state, and the data position that `save` received.

        Raises:
          UserError: no checkpoint is intact and fits this configuration.
        """
        steps = sorted((saved.step for saved in self._checkpointer.checkpoints), reverse=True)
        problems: dict[int, str] = {}
        for step in steps:
            loaded = None
            try:
                loaded = self._load(step, abstract)
            except Exception as error:  # Orbax raises many types; all mean it cannot be restored
                problems[step] = _reason(
                    error, "a file is missing or damaged, or its arrays do not fit"
                )
            if not on_all_processes(loaded is not None):
                problems.setdefault(step, "another process could not read it")
                continue
            assert loaded is not None
            for damaged, problem in problems.items():
                self._move_damaged(damaged, problem)
            if problems:
                self._checkpointer.close()
                self._open()
            return step, *loaded
        newest = f" (the newest, step {steps[0]}: {problems[steps[0]]})" if steps else ""
        raise UserError(
            f"none of the {len(steps)} checkpoints in {self._directory} is intact and fits this "
            f"configuration{newest}; restore the configuration, or use another --workdir"
        )

    def close(self) -> None:
        """Waits until the last checkpoint is written.

        Raises:
          UserError: it could not be written.
        """
        try:
            self._checkpointer.close()
        except Exception as error:
            raise self._write_error(error) from error

    def _open(self) -> None:
        policies, preserve = ocp.training, ocp.training.preservation_policies
        best = preserve.BestN(
            get_metric_fn=lambda metrics: metrics.get(_STEP, 0),
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        try:
            storage.make_folder(self._directory)
            self._checkpointer = policies.Checkpointer(
                _path_for_orbax(self._directory),
                save_decision_policy=policies.save_decision_policies.FixedIntervalPolicy(1),
                preservation_policy=preserve.AnyPreservationPolicy(
                    [preserve.LatestN(self._keep), best]
                ),
                cleanup_tmp_directories=True,
            )
        except OSError as error:
            raise UserError(
                f"checkpoints cannot be saved in {self._directory}: "
                f"{_reason(error, 'it is not a writable folder')}"
            ) from error
        saved, documents = _best(self._checkpointer), self._documents
        self.best_loss = math.inf
        if saved is not None and saved.metrics.get(_DOCUMENTS, documents) == documents:
            self.best_loss = saved.metrics[_LOSS]

    def _load(self, step: int, abstract: TrainState) -> tuple[TrainState, dict[str, str]]:
        return _load(functools.partial(self._checkpointer.load_checkpointables, step), abstract)

    def _move_damaged(self, step: int, problem: str) -> None:
        target = self._directory.with_name("damaged_checkpoints") / str(step)
        print(f"checkpoint {step} is damaged ({problem}); moved to {target}", file=sys.stderr)
        if jax.process_index() == 0:
            storage.move(self._directory / str(step), target)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"damaged checkpoint {step}")

    def _write_error(self, error: Exception) -> UserError:
        steps = complete_steps(self._directory)
        last = f"the last good one is of step {max(steps)}" if steps else "no earlier one exists"
        reason = _reason(error, "its storage reported an error")
        return UserError(
            f"a checkpoint could not be written into {self._directory}: {reason}; {last}"
        )


@functools.cache
def _path_for_orbax(directory: pathlib.Path) -> pathlib.Path:
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


def on_all_processes(condition: bool) -> bool:
    """Returns whether `condition` holds on all processes; a collective operation."""
    if jax.process_count() == 1:
        return condition
    return bool(multihost_utils.process_allgather(np.array(condition)).all())


def complete_steps(directory: pathlib.Path) -> list[int]:
    """Returns the steps of the complete checkpoints in a folder, in ascending order.

    On a disk Orbax renames a complete checkpoint to its step. In a bucket it writes the file
    `commit_success.txt` last.
    """
    steps = [path for path in directory.glob("*") if path.name.isdigit()]
    if storage.is_bucket(directory):
        steps = [path for path in steps if (path / _COMMIT).exists()]
    return sorted(int(path.name) for path in steps)


def find_step(directory: pathlib.Path, step: str) -> int:
    """Returns the step of a checkpoint.

    Args:
      directory: the folder `checkpoints` of a run, which may go on meanwhile.
      step: "newest", "best" (the lowest held-out loss), or a number.

    Raises:
      UserError: there is no such checkpoint.
    """
    steps = complete_steps(directory)
    if not steps:
        raise UserError(f"there is no checkpoint in {directory}")
    if step == "newest":
        return steps[-1]
    if step == "best":
        path = _path_for_orbax(storage.absolute(directory))
        with contextlib.closing(ocp.training.Checkpointer(path)) as checkpointer:
            best = _best(checkpointer)
        if best is None:
            raise UserError(
                f"no checkpoint in {directory} has a held-out loss; set config.loop.eval_every in "
                "training"
            )
        return best.step
    if not step.isdecimal() or int(step) not in steps:
        raise UserError(
            f"there is no checkpoint of step {step} in {directory}; its steps are "
            f"{', '.join(map(str, steps))}"
        )
    return int(step)


def _best(checkpointer: ocp.training.Checkpointer) -> Any:
    """Returns the description of the best checkpoint, or None."""
    measured = [saved for saved in checkpointer.checkpoints if saved.metrics is not None]
    return measured[-1] if measured else None


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
    with _explained(directory / str(step)) as path:
        return ocp.load_checkpointables(path, {"data": None})["data"]


def load_state(directory: pathlib.Path, abstract: TrainState, step: int) -> TrainState:
    """Loads the state of a checkpoint of another run, which may go on meanwhile.

    Args: as for `load_model`.

    Raises:
      UserError: the checkpoint is damaged or does not fit.
    """
    with _explained(directory / str(step)) as path:
        return _load(functools.partial(ocp.load_checkpointables, path), abstract)[0]


@contextlib.contextmanager
def _explained(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields the path of a checkpoint for Orbax, and converts its errors to a UserError."""
    try:
        yield _path_for_orbax(storage.absolute(path.parent)) / path.name
    except Exception as error:  # Orbax raises many types; all mean it cannot be loaded
        reason = _reason(error, "a file is damaged, or its model has another shape")
        raise UserError(f"the checkpoint {path} cannot be loaded: {reason}") from error


def _load(
    load: Callable[[dict[str, Any]], dict[str, Any]], abstract: TrainState
) -> tuple[TrainState, dict[str, str]]:
    """Returns the state and the data position of a checkpoint.

    Args:
      load: Orbax's function that loads parts of the checkpoint.
      abstract: shapes, dtypes and shardings of the state.
    """
    leaves, structure = jax.tree.flatten(abstract)
    sums = load({"checksums": None})["checksums"]
    names = _stored_names(weight_files.flatten(abstract), sums)
    targets = {name: stored_arrays.target(leaf) for name, leaf in zip(names, leaves, strict=True)}
    loaded = load({"state": targets, "data": None})
    actual_sums = {
        name: str(value) for name, value in stored_arrays.checksums(loaded["state"]).items()
    }
    if damaged := [name for name in names if actual_sums[name] != sums[name]]:
        raise UserError(f"{damaged[0]} does not match its checksum")
    arrays = [
        jax.random.wrap_key_data(loaded["state"][name]) if stored_arrays.is_key(leaf) else array
        for name, leaf in zip(names, leaves, strict=True)
        for array in [loaded["state"][name]]
    ]
    return jax.tree.unflatten(structure, arrays), loaded["data"]


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
    options = ocp.options.PyTreeOptions(
        loading=ocp.options.PyTreeOptions.Loading(partial_load=True)
    )
    with _explained(directory / str(step)) as path, ocp.Context(pytree_options=options):
        sums = ocp.load_checkpointables(path, {"checksums": None})["checksums"]
        stored = dict(zip(names, _stored_names(names, sums), strict=True))
        targets = {stored[name]: stored_arrays.target(leaf) for name, leaf in names.items()}
        arrays = ocp.load_checkpointables(path, {"state": targets})["state"]
        return {name: arrays[stored[name]] for name in names}


def _stored_names(names: Iterable[str], stored: Container[str]) -> list[str]:
    """Returns the names of these arrays in a checkpoint.

    Older versions left out path components called `value`.
    """
    names = list(names)
    if all(name in stored for name in names):
        return names
    old_names = [weight_files.former_name(name) for name in names]
    return old_names if all(name in stored for name in old_names) else names


# Storage errors that the user can fix.
_STORAGE_ERRORS = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO,
    errno.ESTALE, errno.ENOTDIR,
)  # fmt: skip


def _reason(error: Exception, otherwise: str) -> str:
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


def _is_useful(record: logging.LogRecord) -> bool:
    """Rejects Orbax's errors, which it also raises, and warnings about folders without arrays."""
    if "orbax" in record.pathname and record.levelno >= logging.ERROR:
        return False
    return "No per-process OCDBT" not in record.getMessage()


def _thread_failed(failure: threading.ExceptHookArgs) -> None:
    """Prints the exception of a thread, unless Orbax raises it again at its next call."""
    frames = traceback.extract_tb(failure.exc_traceback)
    if not any("orbax" in frame.filename for frame in frames):
        threading.__excepthook__(failure)
