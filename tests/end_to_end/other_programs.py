"""Trains the image tokenizer (with its discriminator) and the retrieval encoder on eight devices.

`python -m tests.end_to_end.other_programs KIND` prints the metrics on one device and on each mesh.
The batches are random noise, since only the step is tested.
"""

import dataclasses
import json
import pathlib
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

from leon_jax import sharding
from leon_jax.tokenizers.text import TextTokenizer
from leon_jax.train.image_tokenizer import TokenizerProgram
from leon_jax.train.retrieval_encoder import EncoderProgram
from leon_jax.train.training_loop import skip_nonfinite
from tests.train.test_image_tokenizer import CONFIG
from tests.train.test_retrieval_encoder import NAMES, tiny

STEPS = 5
ONE_DEVICE = (1, 1, 1, 1)
# The tokenizer compiles slowly, so it runs only on one mesh, which splits every axis it can.
MESHES = {"tokenizer": [(2, 2, 1, 2)], "encoder": [(8, 1, 1, 1), (2, 4, 1, 1), (2, 2, 1, 2)]}


def tokenizer_program(folder: pathlib.Path) -> TokenizerProgram:
    """Returns the tokenizer's program with the discriminator from the third step on."""
    losses = dataclasses.replace(CONFIG.losses, adversarial_start=2)
    return TokenizerProgram(dataclasses.replace(CONFIG, losses=losses, batch_size=8))


def encoder_program(folder: pathlib.Path) -> EncoderProgram:
    """Returns the encoder's program with sizes that two devices divide."""
    text = TextTokenizer.train(list(NAMES), 301)
    text.save(folder / "text.json")
    return EncoderProgram(tiny(folder / "text.json", text.size))


def batches(kind: str, program, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Returns a batch of eight rows of noise."""
    if kind == "tokenizer":
        return {"images": rng.uniform(-1, 1, (8, 32, 32, 3)).astype(np.float32)}
    text = program.config.model.text
    ids = rng.integers(0, text.vocab_size - 3, (8, text.context_length)).astype(np.int32)
    ids[:, -1] = text.end
    images = rng.integers(0, 256, (8, 16, 16, 3), np.uint8)
    return {"image": images, "text": ids, "concept": np.arange(8, dtype=np.int32) // 2}


def curve(kind: str, shape: tuple[int, ...]) -> list[dict[str, float]]:
    """Returns the metrics of every step on a mesh."""
    devices = jax.devices()[: int(np.prod(shape))]
    rng, history = np.random.default_rng(0), []
    with (
        tempfile.TemporaryDirectory() as folder,
        jax.set_mesh(sharding.make_mesh(shape, devices)),
    ):
        make = {"tokenizer": tokenizer_program, "encoder": encoder_program}[kind]
        program = make(pathlib.Path(folder))
        state = jax.jit(program.init)(jax.random.key(0))
        jitted, step = jax.jit(skip_nonfinite(program.step), donate_argnums=0), None
        for _ in range(STEPS):
            batch = jax.device_put(batches(kind, program, rng), sharding.batch_sharding())
            step = step or jitted.lower(state, batch).compile()
            state, metrics = step(state, batch)
            history.append({name: float(jnp.asarray(value)) for name, value in metrics.items()})
    return history


if __name__ == "__main__":
    kind = sys.argv[1]
    print(json.dumps([curve(kind, mesh) for mesh in (ONE_DEVICE, *MESHES[kind])]))
