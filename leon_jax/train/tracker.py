"""Sends a run's metrics to an experiment tracker, beside TensorBoard.

The interface is that of Weights & Biases: the functions `init`, `log` and `finish`, and the class
`Image`. Trackio has the same. Both are imported by name, only if a run uses them.
"""

import importlib
import inspect
import json
import sys
import uuid
from collections.abc import Mapping
from typing import Any

import numpy as np

from leon_jax import storage
from leon_jax.config import UserError
from leon_jax.train.workdir import Workdir

# Names of the modules with this interface.
TRACKERS = ("wandb", "trackio")
_PROJECT = "leon_jax"


def split(log_to: str) -> tuple[str, str]:
    """Returns the module and the project of `loop.log_to`, for example "wandb:cats".

    Raises:
      ValueError: the module is unknown, or the project is empty.
    """
    module, colon, project = log_to.partition(":")
    if module not in TRACKERS or (colon and not project):
        raise ValueError(
            f"log_to is {log_to!r}; it must be {' or '.join(TRACKERS)}, or one of them with a "
            "project, for example wandb:cats"
        )
    return module, project or _PROJECT


class Tracker:
    """One run in an experiment tracker; all starts of a training run continue it.

    If the tracker fails later, one sentence says so, and the training goes on without it.

    Args:
      log_to: see `split`.
      workdir: the folder of the run, which receives `tracker.json` with the run's name there.
      config: the configuration of the run.

    Raises:
      UserError: the package is not installed, or does not start, for example without a login.
    """

    def __init__(self, log_to: str, workdir: Workdir, config: Mapping[str, Any]) -> None:
        self._module_name, project = split(log_to)
        try:
            self._module = importlib.import_module(self._module_name)
        except ImportError as error:
            raise UserError(
                f"config.loop.log_to is {log_to!r}, but {self._module_name} is not installed; run "
                f"pip install {self._module_name}"
            ) from error
        name = _run_name(workdir)
        arguments = {"id": name, "dir": str(workdir.files)}
        known = inspect.signature(self._module.init).parameters
        try:
            self._module.init(
                project=project,
                name=name,
                config=dict(config),
                resume="allow",
                **{key: value for key, value in arguments.items() if key in known},
            )
        except Exception as error:  # the packages raise errors of their own
            raise UserError(
                f"config.loop.log_to is {log_to!r}, but {self._module_name} does not start: "
                f"{error}; for use without a network set WANDB_MODE=offline"
            ) from error
        self._is_active = True

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Logs numbers by name."""
        self._call(lambda: self._module.log(dict(values), step=step))

    def log_images(self, images: Mapping[str, np.ndarray], step: int) -> None:
        """Logs images, uint8[h, w, 3] by name."""
        self._call(
            lambda: self._module.log(
                {name: self._module.Image(pixels) for name, pixels in images.items()}, step=step
            )
        )

    def close(self) -> None:
        """Waits until everything is sent or stored."""
        self._call(self._module.finish)

    def _call(self, function: Any) -> None:
        if not self._is_active:
            return
        try:
            function()
        except Exception as error:  # a tracker must not end a run
            self._is_active = False
            print(
                f"leon train: {self._module_name} failed, so the run goes on without it: {error}",
                file=sys.stderr,
            )


def _run_name(workdir: Workdir) -> str:
    """Returns the name of a run, which is unique and the same at every start."""
    path = workdir.files / "tracker.json"
    if not path.exists():
        name = f"{storage.absolute(workdir.path).name}-{uuid.uuid4().hex[:8]}"
        path.write_text(json.dumps({"run": name}) + "\n")
    return str(json.loads(path.read_text())["run"])
