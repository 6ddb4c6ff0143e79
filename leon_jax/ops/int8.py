"""Quantisation to 8 bits with a scale: a quarter of the memory and bandwidth of float32.

The quantisation is symmetric and linear: x is about `values * scale`, with 255 levels from -127 to
127. The scale is shared along the axes that a product sums over, so it is applied to the result of
the product.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

_LEVELS = 127


def quantize(
    x: Float[Array, "..."], axes: tuple[int, ...]
) -> tuple[Int8[Array, "..."], Float[Array, "..."]]:
    """Quantizes x to int8 values and float32 scales with `axes` of length 1.

    The largest magnitude along `axes` is exact. The error of the others is at most half a scale.
    """
    x = x.astype(jnp.float32)
    scale = jnp.abs(x).max(axis=axes, keepdims=True) / _LEVELS
    # Zeros stay zeros for any scale.
    values = jnp.round(x / jnp.where(scale > 0, scale, 1))
    return values.astype(jnp.int8), scale


def einsum(
    subscripts: str,
    x: Float[Array, "..."],
    values: Int8[Array, "..."],
    scale: Float[Array, "..."],
    out_sharding: jax.P,
) -> Float[Array, "..."]:
    """Computes `jnp.einsum(subscripts, x, values * scale)`, reading `values` in 8 bits.

    Args:
      subscripts: x has a leading `...`. An axis of `values` that is not in the result has length 1
        in `scale`. The other axes of `values` are the last axes of the result.
      x: activations. The product is computed in their dtype.
      values, scale: see `quantize`.
      out_sharding: sharding of the result.
    """
    product = jnp.einsum(
        subscripts,
        x,
        values.astype(x.dtype),
        preferred_element_type=jnp.float32,
        out_sharding=out_sharding,
    )
    weight, result = subscripts.split(",")[1].split("->")
    shape = [size for size, name in zip(scale.shape, weight, strict=True) if name in result]
    scale = jax.reshard(scale.reshape(shape), jax.P(*out_sharding[-len(shape) :]))
    return (product * scale).astype(x.dtype)
