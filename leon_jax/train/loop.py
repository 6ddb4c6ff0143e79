"""The training loop, the same for every kind of model."""

import contextlib
import dataclasses
import pathlib
import signal
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from jaxtyping import Array

from leon_jax import config as configs
from leon_jax import weight_files
from leon_jax.config import UserError
from leon_jax.train.checkpoint import Checkpoints, check_config, load_weights
from leon_jax.train.feed import Feed
from leon_jax.train.goodput import Ledger
from leon_jax.train.metrics import SKIPPED, Metrics
from leon_jax.train.state import Program, TrainState


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """What happens beside the steps.

    Attributes:
      log_every, save_every, sample_every: in steps; the last step does all three.
      keep: how many of the newest checkpoints stay.
      mesh: sizes of the mesh axes (data, fsdp, context, tensor); one may be -1.
      slices: TPU slices (or other islands of fast links) the `data` axis is laid over first.
      data_shards: how many streams a batch is read by (see `leon_jax.train.feed`); a multiple of
        the number of processes is fastest. It cannot change within a run.
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
      UserError: `workdir` cannot be written or holds a run of another configuration; or too many
        updates in a row were not finite.
      SystemExit: a signal ended the run; code 128 + its number.
    """
    try:
        return _run(program, loop, workdir)
    except OSError as error:  # a disk that is full, gone, or not ours
        raise UserError(
            f"{error.filename or workdir} cannot be written: {error.strerror or error}; "
            "checkpoints that are whole stay, and the same command goes on from the newest"
        ) from error


def _run(program: Program, loop: LoopConfig, workdir: pathlib.Path) -> TrainState:
    total, main = program.config.steps, jax.process_index() == 0
    feed = Feed(program.batches, loop.data_shards)  # first, so that missing data leave no workdir
    workdir.mkdir(parents=True, exist_ok=True)
    wanted = {**configs.to_dict(program.config), "loop": configs.to_dict(loop)}
    check_config(workdir / "config.json", wanted)
    ledger = Ledger(workdir / "goodput.json" if main else None)
    checkpoints = Checkpoints(workdir / "checkpoints", loop.keep)
    state = _first_state(program, loop.init_from, checkpoints, feed, workdir)
    start = int(state.step)
    ledger.resumed(start)
    metrics = Metrics(workdir if main else None, start, total, program.flops_per_token)
    with contextlib.closing(metrics):
        state = _steps(program, loop, workdir, state, feed, checkpoints, ledger, metrics)
    with ledger.spend("sample"):
        program.export(state, workdir / "export")
    ledger.report(total)
    if main:
        print(f"wall time {ledger.summary()}", file=sys.stderr)
    return state


def _steps(
    program: Program,
    loop: LoopConfig,
    workdir: pathlib.Path,
    state: TrainState,
    feed: Feed,
    checkpoints: Checkpoints,
    ledger: Ledger,
    metrics: Metrics,
) -> TrainState:
    """All steps from `state` on, with what happens beside them; the last one is saved."""
    start, total = int(state.step), program.config.steps
    values: dict[str, jax.Array] = {}  # metrics of the newest step
    stop = _StopSignal()
    skipped = 0
    if start < total:
        batch = next(feed)
        with ledger.spend("compile"):
            step_function = compile_step(program.step, state, batch)
        ledger.switch("step")
    for step in range(start + 1, total + 1):
        if values:
            ledger.switch("input")
            batch = next(feed)
            # Waiting for a batch costs nothing while the devices still work on the step before.
            idle = values[SKIPPED].is_ready()  # type: ignore[attr-defined]  # stubs lack it
            ledger.switch("step", was="input" if idle else "step")
        with jax.transfer_guard("disallow"):
            state, values = step_function(state, batch)
        metrics.add(values)
        # Read once: a signal that comes while this step is logged or saved ends the next one.
        stopped = stop.received(step)
        last = step == total or stopped
        if last or step % loop.log_every == 0:
            fetched = metrics.fetch()
            skipped = _in_a_row(skipped, fetched[SKIPPED])
            metrics.report(fetched, ledger.report(step))
        failed = skipped >= loop.max_skipped
        if last or failed or step % loop.save_every == 0:
            with ledger.spend("checkpoint"):
                checkpoints.save(state, feed.get_state())
        if last or step % loop.sample_every == 0:
            with ledger.spend("sample"):
                metrics.pictures(program.samples(state))
            metrics.pause()
        if stopped or failed:
            with ledger.spend("checkpoint"):
                checkpoints.close()
            ledger.report(step)
            if failed:
                raise UserError(
                    f"{skipped} updates in a row, up to step {step}, had a loss or gradient that "
                    "is not finite; none of them was made, and the state before them is saved in "
                    f"{workdir}. Lower the learning rate or look at the data before going on"
                )
            print(f"stopped by a signal; step {step} is saved", file=sys.stderr)
            raise SystemExit(128 + stopped)
    ledger.switch("checkpoint")
    checkpoints.close()
    return state


def compile_step(step: Callable, state: Any, batch: Any) -> jax.stages.Compiled:
    """The step as `run` runs it, compiled; see `lower_step`."""
    return lower_step(step, state, batch).compile()


def lower_step(step: Callable, state: Any, batch: Any) -> jax.stages.Lowered:
    """The step as `run` runs it, for these shapes and layouts; abstract ones will do.

    It leaves out an update whose metrics are not finite, counts it in the metric `SKIPPED`, and
    reuses the memory of the state it is given.
    """

    def guarded(state: TrainState, batch: dict[str, Array]) -> tuple[TrainState, dict[str, Array]]:
        updated, metrics = step(state, batch)
        finite = jnp.all(jnp.stack([jnp.isfinite(value).all() for value in metrics.values()]))
        model, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (updated.model, updated.opt_state),
            (state.model, state.opt_state),
        )
        kept = TrainState(updated.step, model, opt_state, updated.key)
        return kept, {**metrics, SKIPPED: 1.0 - finite}

    return jax.jit(guarded, donate_argnums=0).lower(state, batch)


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
        wanted = dict(zip(names, leaves, strict=True))
        found = load_weights(pathlib.Path(init_from) / "checkpoints", wanted)
        model = jax.tree.unflatten(structure, [found[name] for name in names])
    else:
        arrays, _ = weight_files.load(init_from, program.kind)
        model = weight_files.restore(state.model, arrays, init_from)
    return dataclasses.replace(state, model=model)


def _in_a_row(before: int, skipped: Any) -> int:
    """How many of the newest updates were skipped, one after the other."""
    for flag in skipped:
        before = before + 1 if flag else 0
    return before


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
