"""Composes scenes: two to four images side by side on white, to train an image tokenizer.

A tokenizer that has seen only one drawing in the middle of each image codes several small ones
badly.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from leon_jax.data.augment import BACKGROUND
from leon_jax.tokenizers.image import fit_image

MIN_IMAGES, MAX_IMAGES = 2, 4
# Smallest and largest side of an image, as a share of the side of the scene: 20 and 40 pixels of
# 64. They sum to less than 1, so two images always fit side by side.
MIN_SHARE, MAX_SHARE = 20 / 64, 40 / 64


def compose(
    images: Sequence[UInt8[np.ndarray, "h w 3"]], side: int, rng: np.random.Generator
) -> UInt8[np.ndarray, "side side 3"]:
    """Returns a scene of images that do not overlap, each at a random size and place.

    A random line divides the scene in two, and each part is divided again if it gets two images.

    Args:
      images: two to four images on white, of any sizes; the largest centred square is shown.
      side: height and width of the scene in pixels.
      rng: source of all random numbers.

    Raises:
      ValueError: there are fewer than two or more than four images.
    """
    if not MIN_IMAGES <= len(images) <= MAX_IMAGES:
        raise ValueError(f"a scene has two to four images, not {len(images)}")
    scene = np.full((side, side, 3), BACKGROUND, np.uint8)
    least, most = round(MIN_SHARE * side), round(MAX_SHARE * side)

    def cut() -> int:
        return int(rng.integers(side - most, most + 1))

    first = cut()
    parts = [(0, first), (first, side - first)]
    # Which parts have two images; of three images the first part or the second has two.
    doubled = rng.permutation(2) < len(images) - 2
    cells = []
    for (start, length), is_doubled in zip(parts, doubled, strict=True):
        middle = cut() if is_doubled else side
        cells.append((start, 0, length, middle))
        if is_doubled:
            cells.append((start, middle, length, side - middle))
    turned = rng.random() < 0.5
    for pixels, (x, y, width, height) in zip(images, cells, strict=True):
        size = int(rng.integers(least, min(width, height, most) + 1))
        x += int(rng.integers(width - size + 1))
        y += int(rng.integers(height - size + 1))
        top, left = (x, y) if turned else (y, x)
        scene[top : top + size, left : left + size] = fit_image(pixels, size)
    return scene
