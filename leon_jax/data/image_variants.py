"""Variants of a dataset's pictures: the same change to all of them, encoded once.

A small dataset is learnt by heart long before a model has learnt to read its context. In a variant
every picture is moved, scaled, turned, and perhaps mirrored and recoloured in the same way, so a
retrieved document shows what cannot be known by heart: how things look *here*. Variant 0 changes
nothing, the first half change no colours and mirror nothing, and variant v is the same change
everywhere.
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

# How far a variant goes, either way: scale and aspect (natural logarithms), turn (radians), and
# shift (a fraction of the side).
MAX_ZOOM, MAX_STRETCH, MAX_ANGLE, MAX_SHIFT = 0.15, 0.08, 0.2, 0.06


def plain(count: int) -> int:
    """How many of `count` variants, counted from the first, keep colours and sides."""
    return (count + 1) // 2


def change(
    pixels: UInt8[np.ndarray, "h w 3"], variant: int, count: int
) -> UInt8[np.ndarray, "h w 3"]:
    """A picture as `variant` of `count` shows it; variant 0 is the picture itself."""
    if variant == 0:
        return pixels
    rng = np.random.default_rng(variant)
    zoom, stretch, angle, down, right = rng.uniform(-1, 1, 5)
    height, width = pixels.shape[:2]
    # Where an output pixel is read, from the centre: turned, then scaled along the axes.
    cos, sin = np.cos(MAX_ANGLE * angle), np.sin(MAX_ANGLE * angle)
    across = np.exp(MAX_STRETCH * stretch - MAX_ZOOM * zoom)
    upright = np.exp(-MAX_STRETCH * stretch - MAX_ZOOM * zoom)
    turn = np.array([[across * cos, -across * sin], [upright * sin, upright * cos]])
    centre = np.array([width, height]) / 2
    moved = centre - MAX_SHIFT * np.array([width * right, height * down])
    offset = moved - turn @ centre
    matrix = (*turn[0], offset[0], *turn[1], offset[1])
    picture = PIL.Image.fromarray(pixels).transform(
        (width, height),
        PIL.Image.Transform.AFFINE,
        matrix,
        PIL.Image.Resampling.BICUBIC,
        fillcolor="white",
    )
    if variant < plain(count):
        return np.asarray(picture)
    if variant % 2:
        picture = PIL.ImageOps.mirror(picture)
    hue, saturation, value = picture.convert("HSV").split()
    turned = (np.asarray(hue).astype(int) + int(rng.integers(32, 224))) % 256  # 256 is one turn
    hue = PIL.Image.fromarray(turned.astype(np.uint8))
    return np.asarray(PIL.Image.merge("HSV", (hue, saturation, value)).convert("RGB"))


def encode(
    source: Source, tokenizer: ImageTokenizer, count: int, progress: str | None = None
) -> UInt16[np.ndarray, "n count rows cols"]:
    """The codes of every document's picture in every variant."""
    rows, columns = tokenizer.shape
    codes = np.zeros((len(source), count, rows, columns), np.uint16)
    block = tokenizer.batch_size
    bar = tqdm(total=len(source), desc=progress, unit="doc", disable=progress is None)
    with bar:
        for start in range(0, len(source), block):
            pixels = [source[i].pixels for i in range(start, min(start + block, len(source)))]
            for variant in range(count):
                pictures = [tokenizer.preprocess(change(p, variant, count)) for p in pixels]
                found = tokenizer.encode(np.stack(pictures))
                codes[start : start + len(pixels), variant] = found
            bar.update(len(pixels))
    return codes


class Variants:
    """Documents as their variants show them.

    Args:
      shards: the codes of the documents, in their order; uint16[n, count, rows, cols] each.
      source: the documents.

    Raises:
      UserError: the codes are of other documents.
    """

    def __init__(self, shards: Sequence[UInt16[np.ndarray, "n count rows cols"]], source: Source):
        self.shards, self.source = list(shards), source
        self._ends = list(itertools.accumulate(map(len, self.shards)))
        if not self._ends or self._ends[-1] != len(source):
            found = self._ends[-1] if self._ends else 0
            raise UserError(f"there are variants of {found} documents, not of {len(source)}")

    @property
    def count(self) -> int:
        """How many variants there are, the plain picture among them."""
        return self.shards[0].shape[1]

    def __call__(self, index: int, variant: int) -> Document:
        """The document with the codes of its first picture replaced by those of the variant."""
        document = self.source[index]
        place = next(i for i, part in enumerate(document.parts) if isinstance(part, Image))
        shard = bisect.bisect_right(self._ends, index)
        row = index - (self._ends[shard - 1] if shard else 0)
        codes = self.shards[shard][row, variant].astype(np.int32)
        return document.replace(place, Image(codes=codes))
