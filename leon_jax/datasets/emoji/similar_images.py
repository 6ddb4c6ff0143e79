"""Finds emoji images that are nearly the same, by their colours at 16 x 16 pixels.

Two designs of a concept are nearly the same if one is a redrawing of the other, with other shades
or lines. Images of different concepts must be almost equal: designs draw two expressions of a face
with the same head, and the difference is what matters.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import PIL.Image
from jaxtyping import Float32, UInt8

# Distances below which two images of one concept, or of different concepts, are nearly the same.
# Redrawings have distances of 0.1 to 0.25, two designs by different people of 0.3 and more. Two
# expressions of a face have distances of 0.09 and more.
SAME_CONCEPT, OTHER_CONCEPT = 0.25, 0.05

_SIDE = 16  # pixels
_BLOCK = 256  # held-out images that are compared at a time


@dataclasses.dataclass(frozen=True)
class NearCopy:
    """A held-out image and a train image that are nearly the same.

    Attributes:
      held_out, train: their keys, such as "noto/2B1B".
      distance: see `near_copies`.
    """

    held_out: str
    train: str
    distance: float


def signature(pixels: UInt8[np.ndarray, "side side 3"]) -> Float32[np.ndarray, "768"]:
    """Returns the difference of an image from white in [0, 1], at 16 x 16 pixels."""
    image = PIL.Image.fromarray(pixels).resize((_SIDE, _SIDE), PIL.Image.Resampling.BOX)
    return (1 - np.asarray(image, np.float32) / 255).ravel()


def near_copies(
    signatures: Mapping[str, Float32[np.ndarray, "pixels"]],
    held_out: Sequence[str],
    train: Sequence[str],
) -> list[NearCopy]:
    """Returns the pairs of a held-out and a train image that are nearly the same.

    The distance of signatures a and b is |a - b| / max(|a|, |b|): the root mean square difference
    of the colours, relative to that of the stronger image from white.

    Args:
      signatures: `signature` of every image, by key; none is blank.
      held_out: keys of the held-out images.
      train: keys of the train images.

    Returns:
      The pairs, in the order of `held_out`.
    """
    if not held_out or not train:
        return []
    train_concepts = np.array([_concept(key) for key in train])
    columns = np.stack([signatures[key] for key in train]).astype(np.float64)
    column_squares = np.square(columns).sum(1)[None]
    found = []
    for start in range(0, len(held_out), _BLOCK):
        block = held_out[start : start + _BLOCK]
        rows = np.stack([signatures[key] for key in block]).astype(np.float64)
        row_squares = np.square(rows).sum(1)[:, None]
        difference = np.maximum(row_squares + column_squares - 2 * rows @ columns.T, 0)
        distances = np.sqrt(difference / np.maximum(row_squares, column_squares))
        is_same = np.array([_concept(key) for key in block])[:, None] == train_concepts
        limits = np.where(is_same, SAME_CONCEPT, OTHER_CONCEPT)
        found += [
            NearCopy(block[row], train[column], round(float(distances[row, column]), 3))
            for row, column in zip(*np.nonzero(distances < limits), strict=True)
        ]
    return found


def _concept(key: str) -> str:
    """Returns the concept of a key, "design/concept"."""
    return key.partition("/")[2]
