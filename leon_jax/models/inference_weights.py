"""Weights as inference reads them: in fewer bits, or each layer in arrays of its own.

Training keeps float32 weights, all layers stacked. Both functions here return another decoder and
leave the given one as it is. The result is for inference alone: it has no gradient that is of use,
and it is not what a weight file holds.
"""

from typing import Literal

import jax
from flax import nnx

from leon_jax.models.decoder import Decoder
from leon_jax.models.int8_weight import Int8Weight

# The dtype of a decoder's weights.
WeightType = Literal["float32", "bfloat16", "int8"]

# The axes of each stacked weight that its product sums over; axis 0 is that of the layers.
_SUMMED = {"query": (1,), "key": (1,), "value": (1,), "out": (1, 2), "fc1": (1,), "fc2": (1,)}


def unstack(decoder: Decoder) -> Decoder:
    """The decoder with every layer's weights in arrays of their own.

    A scan over stacked layers copies each layer's weights and cache out of the stack before it
    reads them (XLA on CPUs), which takes longer than decoding a token from them.
    """
    unstacked = nnx.clone(decoder)
    unstacked.blocks = nnx.List(
        [
            jax.tree.map(lambda x, at=layer: x[at : at + 1], decoder.blocks)
            for layer in range(decoder.config.layers)
        ]
    )
    return unstacked


def convert_weights(decoder: Decoder, dtype: WeightType) -> Decoder:
    """The decoder with its weights kept in another type; the compute dtype stays.

    Args:
      decoder: with floating-point weights.
      dtype: `int8` keeps the blocks' weights in 8 bits, with one scale for each output channel,
        and both tables in the compute dtype; the other types hold for all weights.
    """
    converted = nnx.clone(decoder)
    floating = decoder.config.dtype if dtype == "int8" else dtype
    for name in ("table", "positions"):
        weight = getattr(converted, name)
        setattr(converted, name, nnx.Param(weight[...].astype(floating)))
    for stack in converted.stacks:
        for name, summed in _SUMMED.items():
            weight = getattr(stack, name)[...]
            small = Int8Weight(weight, summed) if dtype == "int8" else None
            setattr(stack, name, small or nnx.Param(weight.astype(floating)))
    return converted


def weight_dtype(decoder: Decoder) -> str:
    """What the weights are kept in: a `WeightType`."""
    small = isinstance(decoder.stacks[0].query, Int8Weight)
    return "int8" if small else str(decoder.table.dtype)
