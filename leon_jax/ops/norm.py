"""Layer norm and RMS norm over the last axis."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

NormKind = Literal["layer", "rms"]


def normalize(
    x: Float[Array, "*lead width"],
    kind: NormKind = "layer",
    scale: Float[Array, "..."] | None = None,
    bias: Float[Array, "..."] | None = None,
    epsilon: float = 1e-5,
) -> Float[Array, "*lead width"]:
    """Returns x with mean square 1 along the last axis, times `scale`, plus `bias`.

    The computation is in float32, and the result has the dtype of x.

    Args:
      x: the numbers.
      kind: "layer" first subtracts the mean (Ba et al. 2016); "rms" does not (Zhang and Sennrich
        2019).
      scale, bias: broadcast against x; None: 1 and 0.
      epsilon: is added to the mean square.
    """
    normed = x.astype(jnp.float32)
    if kind == "layer":
        normed = normed - normed.mean(axis=-1, keepdims=True)
    mean_square = jnp.square(normed).mean(axis=-1, keepdims=True)
    normed = normed * jax.lax.rsqrt(mean_square + epsilon)
    if scale is not None:
        normed = normed * scale.astype(jnp.float32)
    if bias is not None:
        normed = normed + bias.astype(jnp.float32)
    return normed.astype(x.dtype)
