"""Trains the image tokenizer and the retrieval encoder for a few steps, for tests of meshes.

`python -m tests.end_to_end.other_programs KIND FOLDER` writes two documents folders to FOLDER,
and prints the metrics of all steps on one device and on the meshes of eight simulated devices.
"""

import dataclasses
import json
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from leon_jax import config as configs
from leon_jax import sharding
from leon_jax.data.config import CaptionedImageDataConfig, FolderComponent, ImageDataConfig
from leon_jax.tokenizers.text import TextTokenizer
from leon_jax.train.global_batches import Feed
from leon_jax.train.image_tokenizer import TokenizerConfig, TokenizerProgram
from leon_jax.train.retrieval_encoder import EncoderConfig, EncoderProgram
from leon_jax.train.training_loop import skip_nonfinite
from tests import document_folders
from tests.train import test_image_tokenizer, test_retrieval_encoder

STEPS = 5
ONE_DEVICE = (1, 1, 1, 1)
# The tokenizer compiles slowly, so it runs only on one mesh, which splits every axis it can.
MESHES = {"tokenizer": [(2, 2, 1, 2)], "encoder": [(8, 1, 1, 1), (2, 4, 1, 1), (2, 2, 1, 2)]}


def write_data(folder: pathlib.Path) -> None:
    """Writes a folder of drawings, one of photographs, and a text tokenizer for both."""
    documents = [document_folders.drawings(), document_folders.photographs(5, 40)]
    for name, members in zip(("drawings", "photographs"), documents, strict=True):
        document_folders.write(folder / name, members)
    # With 301 entries the vocabulary has 304, which two devices divide.
    text = TextTokenizer.train([one.text for members in documents for one in members], 301)
    assert text.size == 301
    text.save(folder / "text.json")


def make_config(kind: str, folder: pathlib.Path) -> TokenizerConfig | EncoderConfig:
    """Returns the configuration of a kind, with batches of eight of both folders."""
    mixture = (
        FolderComponent(str(folder / "drawings"), weight=3.0),
        FolderComponent(str(folder / "photographs")),
    )
    if kind == "tokenizer":
        config = test_image_tokenizer.CONFIG
        losses = dataclasses.replace(config.losses, adversarial_start=2)
        # With a small eps, Adam makes updates of full size from gradients that are zero but for
        # rounding, and the discriminator multiplies the differences a hundredfold in each step.
        optimizer = dataclasses.replace(config.optimizer, eps=1e-3)
        data = ImageDataConfig(mixture=mixture)
        return dataclasses.replace(
            config, losses=losses, optimizer=optimizer, batch_size=8, data=data
        )
    text = str(folder / "text.json")
    config = test_retrieval_encoder.tiny("", text)
    return dataclasses.replace(config, data=CaptionedImageDataConfig(mixture=mixture, text=text))


def get_config(kind_and_folder: str) -> dict[str, Any]:
    """Returns the config of `leon train` for "KIND:FOLDER", on two data shards."""
    from ml_collections import ConfigDict

    kind, folder = kind_and_folder.split(":")
    values = configs.to_dict(make_config(kind, pathlib.Path(folder)))
    loop = {"log_every": 1, "save_every": 4, "sample_every": 1000, "data_shards": 2}
    return ConfigDict(values | {"steps": 24, "loop": loop})


def curve(kind: str, folder: pathlib.Path, shape: tuple[int, ...]) -> list[dict[str, float]]:
    """Returns the metrics of every step on a mesh."""
    devices = jax.devices()[: int(np.prod(shape))]
    history = []
    with jax.set_mesh(sharding.make_mesh(shape, devices)):
        make = {"tokenizer": TokenizerProgram, "encoder": EncoderProgram}[kind]
        program = make(make_config(kind, folder))
        feed = Feed(program.batches, 2)
        state = jax.jit(program.init)(jax.random.key(0))
        jitted, step = jax.jit(skip_nonfinite(program.step), donate_argnums=0), None
        for _ in range(STEPS):
            batch = next(feed)
            step = step or jitted.lower(state, batch).compile()
            state, metrics = step(state, batch)
            history.append({name: float(jnp.asarray(value)) for name, value in metrics.items()})
    return history


if __name__ == "__main__":
    kind, folder = sys.argv[1], pathlib.Path(sys.argv[2])
    write_data(folder)
    print(json.dumps([curve(kind, folder, mesh) for mesh in (ONE_DEVICE, *MESHES[kind])]))
