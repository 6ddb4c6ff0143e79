"""Variants of the images of a dataset: each variant transforms all images in the same way.

A model memorises a small dataset long before it learns to use retrieved documents. A variant
shifts, scales and rotates all images, and may mirror and recolour them. In a variant the model
cannot know the look of an image by heart; only the retrieved documents show the transformation.

Variant 0 changes nothing. The first half of the variants change no colours and do not mirror. A
variant is the same transformation for every image of every dataset. Codes of all variants are
computed once.
"""

import bisect
import itertools
from collections.abc import Sequence

import numpy as np
import PIL.Image
import PIL.ImageOps
from jaxtyping import UInt8, UInt16
from tqdm import tqdm

from leon_jax.config import UserError
from leon_jax.documents import Document, Image, Source
from leon_jax.tokenizers.image import ImageTokenizer

# Maximum changes in either direction: scale and aspect (natural logarithms), rotation (radians) and
# shift (a fraction of the side).
MAX_ZOOM, MAX_STRETCH, MAX_ANGLE, MAX_SHIFT = 0.15, 0.08, 0.2, 0.06


def plain(count: int) -> int:
    """Returns how many of the first `count` variants change no colours and do not mirror."""
    return (count + 1) // 2


def change(
    pixels: UInt8[np.ndarray, "h w 3"], variant: int, count: int
) -> UInt8[np.ndarray, "h w 3"]:
    """Returns an image transformed by a variant.

    Args:
      pixels: the image.
      variant: number of the variant, in 0..count - 1; 0 returns the image unchanged.
      count: number of variants.
    """
    if variant == 0:
        return pixels
    rng = np.random.default_rng(variant)
    zoom, stretch, angle, down, right = rng.uniform(-1, 1, 5)
    height, width = pixels.shape[:2]
    # Maps output pixels to input pixels, about the centre: a rotation, then a scale per axis.
    cos, sin = np.cos(MAX_ANGLE * angle), np.sin(MAX_ANGLE * angle)
    scale_x = np.exp(MAX_STRETCH * stretch - MAX_ZOOM * zoom)
    scale_y = np.exp(-MAX_STRETCH * stretch - MAX_ZOOM * zoom)
    linear = np.array([[scale_x * cos, -scale_x * sin], [scale_y * sin, scale_y * cos]])
    centre = np.array([width, height]) / 2
    shifted = centre - MAX_SHIFT * np.array([width * right, height * down])
    offset = shifted - linear @ centre
    matrix = (*linear[0], offset[0], *linear[1], offset[1])
    image = PIL.Image.fromarray(pixels).transform(
        (width, height),
        PIL.Image.Transform.AFFINE,
        matrix,
        PIL.Image.Resampling.BICUBIC,
        fillcolor="white",
    )
    if variant < plain(count):
        return np.asarray(image)
    if variant % 2:
        image = PIL.ImageOps.mirror(image)
    hue, saturation, value = image.convert("HSV").split()
    rotated = (np.asarray(hue).astype(int) + int(rng.integers(32, 224))) % 256  # 256 is one turn
    hue = PIL.Image.fromarray(rotated.astype(np.uint8))
    return np.asarray(PIL.Image.merge("HSV", (hue, saturation, value)).convert("RGB"))


def encode(
    source: Source, tokenizer: ImageTokenizer, count: int, progress: str | None = None
) -> UInt16[np.ndarray, "n count rows cols"]:
    """Encodes the image of every document in every variant.

    Args:
      source: documents with pixels.
      tokenizer: the image tokenizer.
      count: number of variants.
      progress: label of a progress bar; None shows no bar.
    """
    rows, columns = tokenizer.shape
    codes = np.zeros((len(source), count, rows, columns), np.uint16)
    block = tokenizer.batch_size
    bar = tqdm(total=len(source), desc=progress, unit="doc", disable=progress is None)
    with bar:
        for start in range(0, len(source), block):
            pixels = [source[i].pixels for i in range(start, min(start + block, len(source)))]
            for variant in range(count):
                images = [tokenizer.preprocess(change(p, variant, count)) for p in pixels]
                codes[start : start + len(pixels), variant] = tokenizer.encode(np.stack(images))
            bar.update(len(pixels))
    return codes


class Variants:
    """Documents with the image codes of a variant.

    Args:
      shards: codes of the documents, in their order, one array per shard.
      source: the documents.

    Raises:
      UserError: the number of codes differs from the number of documents.
    """

    def __init__(self, shards: Sequence[UInt16[np.ndarray, "n count rows cols"]], source: Source):
        self.shards, self.source = list(shards), source
        self._ends = list(itertools.accumulate(map(len, self.shards)))
        if not self._ends or self._ends[-1] != len(source):
            count = self._ends[-1] if self._ends else 0
            raise UserError(f"there are variants of {count} documents, not of {len(source)}")

    @property
    def count(self) -> int:
        """The number of variants, including the unchanged images."""
        return self.shards[0].shape[1]

    def __call__(self, index: int, variant: int) -> Document:
        """Returns document `index` with the codes of its first image replaced by the variant's."""
        document = self.source[index]
        position = next(i for i, part in enumerate(document.parts) if isinstance(part, Image))
        shard = bisect.bisect_right(self._ends, index)
        row = index - (self._ends[shard - 1] if shard else 0)
        codes = self.shards[shard][row, variant].astype(np.int32)
        return document.replace(position, Image(codes=codes))
