r"""Trains a text tokenizer, an image tokenizer, a retrieval encoder or a decoder.

    leon train --config=configs/emoji/decoder.py --workdir=runs/emoji/decoder

The config file sets the kind of model. Override any key on the command line, for example
--config.batch_size=32. Run the command again with the same --workdir to resume from the newest
checkpoint. The trained model is written to WORKDIR/export.

On several hosts, run the command with --distributed in every process. On TPU pods, SLURM, Open MPI
and Kubernetes the processes find each other. Elsewhere set --coordinator, --processes and
--process_id. If a process is lost, the others exit with code 134 within --heartbeat_seconds.

--branch_from=WORKDIR@STEP starts a new run from a checkpoint of another run, with a changed config:

    leon train --config=configs/emoji/decoder.py --workdir=runs/emoji/decay \
      --branch_from=runs/emoji/decoder@6000 --config.steps=8000

kill -USR1 PID writes a profile of the next five steps into WORKDIR/profiles; leon report shows it.
"""

import os
import pathlib
import signal
import sys
import threading
import time
from typing import Any

from absl import flags

from leon_jax import config as configs
from leon_jax import storage
from leon_jax.cli import config_flag
from leon_jax.config import UserError
from leon_jax.train import supervisor

_CONFIG = config_flag.define()
_WORKDIR = flags.DEFINE_string("workdir", None, "The folder for all files of the run.")
_BRANCH_FROM = flags.DEFINE_string(
    "branch_from",
    "",
    "WORKDIR@STEP: start a new run from a checkpoint of another run; the step is a number, newest "
    "or best.",
)

_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Run as one of several processes that train one model."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "host:port of process 0; needed where no cluster sets it."
)
_PROCESSES = flags.DEFINE_integer(
    "processes", None, "The number of processes; needed where no cluster sets it.", 1
)
_PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "The index of this process; needed where no cluster sets it.", 0
)
_HEARTBEAT_SECONDS = flags.DEFINE_integer(
    "heartbeat_seconds",
    100,
    "Seconds without a heartbeat after which a process counts as lost and the others exit.",
    2,
)

# Seconds that a process waits for the others at the start.
_JOIN_SECONDS = 300

KINDS = ("text", "tokenizer", "encoder", "decoder")


def main(argv: list[str]) -> None:
    """Runs `leon train`.

    Raises:
      UserError: a flag is missing, the config has an unknown key or a value of the wrong type, or
        a file is missing.
    """
    del argv
    values = config_flag.read(_CONFIG, "configs/emoji/decoder.py")
    if not _WORKDIR.value:
        raise UserError("--workdir is missing; for example --workdir=runs/emoji/decoder")
    workdir = storage.path(_WORKDIR.value)
    if _WORKDIR.value.startswith("s3://"):
        raise UserError(
            f"--workdir={_WORKDIR.value} is in an S3 bucket, which Orbax cannot write checkpoints "
            "to; use a gs:// bucket or a folder that all hosts share"
        )
    kind = values.get("kind")
    if kind not in KINDS:
        raise UserError(f"config.kind is {kind!r}; it must be one of {', '.join(KINDS)}")
    if kind == "text":
        if _BRANCH_FROM.value:
            raise UserError("--branch_from: the run of a text tokenizer has no checkpoints")
        from leon_jax.train import text_tokenizer

        config = configs.build(text_tokenizer.TextConfig, values)
        summary = text_tokenizer.summary(text_tokenizer.run(config, workdir), config)
        print(f"{summary}; saved to {workdir / 'export'}", file=sys.stderr)
        return

    _check_process_flags()
    if _DISTRIBUTED.value and not supervisor.is_child():
        code = supervisor.supervise([sys.executable, *sys.orig_argv[1:]], _explanations())
        if code:
            raise SystemExit(code)
        return
    try:
        _train(kind, values, workdir)
    except UserError:
        if _DISTRIBUTED.value:
            _exit_without_waiting_for_others(2)
        raise
    except KeyboardInterrupt:
        if _DISTRIBUTED.value:
            _exit_without_waiting_for_others(130)
        raise
    print(f"training finished; saved to {workdir / 'export'}", file=sys.stderr)


def _train(kind: str, values: dict[str, Any], workdir: pathlib.Path) -> None:
    """Trains a model in this process; with --distributed it is one of several."""
    start_time = time.time()
    # The loop handles this signal. Until then its default effect would end the process.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    import jax

    from leon_jax import compilation_cache, sharding
    from leon_jax.train import branch, decoder_config, programs, training_loop

    if _DISTRIBUTED.value:
        _join_processes()
    # In the workdir, so that a restart on any host compiles nothing again.
    compilation_cache.use_compilation_cache(workdir / compilation_cache.RUN_FOLDER)
    settings = configs.build(training_loop.LoopConfig, values.pop("loop", {}), "config.loop")
    try:
        mesh = sharding.make_mesh(settings.mesh, slices=settings.slices)
    except ValueError as error:
        raise UserError(f"config.loop.mesh: {error}") from error
    program = programs.make_program(kind, values)
    program, new_branch = branch.prepare(
        _BRANCH_FROM.value, workdir, program, configs.to_dict(settings)
    )
    if kind == "decoder" and (notice := decoder_config.retrieval_notice(program.config)):
        print(f"leon train: {notice}", file=sys.stderr)
    if check_export := getattr(program, "check_export", None):
        # What is missing for the end of the run is said at its start.
        sentence = check_export(workdir / "export")
        if jax.process_index() == 0:
            print(f"leon train: {sentence}", file=sys.stderr)
    with jax.set_mesh(mesh):
        training_loop.run(program, settings, workdir, new_branch, start_time)


def _check_process_flags() -> None:
    """Checks --coordinator, --processes and --process_id.

    Raises:
      UserError: the flags contradict each other or --distributed.
    """
    coordinator, processes, process_id = _COORDINATOR.value, _PROCESSES.value, _PROCESS_ID.value
    is_set = [value is not None for value in (coordinator, processes, process_id)]
    if any(is_set) and not _DISTRIBUTED.value:
        raise UserError("--coordinator, --processes and --process_id need --distributed")
    if any(is_set) and not all(is_set):
        raise UserError("give all of --coordinator, --processes and --process_id, or none of them")
    if processes is not None and process_id is not None and process_id >= processes:
        raise UserError(f"--process_id={process_id} must be below --processes={processes}")


def _join_processes() -> None:
    """Connects this process to the other processes of the run.

    Raises:
      UserError: no cluster was detected, or the other processes cannot be reached.
    """
    import jax

    try:
        jax.distributed.initialize(
            _COORDINATOR.value,
            _PROCESSES.value,
            _PROCESS_ID.value,
            initialization_timeout=_JOIN_SECONDS,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS.value,
            # Seconds that a finished process waits for the others. `training_loop.run`
            # returns at the same time in all of them.
            shutdown_timeout_seconds=_HEARTBEAT_SECONDS.value,
        )
    except ValueError as error:
        raise UserError(
            "--distributed: no cluster was detected; give --coordinator=HOST:PORT, --processes and "
            "--process_id"
        ) from error
    except RuntimeError as error:
        raise UserError(
            "--distributed: this process cannot reach the others; --coordinator must be a free "
            "port on the host of process 0, and the same in all processes"
        ) from error


def _explanations() -> dict[str, str]:
    """Returns the error message for each text that JAX writes when another process is lost."""
    return {
        supervisor.NEVER_MET_MARK: (
            f"leon train: the processes of this run did not find each other within {_JOIN_SECONDS} "
            "s; start all of them with the same --coordinator, a free port on the host of process 0"
        ),
        supervisor.LOST_PEER_MARK: (
            "leon train: another process of this run failed or sent no heartbeat for "
            f"{_HEARTBEAT_SECONDS.value} s (--heartbeat_seconds), so this process exited; read "
            "that process's error, then start all of them again to resume from the newest "
            "checkpoint"
        ),
    }


def _exit_without_waiting_for_others(code: int) -> None:
    """Exits with `code` after at most 10 seconds, even if other processes wait for this one.

    JAX waits for all processes at exit. If all of them failed, they exit together. If only this
    one failed, the others still wait for it in a collective, so it must not wait for them.
    """
    seconds = min(10, _HEARTBEAT_SECONDS.value / 2)
    timer = threading.Timer(seconds, os._exit, [code])
    timer.daemon = True
    timer.start()
