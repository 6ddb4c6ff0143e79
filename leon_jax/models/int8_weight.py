"""A weight in 8 bits, and the product of activations with a weight of any dtype."""

import jax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from leon_jax.ops import int8, products


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
    operands: DTypeLike | None = None,
) -> Float[Array, "..."]:
    """Computes `jnp.einsum` of activations and a weight of any dtype, in the activations' dtype.

    Args:
      subscripts, x, weight: see `jnp.einsum`; x has a leading `...`.
      sharding: sharding of the result.
      operands: dtype of both operands, if the weight is not in 8 bits; None: that of x (see
        `leon_jax.ops.products`).
    """
    if isinstance(weight, Int8Weight):
        return int8.einsum(subscripts, x, weight.values[...], weight.scale[...], sharding)
    return products.einsum(subscripts, x, weight[...], operands, out_sharding=sharding)
