"""Decoders in several forms, for tests: every switch differs from the default in one of them."""

import jax
import numpy as np
from flax import nnx

from leon_jax.models.decoder import Decoder
from leon_jax.models.decoder_config import DecoderConfig, Form
from tests.tiny import randomise

LLAMA = {
    "norm": "rms",
    "norm_scale": True,
    "mlp": "swiglu",
    "positions": "rotary",
    "tied_head": False,
}
# Options of DecoderConfig by the name of the form.
FORMS = {
    "cm3leon": {},
    "opt": {
        "form": Form(norm_scale=True, norm_bias=True, qkv_bias=True, out_bias=True, mlp_bias=True)
    },
    "llama": {"kv_heads": 2, "form": Form(**LLAMA)},
    "llama_biases": {
        "kv_heads": 2,
        "form": Form(**LLAMA, qkv_bias=True, out_bias=True, mlp_bias=True, norm_epsilon=1e-3),
    },
    "qwen3": {
        "kv_heads": 2,
        "form": Form(**{**LLAMA, "tied_head": True}, qk_norm="rms", rotary_base=500.0),
    },
    "chameleon": {"form": Form(**LLAMA, qk_norm="layer", qk_norm_by_head=True)},
    "chameleon_post": {
        "form": Form(**LLAMA, qk_norm="layer", qk_norm_by_head=True, norm_place="post")
    },
    "llamagen": {
        "form": Form(
            **{**LLAMA, "positions": "rotary_2d"},
            rotary_pairs="interleaved",
            image_columns=3,
            outside_images="zero",
        )
    },
    # The head has rows for the image ids of `tests.engine.small` alone.
    "image_head": {
        "form": Form(
            **{**LLAMA, "positions": "rotary_2d"},
            rotary_pairs="interleaved",
            image_columns=3,
            outside_images="zero",
            head_ids=(4, 28),
        )
    },
    "grid": {
        "kv_heads": 2,
        "form": Form(mlp="gelu", positions="rotary_2d", image_columns=3, embed_scale=3.0),
    },
}


def config(name: str, **options) -> DecoderConfig:
    """Returns a configuration of two layers of width 32 with four heads."""
    sizes = {"vocab_size": 48, "max_length": 16, "layers": 2, "embed": 32, "heads": 4, "mlp": 64}
    return DecoderConfig(**{**sizes, **FORMS[name], **options})


def decoder(name: str, scale: float = 0.3, **options) -> Decoder:
    """Returns a decoder with random weights, scales and biases included."""
    shape = config(name, **options)
    return randomise(jax.eval_shape(lambda: Decoder(shape, rngs=nnx.Rngs(0))), scale)


def cells(ids: np.ndarray, image_ids: int = 12) -> np.ndarray:
    """Returns the cell of each id of a row, if all ids below `image_ids` are those of images."""
    rows = np.full(ids.shape, -1, np.int32)
    for place in np.ndindex(ids.shape):
        if ids[place] < image_ids:
            before = (*place[:-1], place[-1] - 1)
            rows[place] = rows[before] + 1 if place[-1] else 0
    return rows


def random_ids(rows: int = 2, length: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Returns ids with runs of image ids, and their cells."""
    rng = np.random.default_rng(0)
    ids = rng.integers(12, 48, (rows, length)).astype(np.int32)
    ids[:, 2:9] = rng.integers(0, 12, (rows, 7))
    return ids, cells(ids)
