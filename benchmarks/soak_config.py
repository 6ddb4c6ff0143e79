"""Config of the run that `benchmarks/soak.py` kills: a small decoder on a few random images.

It uses everything that a checkpoint must restore: random retrieved documents, CM3 masks, packing
and AdamW's moments. The model is wide enough that a save takes as long as many steps.
"""

import pathlib

import jax
from ml_collections import ConfigDict

from leon_jax import sharding
from leon_jax.config import to_dict
from leon_jax.tokenizers.text import TextTokenizer
from leon_jax.vocabulary import Vocabulary
from tests import tiny

SAVE_EVERY = 10


def get_config(folder: str) -> ConfigDict:
    """Returns the config; `folder` has `tiny/` and `prepared/`, which `write_data` writes."""
    data = pathlib.Path(folder)
    text = data / "tiny" / "text.json"
    # Sizes that are divisible by 2 and 4 on every axis of a mesh.
    vocabulary = Vocabulary.compact(tiny.CODES, TextTokenizer.load(text).size, 4, multiple=4)
    steps = 400
    return ConfigDict(
        {
            "kind": "decoder",
            "seed": 3,
            "batch_size": 4,
            "steps": steps,
            "vocabulary": to_dict(vocabulary),
            "model": {
                "vocab_size": vocabulary.size, "max_length": 160, "layers": 4, "embed": 128,
                "heads": 4, "mlp": 512, "init_std": 0.02,
            },
            "optimizer": {"learning_rate": 1e-3, "warmup_steps": 10, "total_steps": steps},
            "data": {
                "folder": str(data / "prepared"), "text": str(text),
                "image_shape": (tiny.GRID, tiny.GRID), "length": 96,
                "retrieved": (0.5, 0.25, 0.25),
            },
            "masking": {"placement": "segment"},
            # Log every loss, so that all can be compared.
            "loop": {
                "log_every": 1, "save_every": SAVE_EVERY, "sample_every": 1_000_000,
                "data_shards": 2, "mesh": (-1, 1, 1, 1),
            },
        }
    )  # fmt: skip


def write_data(folder: pathlib.Path) -> None:
    """Writes the data that `get_config` reads."""
    with jax.set_mesh(sharding.make_mesh((1, 1, 1, 1), jax.devices()[:1])):
        tiny.write_prepared(folder / "prepared", tiny.write_model_folder(folder / "tiny"))
