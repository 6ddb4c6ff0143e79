"""Converts a decoder's weights for inference: to fewer bits, or to separate arrays of each layer.

Training uses float32 weights with all layers stacked. The functions here return a new decoder and
do not change their argument. The new decoder is only for inference: it cannot be trained or written
to a weight file.
"""

from typing import Literal

import jax
from flax import nnx

from leon_jax.models.decoder import Decoder
from leon_jax.models.decoder_config import layer_weights
from leon_jax.models.int8_weight import Int8Weight

# The dtype of a decoder's weights.
WeightType = Literal["float32", "bfloat16", "int8"]


def unstack(decoder: Decoder) -> Decoder:
    """Returns the decoder with separate arrays for the weights of each layer.

    On CPUs, XLA copies each layer's weights and cache out of the stack in a scan over layers. This
    takes longer than decoding a token.
    """
    unstacked = nnx.clone(decoder)
    unstacked.blocks = nnx.List(
        [
            jax.tree.map(lambda x, index=layer: x[index : index + 1], decoder.blocks)
            for layer in range(decoder.config.layers)
        ]
    )
    return unstacked


def convert_weights(decoder: Decoder, dtype: WeightType) -> Decoder:
    """Returns the decoder with its weights in another dtype. The compute dtype does not change.

    Args:
      decoder: a decoder with floating-point weights.
      dtype: `int8` stores the weights of the blocks' products in 8 bits, with one scale for each
        output channel, and all other weights in the compute dtype. Another dtype applies to all
        weights.
    """
    converted = nnx.clone(decoder)
    floating = decoder.config.dtype if dtype == "int8" else dtype
    for name, weight in list(vars(converted).items()):
        if isinstance(weight, nnx.Param):
            setattr(converted, name, nnx.Param(weight[...].astype(floating)))
    for stack in converted.stacks:
        for name, (*_, summed) in layer_weights(decoder.config).items():
            weight = getattr(stack, name)[...]
            if dtype == "int8" and summed:
                # Axis 0 is that of the layers.
                setattr(stack, name, Int8Weight(weight, tuple(range(1, summed + 1))))
            else:
                setattr(stack, name, nnx.Param(weight.astype(floating)))
    return converted


def weight_dtype(decoder: Decoder) -> str:
    """Returns the `WeightType` of a decoder's weights."""
    is_int8 = isinstance(decoder.stacks[0].query, Int8Weight)
    return "int8" if is_int8 else str(decoder.table.dtype)
