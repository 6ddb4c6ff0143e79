"""Writes XProf traces of training steps into the workdir.

The trace of a host goes to `profiles/plugins/profile/step_N/host_I.xplane.pb`, where N is the first
step and I the index of the process. This is the layout that XProf and TensorBoard read; the files
of all hosts of one step are one profile.
"""

import contextlib
import pathlib
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import jax

from leon_jax import storage

# The signal that starts a trace, and the number of steps that it then has.
SIGNAL = signal.SIGUSR1
SIGNAL_STEPS = 5


class Profiler:
    """Traces steps that the configuration names, and the next ones after `SIGNAL`.

    A signal concerns the process that receives it. Use it as a context, which ends a trace that is
    not complete.

    Args:
      workdir: the folder of the run.
      steps: () or (first step, number of steps).
    """

    def __init__(self, workdir: pathlib.Path, steps: Sequence[int]) -> None:
        self._folder = workdir / "profiles" / "plugins" / "profile"
        self._first, self._count = steps or (0, 0)
        self._is_requested = False
        self._range: tuple[int, int] | None = None  # first and last step of the current trace
        self._traces = tempfile.TemporaryDirectory(prefix="leon-")
        signal.signal(SIGNAL, self._request)

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()
        # The default effect of the signal would end the process.
        signal.signal(SIGNAL, signal.SIG_IGN)
        self._traces.cleanup()

    def start(self, step: int) -> None:
        """Starts a trace if one begins with this step; call it before the batch is read."""
        if self._range is not None:
            return
        if step == self._first:
            self._range = step, step + self._count - 1
        elif self._is_requested:
            self._range = step, step + SIGNAL_STEPS - 1
        else:
            return
        self._is_requested = False
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # it would fill the trace with calls
        try:
            jax.profiler.start_trace(self._traces.name, profiler_options=options)
        except RuntimeError as error:  # another trace is being taken
            self._range = None
            print(f"leon train: no profile of step {step}: {error}", file=sys.stderr)

    def annotated(self, step: int) -> contextlib.AbstractContextManager:
        """Returns a context for the call of a step, which marks the step in a trace."""
        if self._range is None:
            return contextlib.nullcontext()
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def end(self, step: int, outputs: Any) -> None:
        """Ends the trace if this step is its last one; waits for the outputs of the step."""
        if self._range is not None and step >= self._range[1]:
            jax.block_until_ready(outputs)
            self._stop()

    def _stop(self) -> None:
        if self._range is None:
            return
        (first, last), self._range = self._range, None
        jax.profiler.stop_trace()
        target = self._folder / f"step_{first:07d}"
        storage.make_folder(target)
        traces = pathlib.Path(self._traces.name)
        for path in traces.rglob("*.xplane.pb"):
            name = f"host_{jax.process_index():04d}.xplane.pb"
            storage.write(target / name, path.read_bytes())
        for path in traces.iterdir():
            shutil.rmtree(path)
        print(f"leon train: a profile of steps {first} to {last} is in {target}", file=sys.stderr)

    def _request(self, number: int, frame: object) -> None:
        self._is_requested = True
