"""Saves and restores training checkpoints: the training state and the data position.

A thin layer over Orbax v1, which writes while training continues. A step's folder gets its final
name only when it is complete, so a crash leaves no partial checkpoint. Every array has a checksum,
so that storage errors are detected too. Restoring takes the newest checkpoint that is intact.
"""

import contextlib
import logging
import math
import pathlib
import sys
import threading
import traceback
from collections.abc import Mapping
from typing import Any

import jax
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from leon_jax import storage, weight_files
from leon_jax.config import UserError
from leon_jax.train import stored_arrays
from leon_jax.train.checkpoint_reader import path_for_orbax, read_checkpoint, reason_of
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
      keep_every: checkpoints of multiples of this step are kept, too. 0: none.

    Attributes:
      best_loss: the lowest held-out loss of a saved checkpoint; infinity if none has one.

    Raises:
      UserError: `directory` cannot be written.
    """

    def __init__(
        self, directory: pathlib.Path, keep: int = 2, documents: str = "", keep_every: int = 0
    ) -> None:
        logging.getLogger("absl").addFilter(_is_useful)
        threading.excepthook = _thread_failed
        self._directory, self._documents = storage.absolute(directory), documents
        self._keep, self._keep_every = keep, keep_every
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
            try:
                loaded = read_checkpoint(path_for_orbax(self._directory) / str(step), abstract)
            except Exception as error:  # on all processes; Orbax raises many types
                problems[step] = reason_of(
                    error, "a file is missing or damaged, or its arrays do not fit"
                )
                continue
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
        preserved = [preserve.LatestN(self._keep), best]
        if self._keep_every:
            preserved.append(preserve.EveryNSteps(self._keep_every))
        try:
            storage.make_folder(self._directory)
            self._checkpointer = policies.Checkpointer(
                path_for_orbax(self._directory),
                save_decision_policy=policies.save_decision_policies.FixedIntervalPolicy(1),
                preservation_policy=preserve.AnyPreservationPolicy(preserved),
                cleanup_tmp_directories=True,
            )
        except OSError as error:
            raise UserError(
                f"checkpoints cannot be saved in {self._directory}: "
                f"{reason_of(error, 'it is not a writable folder')}"
            ) from error
        saved, documents = _best(self._checkpointer), self._documents
        self.best_loss = math.inf
        if saved is not None and saved.metrics.get(_DOCUMENTS, documents) == documents:
            self.best_loss = saved.metrics[_LOSS]

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
        reason = reason_of(error, "its storage reported an error")
        return UserError(
            f"a checkpoint could not be written into {self._directory}: {reason}; {last}"
        )


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
        path = path_for_orbax(storage.absolute(directory))
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
