"""The training loop, the same for every kind of model."""

import dataclasses
import pathlib
import signal
import sys
from typing import Any

import jax

from leon_jax import config as configs
from leon_jax import model_files, sharding
from leon_jax.config import UserError
from leon_jax.train.checkpoint import Checkpoints, check_config
from leon_jax.train.metrics import Metrics
from leon_jax.train.state import Program, TrainState


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """What happens beside the steps.

    Attributes:
      log_every, save_every, sample_every: in steps; the last step does all three.
      keep: how many of the newest checkpoints stay.
      mesh: sizes of the mesh axes (data, fsdp, context, tensor); one may be -1.
      init_from: a model file (`<kind>.safetensors`) whose weights a new run starts from; "" starts
        from random ones.
    """

    log_every: int = 20
    save_every: int = 200
    sample_every: int = 200
    keep: int = 2
    mesh: tuple[int, ...] = (-1, 1, 1, 1)
    init_from: str = ""

    def __post_init__(self) -> None:
        for name in ("log_every", "save_every", "sample_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


def run(program: Program, loop: LoopConfig, workdir: pathlib.Path) -> TrainState:
    """Trains `program` to `program.config.steps`, going on from the newest checkpoint if any.

    The run resumes exactly: state, data position and randomness are those of an uninterrupted run,
    so the parameters are too, bit for bit. SIGTERM and SIGINT save and end it.

    Writes `config.json`, `checkpoints/`, `metrics.jsonl`, `samples/` and, at the end, what
    `program.export` writes, into `workdir/export`.

    Must be called under `jax.set_mesh`.

    Raises:
      UserError: `workdir` cannot be written or holds a run of another configuration.
      SystemExit: a signal ended the run; code 128 + its number.
    """
    total = program.config.steps
    data = iter(program.batches())  # first, so that missing data leave no workdir behind
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        check_config(
            workdir / "config.json",
            {**configs.to_dict(program.config), "loop": configs.to_dict(loop)},
        )
    except OSError as error:
        raise UserError(f"the workdir {workdir} cannot be written: {error.strerror}") from error

    checkpoints = Checkpoints(workdir / "checkpoints", loop.keep)
    key = jax.random.key(program.config.seed)
    newest = checkpoints.latest()
    if newest is None:
        state = jax.jit(program.init)(key)
        if loop.init_from:
            arrays, _ = model_files.load(loop.init_from, program.kind)
            model = model_files.restore(state.model, arrays, loop.init_from)
            state = dataclasses.replace(state, model=model)
    else:
        state, data = checkpoints.restore(newest, jax.eval_shape(program.init, key), data)
        print(f"resumed from step {newest} in {workdir}", file=sys.stderr)

    start = int(state.step)
    metrics = Metrics(workdir, start, total)
    step_function = jax.jit(program.step, donate_argnums=0)
    stop = _StopSignal()
    for step in range(start + 1, total + 1):
        state, values = step_function(state, _to_devices(next(data)))
        metrics.add(values)
        # Read once: a signal that comes while this step is logged or saved ends the next one.
        stopped = stop.received
        last = step == total or stopped
        if last or step % loop.log_every == 0:
            metrics.report()
        if last or step % loop.save_every == 0:
            checkpoints.save(state, data)
        if last or step % loop.sample_every == 0:
            metrics.pictures(program.samples(state))
            metrics.pause()
        if stopped:
            checkpoints.close()
            metrics.close()
            print(f"stopped by a signal; step {step} is saved", file=sys.stderr)
            raise SystemExit(128 + stopped)
    checkpoints.close()
    metrics.close()
    program.export(state, workdir / "export")
    return state


def _to_devices(batch: dict[str, Any]) -> dict[str, jax.Array]:
    layout = sharding.batch_sharding()
    return {
        name: jax.make_array_from_process_local_data(layout, array) for name, array in batch.items()
    }


class _StopSignal:
    """Remembers the first SIGTERM or SIGINT; a second one acts at once."""

    def __init__(self) -> None:
        self.received = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        self.received = number
        signal.signal(number, signal.SIG_DFL)
