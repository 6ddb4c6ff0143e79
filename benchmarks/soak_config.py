"""The run that `benchmarks/soak.py` kills: a small decoder on a few made-up pictures.

Everything that a checkpoint must carry is in it: retrieved documents drawn at random, CM3 masks,
packing, several moments of AdamW. It is wide enough that a save takes as long as many steps.
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
    """`folder` holds `tiny/` and `prepared/`, as `tests/tiny.py` writes them."""
    data = pathlib.Path(folder)
    text = data / "tiny" / "text.json"
    # Sizes that a mesh with 2 or 4 on any axis divides.
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
            # Every loss is logged, so that every one can be compared.
            "loop": {
                "log_every": 1, "save_every": SAVE_EVERY, "sample_every": 1_000_000,
                "data_shards": 2, "mesh": (-1, 1, 1, 1),
            },
        }
    )  # fmt: skip


def write_data(folder: pathlib.Path) -> None:
    """Writes what `get_config` is given."""
    with jax.set_mesh(sharding.make_mesh((1, 1, 1, 1), jax.devices()[:1])):
        tiny.write_prepared(folder / "prepared", tiny.write_model_folder(folder / "tiny"))
