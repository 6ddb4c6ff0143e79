"""The training program of each kind of model, and the weights of a run's checkpoint."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from leon_jax import config as configs
from leon_jax import sharding
from leon_jax.export import provenance
from leon_jax.train.checkpoint import find_step
from leon_jax.train.checkpoint_reader import load_model
from leon_jax.train.decoder import DecoderProgram
from leon_jax.train.decoder_config import DecoderTraining
from leon_jax.train.image_tokenizer import TokenizerConfig, TokenizerProgram
from leon_jax.train.optimizer import averaged
from leon_jax.train.retrieval_encoder import EncoderConfig, EncoderProgram
from leon_jax.train.state import Program, TrainState


def make_program(kind: str, values: Mapping[str, Any]) -> Program:
    """Returns the program of a kind.

    Args:
      kind: "tokenizer", "encoder" or "decoder".
      values: the configuration without the group `loop`.

    Raises:
      UserError: a key is unknown or missing, or a value has the wrong type.
    """
    match kind:
        case "tokenizer":
            return TokenizerProgram(configs.build(TokenizerConfig, values))
        case "encoder":
            return EncoderProgram(configs.build(EncoderConfig, values))
        case "decoder":
            return DecoderProgram(configs.build(DecoderTraining, values))
    raise ValueError(f"kind is {kind!r}; it must be tokenizer, encoder or decoder")


def save_checkpoint(
    workdir: pathlib.Path, step: str, directory: pathlib.Path, average: bool = True
) -> int:
    """Writes the model of a checkpoint as the end of the run would, on one device.

    A decoder is written as `decoder.safetensors` alone.

    Args:
      workdir: the folder of the run, which may go on meanwhile.
      step: "newest", "best" (the lowest held-out loss), or a number.
      directory: the folder for the files; created if missing.
      average: writes the averaged weights, if the run has them (`optimizer.average`); False: writes
        the weights after the last update.

    Returns:
      The step of the checkpoint.

    Raises:
      UserError: the run has no such checkpoint, or it cannot be read.
    """
    values = provenance.run_config(workdir)
    values.pop("loop", None)
    number = find_step(workdir / "checkpoints", step)
    program = make_program(values["kind"], values)
    with jax.set_mesh(sharding.make_mesh((1, 1, 1, 1), jax.devices()[:1])):
        abstract = jax.eval_shape(program.init, jax.random.key(0))
        exported = (averaged(abstract) if average else abstract).model
        model = load_model(workdir / "checkpoints", abstract, number, exported)
        if isinstance(program, DecoderProgram):
            program.save_weights(model, directory)
        else:
            program.export(TrainState(jnp.int32(number), model, None, abstract.key), directory)
    return number
