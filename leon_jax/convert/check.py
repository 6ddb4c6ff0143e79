"""Checks that converted weights work, since nobody but their owner has them."""

import os
from typing import NamedTuple

import jax
import numpy as np
import PIL.Image
import PIL.ImageDraw
from jaxtyping import Int, UInt8

from leon_jax import sharding
from leon_jax.tokenizers.image import ImageTokenizer, normalize, to_pixels

# The test image after a trained tokenizer is above this, and far below after random weights.
PLAUSIBLE = 15.0


class Reconstruction(NamedTuple):
    """A test image after an image tokenizer.

    Attributes:
      psnr: its PSNR in dB.
      codes: its codes.
    """

    psnr: float
    codes: Int[np.ndarray, "rows columns"]


def reconstruction(path: str | os.PathLike) -> Reconstruction:
    """Encodes and decodes a drawn test image with an image tokenizer."""
    with jax.set_mesh(sharding.make_mesh()):
        tokenizer = ImageTokenizer.load(path, batch_size=1)
        image = drawing(tokenizer.resolution)
        codes = tokenizer.encode(normalize(image[None]))
        decoded = to_pixels(tokenizer.decode(codes))[0]
    error = np.square(image.astype(np.float64) - decoded).mean()
    return Reconstruction(float(10 * np.log10(255**2 / max(error, 1e-10))), codes[0])


def drawing(side: int) -> UInt8[np.ndarray, "side side 3"]:
    """Draws a landscape: a sky with a gradient, a sun, hills and a house."""
    rows = np.linspace(0, 1, side)[:, None, None]
    sky = np.array([90, 150, 230]) * (1 - rows) + np.array([240, 220, 200]) * rows
    image = PIL.Image.fromarray(np.broadcast_to(sky, (side, side, 3)).astype(np.uint8))
    draw = PIL.ImageDraw.Draw(image)

    def at(*numbers: float) -> list[float]:
        return [number * side for number in numbers]

    draw.ellipse(at(0.65, 0.1, 0.85, 0.3), (255, 220, 80))
    draw.ellipse(at(-0.4, 0.6, 0.7, 1.6), (90, 150, 70))
    draw.ellipse(at(0.3, 0.7, 1.5, 1.7), (60, 120, 60))
    draw.rectangle(at(0.25, 0.5, 0.5, 0.75), (200, 90, 70))
    draw.polygon(at(0.2, 0.5, 0.375, 0.33, 0.55, 0.5), (110, 60, 50))
    draw.rectangle(at(0.34, 0.6, 0.42, 0.75), (70, 40, 30))
    return np.asarray(image)
