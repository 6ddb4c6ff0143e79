"""Which documents are dropped because another one is the same, or nearly so.

Everything is decided by the order of the documents, so the result depends on nothing else.
"""

import numpy as np
from jaxtyping import Bool, UInt8

from leon_jax.data.sources.raw import Reason
from leon_jax.retrieval.bank import Bank

_QUERIES = 4096


class Fate:
    """Which documents are kept, and why and because of which other document one is not.

    Attributes:
      keep: bool[n].
      reason: for each document that is not kept, its reason.
      because: for such a document, the row of the one it repeats, or -1.
    """

    def __init__(self, count: int):
        self.keep = np.ones(count, bool)
        self.reason: dict[int, Reason] = {}
        self.because: dict[int, int] = {}

    def drop(self, row: int, reason: Reason, because: int = -1) -> None:
        """Drops a document that is still kept."""
        self.keep[row] = False
        self.reason[row], self.because[row] = reason, because


def repeated(digests: UInt8[np.ndarray, "n 16"], among: Bool[np.ndarray, "n"]) -> np.ndarray:
    """For each row the first row, among those allowed, with the same digest; itself if it is first.

    Rows that are not allowed stand for themselves.
    """
    first = np.arange(len(digests))
    rows = np.flatnonzero(among)
    names = np.ascontiguousarray(digests[rows]).view("V16").ravel()
    _, starts, inverse = np.unique(names, return_index=True, return_inverse=True)
    first[rows] = rows[starts[inverse]]
    return first


def drop_repeated(fate: Fate, digests: UInt8[np.ndarray, "n 16"], reason: Reason) -> None:
    """Drops every kept document whose digest an earlier kept one has."""
    first = repeated(digests, fate.keep)
    for row in np.flatnonzero(first != np.arange(len(first))):
        fate.drop(int(row), reason, int(first[row]))


def drop_near(fate: Fate, images: Bank, held_out: int, threshold: float) -> None:
    """Drops train documents until no two kept ones are above `threshold`, keeping earlier ones.

    Every document dropped here is above the threshold with an earlier one that is kept.

    Args:
      fate: of all documents, train last.
      images: the pictures' unit rows, in the same order; zeros stand for a missing picture.
      held_out: how many documents stand before those of train.
      threshold: inner product, positive.
    """
    places = np.arange(len(images))
    for start in range(held_out, len(images), _QUERIES):
        rows = np.flatnonzero(fate.keep[start : start + _QUERIES]) + start
        if not len(rows):
            continue
        vectors = images.take(rows)
        if start > held_out:
            before = fate.keep & (places >= held_out) & (places < start)
            scores, ids = images.search(vectors, 1, keep=before)
            for place in np.flatnonzero(scores[:, 0] > threshold):
                fate.drop(int(rows[place]), "copy_near", int(ids[place, 0]))
        # Within the block one after the other, for what is kept depends on what came before.
        alike = vectors @ vectors.T > threshold
        for number, row in enumerate(rows.tolist()):
            if not fate.keep[row]:
                continue
            for copy in rows[number + 1 :][alike[number, number + 1 :]].tolist():
                if fate.keep[copy]:
                    fate.drop(copy, "copy_near", row)


def drop_evaluation(fate: Fate, images: Bank, held_out: int, threshold: float) -> None:
    """Drops kept train documents above `threshold` to any document that is held out.

    The arguments are those of `drop_near`. What was dropped from the held-out splits still counts:
    it repeats something that is there.
    """
    others = np.arange(len(images)) < held_out
    kept = np.flatnonzero(fate.keep & ~others)
    for start in range(0, len(kept), _QUERIES):
        rows = kept[start : start + _QUERIES]
        scores, ids = images.search(images.take(rows), 1, keep=others)
        for place in np.flatnonzero(scores[:, 0] > threshold):
            fate.drop(int(rows[place]), "copy_of_evaluation", int(ids[place, 0]))
