"""The second stage of the shipped decoder: shorter, mostly with one or two retrieved documents.

    leon train --config=configs/emoji/decoder_second.py --workdir=runs/emoji/decoder_second

Starts from the weights of configs/emoji/decoder.py and trains the decoder to use the retrieved
documents. Takes a quarter of an hour on two CPU cores. docs/evaluate.md has the results.
"""

import pathlib
import runpy

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the configuration of `leon_jax.train.decoder.DecoderProgram`."""
    first = runpy.run_path(str(pathlib.Path(__file__).with_name("decoder.py")))
    config = first["get_config"]()
    config.seed = 1
    config.steps = 2_000
    config.optimizer.learning_rate = 5e-4
    config.optimizer.warmup_steps = 50
    config.data.retrieved = (0.1, 0.3, 0.4, 0.2)
    config.loop.init_from = "runs/emoji/decoder/export/decoder.safetensors"
    return config
