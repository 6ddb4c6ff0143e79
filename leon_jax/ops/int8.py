"""Numbers in 8 bits with a scale beside them: a quarter of float32's memory and traffic.

Symmetric and linear: x is about `values * scale`, with 255 levels from -127 to 127. The scale is
shared along the axes that a product sums over, so it is applied after the product, to its result.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

_LEVELS = 127


def quantize(
    x: Float[Array, "..."], axes: tuple[int, ...]
) -> tuple[Int8[Array, "..."], Float[Array, "..."]]:
    """int8 values, and float32 scales with `axes` of length 1, whose product is nearest to x.

    The largest magnitude along `axes` is kept exactly; the others are off by half a scale at most.
    """
    wide = x.astype(jnp.float32)
    scale = jnp.abs(wide).max(axis=axes, keepdims=True) / _LEVELS
    # Zeros stay zeros whatever their scale.
    values = jnp.round(wide / jnp.where(scale > 0, scale, 1))
    return values.astype(jnp.int8), scale


def einsum(
    subscripts: str,
    x: Float[Array, "..."],
    values: Int8[Array, "..."],
    scale: Float[Array, "..."],
    out_sharding: jax.P,
) -> Float[Array, "..."]:
    """`jnp.einsum(subscripts, x, values * scale)` that reads `values` in 8 bits.

    Args:
      subscripts: x with a leading `...`; every axis of `values` that is missing in the result has
        length 1 in `scale`, and the others stand last in the result.
      x: its dtype is what is computed in.
      values, scale: see `quantize`.
      out_sharding: of the result.
    """
    product = jnp.einsum(
        subscripts,
        x,
        values.astype(x.dtype),
        preferred_element_type=jnp.float32,
        out_sharding=out_sharding,
    )
    weight, result = subscripts.split(",")[1].split("->")
    kept = [size for size, name in zip(scale.shape, weight, strict=True) if name in result]
    scale = jax.reshard(scale.reshape(kept), jax.P(*out_sharding[-len(kept) :]))
    return (product * scale).astype(x.dtype)
