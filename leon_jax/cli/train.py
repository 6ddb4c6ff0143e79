"""Trains a text tokenizer, an image tokenizer, a retrieval encoder or a decoder.

    leon train --config=configs/emoji/decoder.py --workdir=runs/emoji/decoder

The config file says which; any of its keys can be set on the command line, for example
--config.batch_size=32. A second start with the same --workdir goes on from the newest checkpoint.
The finished model is written into WORKDIR/export.

On several hosts every process runs this command with --distributed. On TPU pods, SLURM, Open MPI
and Kubernetes they find each other; elsewhere say --coordinator, --processes and --process_id.
"""

import os
import pathlib
import sys
from typing import TYPE_CHECKING, Any

import jax
from absl import flags

from leon_jax import config as configs
from leon_jax import sharding
from leon_jax.cli import config_flag
from leon_jax.config import UserError

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
        from leon_jax.train import text

        tokenizer = text.run(configs.build(text.TextConfig, values), workdir)
        print(f"{tokenizer.size} entries -> {workdir / 'export'}", file=sys.stderr)
        return

    from leon_jax.train import loop

    _join_processes()
    # Beside the run, so that whoever restarts it compiles nothing again.
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(workdir.absolute() / "compile_cache"))
    settings = configs.build(loop.LoopConfig, values.pop("loop", {}), "config.loop")
    try:
        mesh = sharding.make_mesh(settings.mesh, slices=settings.slices)
    except ValueError as error:
        raise UserError(f"config.loop.mesh: {error}") from error
    with jax.set_mesh(mesh):
        loop.run(_make_program(kind, values), settings, workdir)
    print(f"trained -> {workdir / 'export'}", file=sys.stderr)


def _join_processes() -> None:
    """Makes this process one of several, if the flags say so.

    Raises:
      UserError: the flags contradict each other, or the other processes cannot be found.
    """
    explicit = (_COORDINATOR.value, _PROCESSES.value, _PROCESS_ID.value)
    given = [value is not None for value in explicit]
    if not _DISTRIBUTED.value:
        if any(given):
            raise UserError("--coordinator, --processes and --process_id need --distributed")
        return
    if any(given) and not all(given):
        raise UserError("give all of --coordinator, --processes and --process_id, or none of them")
    try:
        jax.distributed.initialize(*explicit)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"--distributed: {str(error).splitlines()[0]}") from error


def _make_program(kind: str, values: dict[str, Any]) -> "Program":
    """The program of a kind, with its configuration built from `values`."""
    match kind:
        case "tokenizer":
            from leon_jax.train.tokenizer import TokenizerConfig, TokenizerProgram

            return TokenizerProgram(configs.build(TokenizerConfig, values))
        case "encoder":
            from leon_jax.train.encoder import EncoderConfig, EncoderProgram

            return EncoderProgram(configs.build(EncoderConfig, values))
        case _:
            from leon_jax.train.decoder import DecoderProgram
            from leon_jax.train.decoder_config import DecoderTraining

            return DecoderProgram(configs.build(DecoderTraining, values))
