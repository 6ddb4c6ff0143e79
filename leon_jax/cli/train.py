"""Trains a text tokenizer, an image tokenizer, a retrieval encoder or a decoder.

    leon train --config=configs/emoji/decoder.py --workdir=runs/emoji/decoder

The config file says which; any of its keys can be set on the command line, for example
--config.batch_size=32. A second start with the same --workdir goes on from the newest checkpoint.
The finished model is written into WORKDIR/export.
"""

import pathlib
import sys

import jax
from absl import flags
from ml_collections import config_flags

from leon_jax import config as configs
from leon_jax import sharding
from leon_jax.config import UserError

_CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment's config file.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run keeps everything it writes.")

KINDS = ("text", "tokenizer", "encoder", "decoder")


def main(argv: list[str]) -> None:
    """Runs `leon train`.

    Raises:
      UserError: a flag is missing, the config has unknown or ill-typed keys, or its files are
        missing.
    """
    del argv
    if _CONFIG.value is None:
        raise UserError("--config is missing; for example --config=configs/emoji/decoder.py")
    if not _WORKDIR.value:
        raise UserError("--workdir is missing; for example --workdir=runs/emoji/decoder")
    try:
        values = _CONFIG.value.to_dict()
    except OSError as error:  # the flag puts off its complaint until it is used
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"the config file cannot be loaded: {reason}") from error
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

    settings = configs.build(loop.LoopConfig, values.pop("loop", {}), "config.loop")
    try:
        mesh = sharding.make_mesh(settings.mesh)
    except ValueError as error:
        raise UserError(f"config.loop.mesh: {error}") from error
    with jax.set_mesh(mesh):
        loop.run(_program(kind, values), settings, workdir)
    print(f"trained -> {workdir / 'export'}", file=sys.stderr)


def _program(kind: str, values: dict):
    match kind:
        case "tokenizer":
            from leon_jax.train.tokenizer import TokenizerConfig, TokenizerProgram

            return TokenizerProgram(configs.build(TokenizerConfig, values))
        case "encoder":
            from leon_jax.train.encoder import EncoderProgram

            return EncoderProgram(values)
        case _:
            from leon_jax.train.decoder import DecoderProgram

            return DecoderProgram(values)
