"""A weight in 8 bits, and the product of activations with a weight of any dtype."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from leon_jax.ops import int8


class Int8Weight(nnx.Module):
    """A stacked weight in 8 bits, with a float32 scale for each layer and output channel.

    Args:
      weight: the weight to convert.
      summed: the axes that its product sums over.
    """

    def __init__(self, weight: Float[Array, "layers ..."], summed: tuple[int, ...]):
        values, scale = int8.quantize(weight, summed)
        self.values, self.scale = nnx.Param(values), nnx.Param(scale)


def product(
    subscripts: str,
    x: Float[Array, "..."],
    weight: nnx.Param | Int8Weight,
    sharding: jax.P,
) -> Float[Array, "..."]:
    """Computes `jnp.einsum` of activations and a weight of any dtype, in the activations' dtype."""
    if isinstance(weight, Int8Weight):
        return int8.einsum(subscripts, x, weight.values[...], weight.scale[...], sharding)
    return jnp.einsum(subscripts, x, weight[...].astype(x.dtype), out_sharding=sharding)
