"""Trains a text tokenizer, an image tokenizer, a retrieval encoder or a decoder.

    leon train --config=configs/emoji/decoder.py --workdir=runs/emoji/decoder

The config file says which; any of its keys can be set on the command line, for example
--config.batch_size=32. A second start with the same --workdir goes on from the newest checkpoint.
The finished model is written into WORKDIR/export.

On several hosts every process runs this command with --distributed. On TPU pods, SLURM, Open MPI
and Kubernetes they find each other; elsewhere say --coordinator, --processes and --process_id.
When one of them is lost the others end within --heartbeat_seconds, with exit code 134.
"""

import os
import pathlib
import sys
import threading
from typing import TYPE_CHECKING, Any

from absl import flags

from leon_jax import config as configs
from leon_jax.cli import config_flag
from leon_jax.config import UserError
from leon_jax.train import supervisor

if TYPE_CHECKING:
    from leon_jax.train.state import Program

_CONFIG = config_flag.define()
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run keeps everything it writes.")

_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "One of several processes of one run.")
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "host:port of process 0, where the cluster does not say."
)
_PROCESSES = flags.DEFINE_integer("processes", None, "How many processes, likewise.", 1)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, likewise.", 0)
_HEARTBEAT_SECONDS = flags.DEFINE_integer(
    "heartbeat_seconds",
    100,
    "With --distributed: a process that is silent for so long counts as lost, and the others end.",
    2,
)

# How long the processes of a run wait for each other at the start.
_JOIN_SECONDS = 300

KINDS = ("text", "tokenizer", "encoder", "decoder")


def main(argv: list[str]) -> None:
    """Runs `leon train`.

    Raises:
      UserError: a flag is missing, the config has unknown or ill-typed keys, or its files are
        missing.
    """
    del argv
    values = config_flag.read(_CONFIG, "configs/emoji/decoder.py")
    if not _WORKDIR.value:
        raise UserError("--workdir is missing; for example --workdir=runs/emoji/decoder")
    if "://" in _WORKDIR.value:  # as a path it would name a new folder here
        raise UserError(
            f"--workdir={_WORKDIR.value} is an address; it must be a folder that all hosts share, "
            "for example a mounted bucket or network file system"
        )
    workdir = pathlib.Path(_WORKDIR.value)
    kind = values.get("kind")
    if kind not in KINDS:
        raise UserError(f"config.kind is {kind!r}; it must be one of {', '.join(KINDS)}")
    if kind == "text":
        from leon_jax.train import text_tokenizer

        tokenizer = text_tokenizer.run(configs.build(text_tokenizer.TextConfig, values), workdir)
        print(f"{tokenizer.size} entries -> {workdir / 'export'}", file=sys.stderr)
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
    print(f"trained -> {workdir / 'export'}", file=sys.stderr)


def _train(kind: str, values: dict[str, Any], workdir: pathlib.Path) -> None:
    """Trains a model in this process, which is one of several with --distributed."""
    import jax

    from leon_jax import compilation_cache, sharding
    from leon_jax.train import loop

    if _DISTRIBUTED.value:
        _join_processes()
    # Beside the run, so that whoever restarts it compiles nothing again.
    compilation_cache.use_compilation_cache(workdir / compilation_cache.RUN_FOLDER)
    settings = configs.build(loop.LoopConfig, values.pop("loop", {}), "config.loop")
    try:
        mesh = sharding.make_mesh(settings.mesh, slices=settings.slices)
    except ValueError as error:
        raise UserError(f"config.loop.mesh: {error}") from error
    with jax.set_mesh(mesh):
        loop.run(_make_program(kind, values), settings, workdir)


def _check_process_flags() -> None:
    """Checks the flags about processes.

    Raises:
      UserError: they contradict each other.
    """
    coordinator, processes, process_id = _COORDINATOR.value, _PROCESSES.value, _PROCESS_ID.value
    given = [value is not None for value in (coordinator, processes, process_id)]
    if any(given) and not _DISTRIBUTED.value:
        raise UserError("--coordinator, --processes and --process_id need --distributed")
    if any(given) and not all(given):
        raise UserError("give all of --coordinator, --processes and --process_id, or none of them")
    if processes is not None and process_id is not None and process_id >= processes:
        raise UserError(f"--process_id={process_id} must be below --processes={processes}")


def _join_processes() -> None:
    """Makes this process one of several.

    Raises:
      UserError: no cluster says which processes there are, or they cannot be found.
    """
    import jax

    try:
        jax.distributed.initialize(
            _COORDINATOR.value,
            _PROCESSES.value,
            _PROCESS_ID.value,
            initialization_timeout=_JOIN_SECONDS,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS.value,
            # How long a process that has ended waits for the others to end; `loop.run` ends
            # at the same time in all of them.
            shutdown_timeout_seconds=_HEARTBEAT_SECONDS.value,
        )
    except ValueError as error:
        raise UserError(
            "--distributed: no cluster was found that says which processes there are; give "
            "--coordinator=HOST:PORT, --processes and --process_id"
        ) from error
    except RuntimeError as error:
        raise UserError(
            "--distributed: this process cannot meet the others; --coordinator must be a free port "
            "of the host of process 0, the same for all of them"
        ) from error


def _explanations() -> dict[str, str]:
    """What JAX writes when it ends a process because of another one, to a sentence about it."""
    return {
        supervisor.NEVER_MET_MARK: (
            f"leon train: the processes of this run did not find each other within {_JOIN_SECONDS} "
            "s; start all of them, with the same --coordinator, which is a free port of the host "
            "of process 0"
        ),
        supervisor.LOST_PEER_MARK: (
            "leon train: another process of this run failed or was silent for "
            f"{_HEARTBEAT_SECONDS.value} s (--heartbeat_seconds), so this one ended as well; see "
            "what that process wrote, then start all of them again, and they go on from the newest "
            "checkpoint"
        ),
    }


def _exit_without_waiting_for_others(code: int) -> None:
    """Ends this process with an exit code in a moment, even if others wait for it.

    At its exit JAX waits for all processes. Where all met the same error they end together; where
    only this one did, the others wait for its part of a step.
    """
    seconds = min(10, _HEARTBEAT_SECONDS.value / 2)
    timer = threading.Timer(seconds, os._exit, [code])
    timer.daemon = True
    timer.start()


def _make_program(kind: str, values: dict[str, Any]) -> "Program":
    """The program of a kind, with its configuration built from `values`."""
    match kind:
        case "tokenizer":
            from leon_jax.train.image_tokenizer import TokenizerConfig, TokenizerProgram

            return TokenizerProgram(configs.build(TokenizerConfig, values))
        case "encoder":
            from leon_jax.train.retrieval_encoder import EncoderConfig, EncoderProgram

            return EncoderProgram(configs.build(EncoderConfig, values))
        case _:
            from leon_jax.train.decoder import DecoderProgram
            from leon_jax.train.decoder_config import DecoderTraining

            return DecoderProgram(configs.build(DecoderTraining, values))
