"""LPIPS, the learned perceptual distance (Zhang et al. 2018, arXiv 1801.03924).

The features are those of AlexNet or VGG16, trained on ImageNet, with the official v0.1 linear
heads. This module has only the arithmetic; `leon_jax.train.perceptual_weights` reads the weights.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from leon_jax.models.vqgan import conv

Network = Literal["alexnet", "vgg16"]
Weights = dict[str, dict[str, Array]]

# Mean and standard deviation of ImageNet pixels, for images in [-1, 1].
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)

# Convolutions between poolings, as (kernel name, stride, padding, whether the output is a tap).
_ALEXNET = (
    (("Conv_0", 4, 2, True),),
    (("Conv_1", 1, 2, True),),
    (("Conv_2", 1, 1, True), ("Conv_3", 1, 1, True), ("Conv_4", 1, 1, True)),
)
_VGG16 = tuple(
    tuple((f"Conv_{i}", 1, 1, i == group[-1]) for i in group)
    for group in ((0, 1), (2, 3), (4, 5, 6), (7, 8, 9), (10, 11, 12))
)


def features(
    images: Float[Array, "b h w 3"], weights: Weights, network: Network
) -> list[Float[Array, "b i j c"]]:
    """Returns the five feature maps (taps) that LPIPS compares, after their ReLU."""
    x = (images - jnp.array(SHIFT)) / jnp.array(SCALE)
    groups, window = (_ALEXNET, 3) if network == "alexnet" else (_VGG16, 2)
    taps = []
    for index, group in enumerate(groups):
        if index:
            x = jax.lax.reduce_window(
                x, -jnp.inf, jax.lax.max, (1, window, window, 1), (1, 2, 2, 1), "VALID"
            )
        for name, stride, padding, tap in group:
            layer = weights[name]
            pad = ((padding, padding),) * 2
            x = jax.nn.relu(conv(x, layer["kernel"], layer["bias"], stride, pad))
            if tap:
                taps.append(x)
    return taps


def lpips(
    first: Float[Array, "b h w 3"],
    second: Float[Array, "b h w 3"],
    weights: Weights,
    network: Network = "vgg16",
) -> Float[Array, "b"]:
    """Returns the LPIPS distance of each pair of images in [-1, 1]; 0 for equal images.

    Args:
      first, second: images of at least 32 pixels a side.
      weights: `Conv_i` with `kernel` (HWIO) and `bias`, `NetLinLayer_i` with `kernel` [c].
      network: the network of the weights.
    """
    total = jnp.zeros(first.shape[0])
    pairs = zip(features(first, weights, network), features(second, weights, network), strict=True)
    for i, (a, b) in enumerate(pairs):
        difference = jnp.square(_unit(a) - _unit(b))
        total += (difference * weights[f"NetLinLayer_{i}"]["kernel"]).sum(-1).mean((1, 2))
    return total


def _unit(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    # The epsilon is inside the root so that the gradient at 0 is finite.
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-10)
