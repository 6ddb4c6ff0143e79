"""Rotary positions (Su et al. 2021, arXiv 2104.09864) along a sequence or over an image's grid.

A query or key of one head is `head_dim / 2` pairs of numbers. Each pair is rotated by an angle that
grows with the position, so that a score depends only on the difference of two positions.

Axes: the leading `*lead` is (batch, length) for whole sequences, or (streams, groups, samples) for
one decoding step.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Which numbers of a head form a pair: i and i + head_dim / 2 ("half_split", as in Hugging Face's
# Llama), or 2 i and 2 i + 1 ("interleaved", as in Meta's Llama and in LlamaGen).
Pairs = Literal["half_split", "interleaved"]

# The rotation of tokens outside images, if positions are those of a grid; see `grid_rotation`.
OutsideImages = Literal["sequence", "zero"]


class Rotation(NamedTuple):
    """The cosine and sine of the angle of each pair, in float32."""

    cos: Float[Array, "*lead pairs"]
    sin: Float[Array, "*lead pairs"]


def rotation(*positions: Int[Array, "*lead"], head_dim: int, base: float) -> Rotation:
    """Returns the rotation of tokens at these positions.

    Args:
      positions: one or more coordinates of each token. Each coordinate rotates an equal share of
        the pairs, in order. Pair i of a share of n pairs turns by base^(-i / n) per position.
      head_dim: size of a head; a multiple of twice the number of coordinates.
      base: 10,000 in the paper.
    """
    share = head_dim // len(positions)
    rates = base ** -(jnp.arange(0, share, 2, dtype=jnp.float32) / share)
    angles = [each[..., None].astype(jnp.float32) * rates for each in positions]
    joined = jnp.concatenate(angles, axis=-1)
    return Rotation(jnp.cos(joined), jnp.sin(joined))


def grid_rotation(
    positions: Int[Array, "*lead"],
    cells: Int[Array, "*lead"],
    columns: int,
    *,
    head_dim: int,
    base: float,
    outside: OutsideImages = "sequence",
) -> Rotation:
    """Returns a rotation whose first half depends on the row and whose second half on the column.

    Args:
      positions: position of each token in its sequence.
      cells: index of each image token in its image, by rows; -1 for other tokens.
      columns: tokens in a row of an image.
      head_dim, base: see `rotation`; `head_dim` is a multiple of 4.
      outside: "sequence": the row and the column of a token outside images are its position, and
        those of an image are counted from the position of its first token. So the order of texts
        and images is kept. "zero": row and column are counted from 0, and the cosine and the sine
        of tokens outside images are 0, as in LlamaGen (arXiv 2406.06525, gpt.py).
    """
    cell = jnp.maximum(cells, 0)
    start = positions - cell if outside == "sequence" else jnp.zeros_like(cell)
    turned = rotation(start + cell // columns, start + cell % columns, head_dim=head_dim, base=base)
    if outside == "sequence":
        return turned
    is_image = (cells >= 0)[..., None]
    return Rotation(*(jnp.where(is_image, each, 0) for each in turned))


def rotate(
    x: Float[Array, "*lead heads head_dim"], by: Rotation, pairs: Pairs
) -> Float[Array, "*lead heads head_dim"]:
    """Rotates the pairs of every head, in float32. The result has the dtype of x."""
    cos, sin = by.cos[..., None, :], by.sin[..., None, :]
    numbers = x.astype(jnp.float32)
    if pairs == "half_split":
        first, second = jnp.split(numbers, 2, axis=-1)
        turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    else:
        first, second = numbers[..., ::2], numbers[..., 1::2]
        turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1)
        turned = turned.reshape(x.shape)
    return turned.astype(x.dtype)


def image_cells(is_image: Bool[Array, "batch length"]) -> Int[Array, "batch length"]:
    """Returns the index of each image token in its run of image tokens; -1 for other tokens.

    `leon_jax.vocabulary.Vocabulary.cells` is the same on the host.
    """
    layout = jax.typeof(is_image).sharding.spec
    # The run of a token may begin on another device.
    whole = jax.reshard(is_image, jax.P(layout[0], None))
    index = jnp.broadcast_to(jnp.arange(whole.shape[1], dtype=jnp.int32), whole.shape)
    last_other = jax.lax.cummax(jnp.where(whole, -1, index), axis=1)
    cells = jnp.where(whole, index - last_other - 1, -1)
    return jax.reshard(cells, layout)
