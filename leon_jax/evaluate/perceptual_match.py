"""How often a generated image looks most like the real image of its own caption, by LPIPS."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, UInt8

from leon_jax.models.perceptual import Weights, features
from leon_jax.tokenizers.image import fit_image, normalize

_BATCH = 16
# Smaller images have too few features.
_MIN_SIDE = 64


def match_share(
    generated: Sequence[UInt8[np.ndarray, "h w 3"]],
    real: Sequence[UInt8[np.ndarray, "h w 3"]],
    weights: Weights,
) -> float:
    """Returns the share of generated images whose nearest real image is that of their own caption.

    Args:
      generated: one image for the caption of each real image.
      real: the real images. All images are compared at the size of the generated ones, or at 64
        pixels if that is larger.
      weights: the LPIPS weights of VGG16 (see `leon_jax.train.perceptual_weights`).
    """
    side = max(_MIN_SIDE, *generated[0].shape[:2])
    squares = [fit_image(image, side) for image in generated]
    real_squares = [fit_image(image, side) for image in real]
    nearest = distances(squares, real_squares, weights).argmin(axis=1)
    return float((nearest == np.arange(len(real))).mean())


def beyond_documents_share(
    generated: Sequence[UInt8[np.ndarray, "h w 3"]],
    real: Sequence[UInt8[np.ndarray, "h w 3"]],
    retrieved: Sequence[Sequence[UInt8[np.ndarray, "h w 3"]]],
    weights: Weights,
) -> float:
    """Returns the share of images that are nearer to the real image than to all documents read.

    A model that copies a document has the share 0.

    Args:
      generated: one image for the caption of each real image.
      real: the real images.
      retrieved: the images of the documents that were read for each generated image.
      weights: the LPIPS weights of VGG16.
    """
    side = max(_MIN_SIDE, *generated[0].shape[:2])
    shares = []
    for image, truth, documents in zip(generated, real, retrieved, strict=True):
        candidates = [fit_image(pixels, side) for pixels in (truth, *documents)]
        shares.append(distances([fit_image(image, side)], candidates, weights).argmin() == 0)
    return float(np.mean(shares))


def distances(
    first: Sequence[UInt8[np.ndarray, "h w 3"]],
    second: Sequence[UInt8[np.ndarray, "h w 3"]],
    weights: Weights,
) -> Float32[np.ndarray, "n m"]:
    """Returns the LPIPS distance (VGG16) of every image of `first` to every image of `second`.

    LPIPS is a weighted squared difference of features, so it is a squared Euclidean distance of
    scaled features, which are computed once for each image.
    """
    one, other = _vectors(first, weights), _vectors(second, weights)
    squares = np.square(one).sum(1)[:, None] + np.square(other).sum(1)[None]
    return np.maximum(squares - 2 * one @ other.T, 0)


def _vectors(
    images: Sequence[UInt8[np.ndarray, "h w 3"]], weights: Weights
) -> Float32[np.ndarray, "n d"]:
    rows = []
    for start in range(0, len(images), _BATCH):
        batch = normalize(np.stack(images[start : start + _BATCH]))
        padding = _BATCH - len(batch)
        padded = np.concatenate([batch, np.repeat(batch[-1:], padding, axis=0)])
        rows.append(np.asarray(_scaled_features(padded, weights))[: len(batch)])
    return np.concatenate(rows)


@jax.jit
def _scaled_features(images: Float[Array, "b h w 3"], weights: Weights) -> Float[Array, "b d"]:
    parts = []
    for number, tap in enumerate(features(images, weights, "vgg16")):
        unit = tap * jax.lax.rsqrt(jnp.square(tap).sum(-1, keepdims=True) + 1e-10)
        # The heads are not negative.
        head = jnp.sqrt(jnp.maximum(weights[f"NetLinLayer_{number}"]["kernel"], 0))
        positions = tap.shape[1] * tap.shape[2]
        parts.append((unit * head / np.sqrt(positions)).reshape(len(images), -1))
    return jnp.concatenate(parts, axis=1)
