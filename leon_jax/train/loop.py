"""The training loop, the same for every kind of model."""

import contextlib
import dataclasses
import pathlib
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Float64

from leon_jax import config as configs
from leon_jax import file_lock, weight_files
from leon_jax.config import UserError
from leon_jax.train.checkpoint import (
    Checkpoints,
    check_config,
    load_weights,
    on_all_processes,
)
from leon_jax.train.global_batches import Feed
from leon_jax.train.goodput import GoodputTracker
from leon_jax.train.metrics import SKIPPED, Metrics
from leon_jax.train.state import Program, TrainState

# (state, batch) -> (state after one update, scalar metrics).
Step = Callable[[TrainState, dict[str, Array]], tuple[TrainState, dict[str, Array]]]


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """What happens beside the steps.

    Attributes:
      log_every, save_every, sample_every: in steps; the last step does all three.
      keep: how many of the newest checkpoints stay.
      mesh: sizes of the mesh axes (data, fsdp, context, tensor); one may be -1.
      slices: TPU slices (or other islands of fast links) the `data` axis is laid over first.
      data_shards: how many streams a batch is read by (see `leon_jax.train.global_batches`). A
        multiple of the number of processes is fastest. It cannot change within a run.
      max_skipped: so many updates in a row with a loss or gradient that is not finite end the run.
      init_from: whose weights a new run starts from: a model file (`<kind>.safetensors`), or the
        workdir of another run (its newest checkpoint); "" starts from random ones.
    """

    log_every: int = 20
    save_every: int = 200
    sample_every: int = 200
    keep: int = 2
    mesh: tuple[int, ...] = (-1, 1, 1, 1)
    slices: int = 1
    data_shards: int = 1
    max_skipped: int = 20
    init_from: str = ""

    def __post_init__(self) -> None:
        counts = (
            "log_every", "save_every", "sample_every", "keep", "slices", "data_shards",
            "max_skipped",
        )  # fmt: skip
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


def run(program: Program, loop: LoopConfig, workdir: pathlib.Path) -> TrainState:
    """Trains `program` to `program.config.steps`, going on from the newest checkpoint if any.

    The run resumes exactly: state, data position and randomness are those of an uninterrupted run,
    so the parameters are too, bit for bit. SIGTERM and SIGINT save and end it. An update whose loss
    or gradient is not finite is left out. The step is compiled once, ahead of the first one, so
    nothing is ever compiled again, and nothing but batches and metrics moves between host and
    devices.

    Writes `config.json`, `checkpoints/`, `metrics.jsonl`, `goodput.json`, `samples/` and, at the
    end, what `program.export` writes, into `workdir/export`.

    Must be called under `jax.set_mesh`, by all processes of the mesh.

    Raises:
      UserError: `workdir` cannot be written, is used by another run, or holds a run of another
        configuration; or too many updates in a row were not finite.
      SystemExit: a signal ended the run; code 128 + its number.
    """
    total, is_main = program.config.steps, jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(_name_what_cannot_be_written(workdir))

        # Data. First, so that missing data leave no workdir.
        feed = Feed(program.batches, loop.data_shards)

        # Workdir.
        workdir.mkdir(parents=True, exist_ok=True)
        stack.enter_context(_only_run_in(workdir))
        run_config = {**configs.to_dict(program.config), "loop": configs.to_dict(loop)}
        check_config(workdir / "config.json", run_config)
        goodput = GoodputTracker(workdir / "goodput.json" if is_main else None)
        checkpoints = Checkpoints(workdir / "checkpoints", loop.keep)

        # State: the newest checkpoint, the weights of another run, or random weights.
        state = _first_state(program, loop.init_from, checkpoints, feed, workdir)
        start = int(state.step)
        goodput.resume(start)
        metrics = Metrics(workdir if is_main else None, start, total, program.flops_per_token)
        stack.enter_context(contextlib.closing(metrics))

        # Compile.
        stop_signal, skipped_in_a_row = _StopSignal(), 0
        if start < total:
            batch = next(feed)
            with goodput.spend("compile"):
                step_function = jax.jit(skip_nonfinite(program.step), donate_argnums=0)
                train_step = step_function.lower(state, batch).compile()
            goodput.switch("step")

        # Loop.
        values: dict[str, jax.Array] = {}  # metrics of the last step
        for step in range(start + 1, total + 1):
            if values:
                goodput.switch("input")
                batch = next(feed)
                # Waiting for a batch costs nothing while the devices still work on the last step.
                idle = values[SKIPPED].is_ready()  # type: ignore[attr-defined]  # stubs lack it
                goodput.switch("step", was="input" if idle else "step")
            with jax.transfer_guard("disallow"):
                state, values = train_step(state, batch)
            metrics.add(values)

            # Read once: a signal that comes while this step is logged or saved ends the next one.
            signal_number = stop_signal.received(step)
            is_last = step == total or bool(signal_number)
            if is_last or step % loop.log_every == 0:
                fetched = metrics.fetch()
                skipped_in_a_row = _count_in_a_row(skipped_in_a_row, fetched[SKIPPED])
                metrics.report(fetched, goodput.report(step))
            has_failed = skipped_in_a_row >= loop.max_skipped
            if is_last or has_failed or step % loop.save_every == 0:
                with goodput.spend("checkpoint"):
                    checkpoints.save(state, feed.get_state())
            if is_last or step % loop.sample_every == 0:
                with goodput.spend("sample"):
                    metrics.save_images(program.samples(state))
                metrics.pause()

            if signal_number or has_failed:
                with goodput.spend("checkpoint"):
                    checkpoints.close()
                goodput.report(step)
                if has_failed:
                    raise UserError(
                        f"{skipped_in_a_row} updates in a row, up to step {step}, had a loss or "
                        "gradient that is not finite; none of them was made, and the state before "
                        f"them is saved in {workdir}. Lower the learning rate or look at the data "
                        "before going on"
                    )
                print(f"stopped by a signal; step {step} is saved", file=sys.stderr)
                raise SystemExit(128 + signal_number)

        # Export.
        goodput.switch("checkpoint")
        checkpoints.close()
        with goodput.spend("sample"):
            program.export(state, workdir / "export")
            if jax.process_count() > 1:
                # No process ends before the last file is written.
                multihost_utils.sync_global_devices("export")
        goodput.report(total)
        if is_main:
            print(f"wall time {goodput.summary()}", file=sys.stderr)
        return state


def skip_nonfinite(step: Step) -> Step:
    """`step`, but an update whose metrics are not finite is left out.

    Such an update leaves the model and the optimizer's state as they were, and still counts as a
    step. The metric `SKIPPED` is 1 for it, else 0.
    """

    def train_step(
        state: TrainState, batch: dict[str, Array]
    ) -> tuple[TrainState, dict[str, Array]]:
        updated, metrics = step(state, batch)
        is_finite = jnp.all(jnp.stack([jnp.isfinite(value).all() for value in metrics.values()]))
        model, opt_state = jax.tree.map(
            lambda new, old: jnp.where(is_finite, new, old),
            (updated.model, updated.opt_state),
            (state.model, state.opt_state),
        )
        state = TrainState(updated.step, model, opt_state, updated.key)
        return state, {**metrics, SKIPPED: 1.0 - is_finite}

    return train_step


@contextlib.contextmanager
def _name_what_cannot_be_written(workdir: pathlib.Path) -> Iterator[None]:
    """Turns the errors of a disk that is full, gone or not ours into a UserError."""
    try:
        yield
    except OSError as error:
        reason = f": {error.strerror}" if error.strerror else ""
        raise UserError(
            f"{error.filename or workdir} cannot be written{reason}; checkpoints that are whole "
            "stay, and the same command goes on from the newest"
        ) from error


@contextlib.contextmanager
def _only_run_in(workdir: pathlib.Path) -> Iterator[None]:
    """Holds `workdir` against other runs; process 0 does, for all processes of its run."""

    def refuse() -> None:
        raise UserError(
            f"another run is training in {workdir}; wait for its end, or use another --workdir"
        )

    with contextlib.ExitStack() as stack:
        refusal = None
        if jax.process_index() == 0:
            try:
                stack.enter_context(file_lock.hold(workdir / "lock", refuse))
            except file_lock.NoLocks as error:
                print(f"{error}; a second run in {workdir} would not be noticed", file=sys.stderr)
            except UserError as error:
                refusal = error
        if not on_all_processes(refusal is None):
            raise refusal or UserError(f"process 0 cannot use {workdir}, and says why")
        yield


def _first_state(
    program: Program, init_from: str, checkpoints: Checkpoints, feed: Feed, workdir: pathlib.Path
) -> TrainState:
    """A new state, or the newest saved one; then `feed` goes to where it was saved."""
    key = jax.random.key(program.config.seed)
    abstract = jax.eval_shape(program.init, key)
    if checkpoints.latest() is not None:
        step, state, position = checkpoints.restore(abstract)
        feed.set_state(position)
        print(f"resumed from step {step} in {workdir}", file=sys.stderr)
        return state
    state = jax.jit(program.init)(key)
    if not init_from:
        return state
    if pathlib.Path(init_from).is_dir():
        leaves, structure = jax.tree.flatten(abstract.model)
        names = [f"model.{name}" for name in weight_files.flatten(abstract.model)]
        shapes = dict(zip(names, leaves, strict=True))
        arrays = load_weights(pathlib.Path(init_from) / "checkpoints", shapes)
        model = jax.tree.unflatten(structure, [arrays[name] for name in names])
    else:
        stored, _ = weight_files.load(init_from, program.kind)
        model = weight_files.restore(state.model, stored, init_from)
    return dataclasses.replace(state, model=model)


def _count_in_a_row(count: int, skipped: Float64[np.ndarray, "steps"]) -> int:
    """How many of the newest updates were skipped, one after the other; `count` were before."""
    for flag in skipped:
        count = count + 1 if flag else 0
    return count


class _StopSignal:
    """Remembers the first SIGTERM or SIGINT; a second one acts at once.

    Several processes must stop after the same step, so there JAX listens for SIGTERM and says when
    all of them have heard it.
    """

    def __init__(self) -> None:
        self._number = 0
        listened = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ()
        for number in listened:
            signal.signal(number, self._handle)

    def received(self, step: int) -> int:
        """The number of the signal to stop for after this step; 0: go on."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            return signal.SIGTERM
        return self._number

    def _handle(self, number: int, frame: Any) -> None:
        self._number = number
        signal.signal(number, signal.SIG_DFL)
