"""Lets the embeddings of image tokens start at the vectors of their codes.

Codes with similar vectors decode to similar pixels. A random projection of the vectors gives them
similar embeddings from the first step on, so what the decoder learns about one code holds for its
neighbours too. docs/train.md shows what this gains.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from leon_jax import weight_files
from leon_jax.config import UserError
from leon_jax.models.decoder import Decoder
from leon_jax.sharding import spec
from leon_jax.vocabulary import Vocabulary

# Share of the projected vectors and of the random start in the variance of an embedding.
_VECTORS, _RANDOM = 0.9, 0.1


def read_codebook(path: str | os.PathLike, codes: int) -> Float32[np.ndarray, "codes dim"]:
    """Reads the vectors of an image tokenizer's codes, scaled to a mean square length of 1.

    Args:
      path: the image tokenizer's file.
      codes: number of codes of the vocabulary.

    Raises:
      UserError: the file is missing or damaged, or has another number of codes.
    """
    arrays, config = weight_files.load(path, "tokenizer")
    vectors = np.asarray(arrays["codebook"], np.float32)
    if len(vectors) != codes:
        raise UserError(
            f"config.codebook: {os.fspath(path)} has {len(vectors)} codes, but the vocabulary has "
            f"{codes} image codes"
        )
    if config.get("unit_codes"):
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return vectors / np.sqrt(np.square(vectors).sum(1).mean())


def start_at_codes(
    table: Float[Array, "vocab embed"],
    codebook: Float32[np.ndarray, "codes dim"],
    vocabulary: Vocabulary,
    std: float,
    key: jax.Array,
) -> Float[Array, "vocab embed"]:
    """Returns a random table whose rows of image ids are near the projected vectors of their codes.

    Args:
      table: the random table.
      codebook: see `read_codebook`.
      vocabulary: the id layout.
      std: standard deviation of the table's elements; the new rows have the same.
      key: key of the random projection.
    """
    vectors = np.zeros((vocabulary.size, codebook.shape[1]), np.float32)
    vectors[vocabulary.image_start : vocabulary.image_stop] = codebook
    is_image = vocabulary.is_image(np.arange(vocabulary.size))[:, None]
    projection = std * jax.random.normal(key, (codebook.shape[1], table.shape[1]))
    projected = jnp.einsum(
        "vc,cd->vd", jnp.asarray(vectors), projection, out_sharding=spec("vocab", "weight_embed")
    )
    return jnp.where(is_image, _RANDOM**0.5, 1.0) * table + _VECTORS**0.5 * projected


def start_decoder_at_codes(
    model: Decoder,
    codebook: Float32[np.ndarray, "codes dim"],
    vocabulary: Vocabulary,
    key: jax.Array,
) -> None:
    """Changes the embeddings of a random decoder, and its untied output head, in place."""
    std = model.config.init_std
    tables = [model.table] if model.config.form.tied_head else [model.table, model.head_table]
    for table in tables:
        table[...] = start_at_codes(table[...], codebook, vocabulary, std, key)
