"""Trains a small decoder for twenty steps on packed documents, for tests of meshes and processes.

`python -m tests.end_to_end.curves FOLDER` prints the losses on one device, on a mesh with two
microbatches, and on all meshes of eight simulated devices.
"""

import json
import pathlib
import sys

import jax
import numpy as np

from leon_jax import config as configuration
from leon_jax import sharding
from leon_jax.tokenizers.text import TextTokenizer
from leon_jax.train.decoder import DecoderProgram
from leon_jax.train.decoder_config import DecoderTraining
from leon_jax.train.global_batches import Feed
from leon_jax.train.training_loop import skip_nonfinite
from leon_jax.vocabulary import Vocabulary
from tests.train.test_decoder_program import make_config

STEPS = 20
MESHES = [
    (8, 1, 1, 1), (1, 8, 1, 1), (1, 1, 8, 1), (1, 1, 1, 8), (2, 2, 1, 2), (1, 2, 2, 2),
]  # fmt: skip


def get_config(folder: str):
    """Returns a configuration whose sizes all meshes divide."""
    folder = pathlib.Path(folder)
    config = make_config(folder)
    text = TextTokenizer.load(folder / "text.json").size
    sentinels = 4
    while (size := Vocabulary.compact(16, text, sentinels).size) % 8:
        sentinels += 1
    config.vocabulary = Vocabulary.compact(16, text, sentinels).__dict__
    config.model.update({"vocab_size": size, "embed": 64, "heads": 8, "remat": "full"})
    config.steps = config.optimizer.total_steps = STEPS
    config.samples.image = ""
    return config


def curve(
    folder: str, shape: tuple[int, ...], devices: int = 8, microbatches: int = 1
) -> list[float]:
    """Returns the loss of every step on a mesh."""
    with jax.set_mesh(sharding.make_mesh(shape, jax.devices()[:devices])):
        config = get_config(folder)
        config.microbatches = microbatches
        program = DecoderProgram(configuration.build(DecoderTraining, config))
        feed = Feed(program.batches, 2)
        state = jax.jit(program.init)(jax.random.key(0))
        batch = next(feed)
        assert np.asarray(batch["segment_ids"]).max() > 1, "rows hold several documents"
        jitted = jax.jit(skip_nonfinite(program.step), donate_argnums=0)
        step, losses = jitted.lower(state, batch).compile(), []
        for _ in range(STEPS):
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
            batch = next(feed)
        return losses


if __name__ == "__main__":
    folder = sys.argv[1]
    one_device = curve(folder, (1, 1, 1, 1), 1)
    microbatches = curve(folder, (2, 2, 1, 2), microbatches=2)
    print(json.dumps([one_device, microbatches, *(curve(folder, mesh) for mesh in MESHES)]))
