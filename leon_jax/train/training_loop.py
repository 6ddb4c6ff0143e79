"""The training loop, which all kinds of models share."""

import contextlib
import dataclasses
import pathlib
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Float64

from leon_jax import config as configs
from leon_jax import storage, weight_files
from leon_jax.config import UserError
from leon_jax.train import compiler_presets
from leon_jax.train.branch import Branch
from leon_jax.train.checkpoint import Checkpoints, find_step
from leon_jax.train.checkpoint_reader import load_model, load_state
from leon_jax.train.evaluation import Evaluator
from leon_jax.train.global_batches import Feed
from leon_jax.train.goodput import GoodputTracker
from leon_jax.train.host_times import HostTimes
from leon_jax.train.metrics import SKIPPED, Metrics, drop_after
from leon_jax.train.optimizer import averaged
from leon_jax.train.profiler import Profiler
from leon_jax.train.run_config import check_config
from leon_jax.train.state import Program, TrainState
from leon_jax.train.tracker import Tracker, split
from leon_jax.train.watchdog import Watchdog
from leon_jax.train.workdir import open_workdir

# (state, batch) -> (state after one update, scalar metrics).
Step = Callable[[TrainState, dict[str, Array]], tuple[TrainState, dict[str, Array]]]


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """Configuration of the loop: logging, checkpoints, mesh and initialisation.

    Attributes:
      log_every, save_every, sample_every: periods in steps; the last step does all three.
      keep: number of newest checkpoints to keep.
      keep_every: the checkpoint of every multiple of this many steps is saved, and kept for good.
        0: none.
      mesh: sizes of the mesh axes (data, fsdp, context, tensor); one may be -1.
      slices: number of TPU slices, or other groups of devices with fast links, that the `data`
        axis spans.
      data_shards: number of data shards (see `leon_jax.train.global_batches`); a multiple of the
        number of processes is fastest. It cannot change within a run.
      max_skipped: number of consecutive updates with a non-finite loss or gradient that ends the
        run.
      init_from: initial weights of a new run: a model file (`<kind>.safetensors`), or the workdir
        of another run (its newest checkpoint); "" is random initialisation.
      eval_every: period, in steps, of the evaluation on held-out documents; the last step is
        evaluated too. 0: no evaluation.
      compiler: named options of the compiler (see `leon_jax.train.compiler_presets`): "auto" takes
        those of the devices, "" none.
      log_to: an experiment tracker that receives the metrics too: "wandb" or "trackio", or one of
        them with a project, for example "wandb:cats"; "": none.
      profile: (first step, number of steps) of an XProf trace; (): none.
      step_timeout: seconds after which a step that does not end ends the run; the stacks of all
        hosts are then in the workdir (see `leon_jax.train.watchdog`). 0: never.
    """

    OMITTED_DEFAULTS: ClassVar[tuple[str, ...]] = (
        "compiler", "eval_every", "keep_every", "log_to", "profile", "step_timeout",
    )  # fmt: skip

    log_every: int = 20
    save_every: int = 200
    sample_every: int = 200
    keep: int = 2
    keep_every: int = 0
    mesh: tuple[int, ...] = (-1, 1, 1, 1)
    slices: int = 1
    data_shards: int = 1
    max_skipped: int = 20
    init_from: str = ""
    eval_every: int = 0
    compiler: str = ""
    log_to: str = ""
    profile: tuple[int, ...] = ()
    step_timeout: float = 1800.0

    def __post_init__(self) -> None:
        counts = (
            "log_every", "save_every", "sample_every", "keep", "slices", "data_shards",
            "max_skipped",
        )  # fmt: skip
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("eval_every", "keep_every", "step_timeout"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0")
        if self.log_to:
            split(self.log_to)
        if self.profile and (len(self.profile) != 2 or min(self.profile) < 1):
            raise ValueError(
                f"profile is {self.profile}; it must be the first step and the number of steps, "
                "both at least 1, for example (100, 3)"
            )


def run(
    program: Program,
    loop: LoopConfig,
    workdir: pathlib.Path,
    branch: Branch | None = None,
    start_time: float | None = None,
) -> TrainState:
    """Trains `program` up to step `program.config.steps`, resuming from the newest checkpoint.

    A resumed run has the state, data position and randomness of an uninterrupted run, so its
    parameters are the same bit for bit. SIGTERM and SIGINT save a checkpoint and end the run;
    SIGUSR1 writes a profile (see `leon_jax.train.profiler`). An update with a non-finite loss or
    gradient is skipped. The step is compiled once, before the loop. Only batches and metrics move
    between host and devices.

    Writes `config.json`, `checkpoints/`, `metrics.jsonl`, `hosts.jsonl`, `goodput.json` and
    `samples/`. At the end `program.export` writes the model to `workdir/export`.

    Call it under `jax.set_mesh` on all processes of the mesh.

    Args:
      program: the model and how to train it.
      loop: configuration of the loop.
      workdir: the folder of the run; created if missing.
      branch: the checkpoint of another run that a new run starts from.
      start_time: the unix time from which on the time of this start counts; None: now.

    Returns:
      The final state.

    Raises:
      UserError: `workdir` cannot be written, is used by another run, or holds a run with another
        configuration; or too many consecutive updates were not finite.
      SystemExit: a signal ended the run; the code is 128 + its number.
    """
    total, is_main = program.config.steps, jax.process_index() == 0
    goodput = GoodputTracker(start_time)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_report_write_errors(workdir))

        options = compiler_presets.options(loop.compiler, jax.devices()[0])

        # Data. It comes first, so that no workdir is created if data is missing.
        with goodput.spend("data"):
            feed = Feed(program.batches, loop.data_shards)
            evaluation = program.evaluation() if loop.eval_every else None
            evaluator = None if evaluation is None else Evaluator(evaluation)

        # Workdir.
        folder = stack.enter_context(open_workdir(workdir))
        run_config = {**configs.to_dict(program.config), "loop": configs.to_dict(loop)}
        check_config(workdir / "config.json", run_config)
        if branch is not None and is_main:
            branch.write_history(workdir)
        if loop.eval_every and is_main:
            sentence = "no folder of config.data has a held-out split, so the run is not evaluated"
            if evaluation is not None:
                sentence = f"every {loop.eval_every} steps the run evaluates {evaluation.documents}"
            print(f"leon train: {sentence}", file=sys.stderr)
        if is_main:
            goodput.open(folder.files / "goodput.json")
        documents = "" if evaluation is None else evaluation.documents

        # State: the newest checkpoint, the weights of another run, or random weights.
        with goodput.spend("restore"):
            checkpoints = Checkpoints(
                workdir / "checkpoints", loop.keep, documents, keep_every=loop.keep_every
            )
            state = _initial_state(program, loop.init_from, checkpoints, feed, workdir, branch)
            jax.block_until_ready(state)
        start = int(state.step)
        goodput.resume(start)
        tracker = Tracker(loop.log_to, folder, run_config) if loop.log_to and is_main else None
        metrics = Metrics(
            folder.files if is_main else None, start, total, program.flops_per_token, tracker
        )
        stack.enter_context(contextlib.closing(metrics))

        # Compile.
        stop_signal, skipped_in_a_row = _StopSignal(), 0
        profiler = stack.enter_context(Profiler(workdir, loop.profile))
        watchdog = stack.enter_context(contextlib.closing(Watchdog(workdir, loop.step_timeout)))
        if start < total:
            with goodput.spend("data"):
                batch = next(feed)
            with goodput.spend("compile"):
                step_function = jax.jit(skip_nonfinite(program.step), donate_argnums=0)
                train_step = step_function.lower(state, batch).compile(dict(options))
                if evaluator is not None:
                    evaluator.compile(averaged(state).model)
            goodput.switch("step")
        if is_main:
            drop_after(folder.files / "hosts.jsonl", start)
        host_times = HostTimes(folder.files / "hosts.jsonl")

        @contextlib.contextmanager
        def spend(category: str) -> Iterator[None]:
            """Counts time between steps: it is neither a host's own nor a step's."""
            with goodput.spend(category), host_times.waiting(), watchdog.paused():
                yield

        # Loop.
        watchdog.start()
        values: dict[str, jax.Array] = {}  # metrics of the last step
        for step in range(start + 1, total + 1):
            profiler.start(step)
            if values:
                goodput.switch("input")
                with host_times.reading():
                    batch = next(feed)
                # The wait counts as input time only if the devices have finished the last step.
                is_idle = values[SKIPPED].is_ready()  # type: ignore[attr-defined]  # stubs lack it
                goodput.switch("step", was="input" if is_idle else "step")
            with host_times.waiting():
                with jax.transfer_guard("disallow"), profiler.annotated(step):
                    state, values = train_step(state, batch)
                watchdog.add(values[SKIPPED])
                profiler.end(step, values)
                if step == start + 1 and is_main:
                    jax.block_until_ready(values)
                    summary = goodput.first_step_summary()
                    print(f"first step after {summary}", file=sys.stderr)
            metrics.add(values)

            # Read only once a step: a signal during logging or saving takes effect after the next.
            signal_number = stop_signal.received(step)
            is_last = step == total or bool(signal_number)
            is_evaluated = evaluator is not None and (step == total or step % loop.eval_every == 0)
            if is_last or is_evaluated or step % loop.log_every == 0:
                with host_times.waiting():
                    fetched = metrics.fetch()
                measured = host_times.report(step, len(fetched[SKIPPED]))
                skipped_in_a_row = _consecutive_skips(skipped_in_a_row, fetched[SKIPPED])
                if evaluator is not None and is_evaluated:
                    with spend("evaluate"), metrics.paused():
                        measured |= evaluator.run(averaged(state).model)
                metrics.report(fetched, goodput.report(step), measured)
                folder.copy_files()
            best_loss = None  # the held-out loss, if it is the lowest so far
            if evaluator is not None and is_evaluated:
                loss = evaluator.loss(measured)
                best_loss = loss if loss < checkpoints.best_loss else None
            has_failed = skipped_in_a_row >= loop.max_skipped
            is_milestone = bool(loop.keep_every) and step % loop.keep_every == 0
            is_saved = is_last or has_failed or is_milestone or step % loop.save_every == 0
            if is_saved or best_loss is not None:
                with spend("checkpoint"):
                    folder.copy_files(wait=True)
                    folder.check_lock()
                    checkpoints.save(state, feed.get_state(), best_loss)
            if is_last or step % loop.sample_every == 0:
                with spend("sample"), metrics.paused():
                    metrics.save_images(program.samples(averaged(state)))

            if signal_number or has_failed:
                with spend("checkpoint"):
                    checkpoints.close()
                goodput.report(step)
                if has_failed:
                    raise UserError(
                        f"{skipped_in_a_row} updates in a row, up to step {step}, had a non-finite "
                        "loss or gradient and were skipped; the state before them is saved in "
                        f"{workdir}. Lower the learning rate or check the data, then run the "
                        "command again"
                    )
                print(f"stopped by a signal; step {step} is saved", file=sys.stderr)
                raise SystemExit(128 + signal_number)

        # Export.
        watchdog.close()
        goodput.switch("checkpoint")
        checkpoints.close()
        with goodput.spend("sample"):
            folder.check_lock()
            program.export(averaged(state), workdir / "export")
            if jax.process_count() > 1:
                # No process exits before the last file is written.
                multihost_utils.sync_global_devices("export")
        goodput.report(total)
        if is_main:
            print(f"wall time {goodput.summary()}", file=sys.stderr)
        return state


def skip_nonfinite(step: Step) -> Step:
    """Wraps `step` so that it skips an update with non-finite metrics.

    A skipped update leaves the model and the optimizer state unchanged, but counts as a step. The
    metric `SKIPPED` is 1 if the update was skipped, else 0.
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
def _report_write_errors(workdir: pathlib.Path) -> Iterator[None]:
    """Converts an error of a disk or a bucket within the context to a UserError."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or (reason := storage.reason(error)) is None:
            raise
        raise UserError(
            f"{getattr(error, 'filename', None) or workdir} cannot be written: {reason}; fix this "
            "and run the same command again to resume from the newest checkpoint"
        ) from error


def _initial_state(
    program: Program,
    init_from: str,
    checkpoints: Checkpoints,
    feed: Feed,
    workdir: pathlib.Path,
    branch: Branch | None,
) -> TrainState:
    """Returns the newest saved state and moves `feed` to its position, or returns a new state."""
    key = jax.random.key(program.config.seed)
    abstract = jax.eval_shape(program.init, key)
    if checkpoints.latest() is not None:
        step, state, position = checkpoints.restore(abstract)
        feed.set_state(position)
        print(f"resumed from step {step} in {workdir}", file=sys.stderr)
        return state
    if branch is not None:
        state = load_state(branch.checkpoints, abstract, branch.step)
        if branch.position is not None:
            feed.set_state(branch.position)
        # A restart needs the parent no more.
        checkpoints.save(state, feed.get_state())
        print(f"branched from step {branch.step} of {branch.checkpoints.parent}", file=sys.stderr)
        return state
    state = jax.jit(program.init)(key)
    if not init_from:
        return state
    if storage.path(init_from).is_dir():
        directory = storage.path(init_from) / "checkpoints"
        model = load_model(directory, abstract, find_step(directory, "newest"))
    else:
        stored, _ = weight_files.load(init_from, program.kind)
        model = weight_files.restore(state.model, stored, init_from)
    return dataclasses.replace(state, model=model)


def _consecutive_skips(count: int, skipped: Float64[np.ndarray, "steps"]) -> int:
    """Returns the number of consecutive skipped updates up to the newest.

    Args:
      count: the number before these steps.
      skipped: 1 for each skipped step, else 0.
    """
    for flag in skipped:
        count = count + 1 if flag else 0
    return count


class _StopSignal:
    """Records the first SIGTERM or SIGINT; a second signal has its default effect.

    Several processes must stop after the same step. There JAX handles SIGTERM and reports the step
    that all processes have agreed on.
    """

    def __init__(self) -> None:
        self._number = 0
        handled_signals = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ()
        for number in handled_signals:
            signal.signal(number, self._handle)

    def received(self, step: int) -> int:
        """Returns the number of the signal that ends the run after this step, or 0."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            return signal.SIGTERM
        return self._number

    def _handle(self, number: int, frame: Any) -> None:
        self._number = number
        signal.signal(number, signal.SIG_DFL)
