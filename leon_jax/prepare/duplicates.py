"""Which documents are dropped because another one is the same, or nearly so.

Everything is decided by the order of the documents, so the result depends on nothing else.
"""

import os
import pathlib

import numpy as np
from jaxtyping import Bool, Float32, Int, UInt8

from leon_jax.data.sources.raw_record import REASONS, Reason
from leon_jax.retrieval.mining import NONE, PASS
from leon_jax.retrieval.vector_index import VectorIndex, save_rows

_BLOCK = 4096  # documents that are compared with each other, all pairs at once


class Fate:
    """Which documents are kept, and why and because of which other document one is not.

    Attributes:
      rows: for each document `reason`, 0 if it is kept and else 1 + its place in `REASONS`;
        `because`, the row of the document it repeats, or -1; and how much it is like that, `score`.
    """

    def __init__(self, count: int):
        fields = [("reason", np.uint8), ("because", np.int32), ("score", np.float32)]
        self.rows = np.zeros(count, fields)
        self.rows["because"] = NONE

    @classmethod
    def open(cls, path: pathlib.Path) -> "Fate":
        """What `save` wrote."""
        fate = cls(0)
        fate.rows = np.load(path, allow_pickle=False)
        return fate

    def save(self, path: str | os.PathLike) -> None:
        """Writes a file, which appears complete or not at all."""
        save_rows(path, self.rows)

    @property
    def keep(self) -> Bool[np.ndarray, "n"]:
        """Which documents are kept."""
        return self.rows["reason"] == 0

    def drop(
        self,
        rows: int | Int[np.ndarray, "m"],
        reason: Reason,
        because: int | Int[np.ndarray, "m"] = NONE,
        score: float | Float32[np.ndarray, "m"] = 1.0,
    ) -> None:
        """Drops documents that are still kept."""
        self.rows["reason"][rows] = 1 + REASONS.index(reason)
        self.rows["because"][rows] = because
        self.rows["score"][rows] = score

    def reason(self, row: int) -> str:
        """Why a document is dropped."""
        return REASONS[int(self.rows["reason"][row]) - 1]


def repeated(digests: UInt8[np.ndarray, "n 16"], among: Bool[np.ndarray, "n"]) -> np.ndarray:
    """For each row the first row, among those allowed, with the same digest; itself if it is first.

    Rows that are not allowed stand for themselves.
    """
    first = np.arange(len(digests))
    rows = np.flatnonzero(among)
    _, starts, inverse = np.unique(_as_one(digests[rows]), return_index=True, return_inverse=True)
    first[rows] = rows[starts[inverse]]
    return first


def _as_one(digests: UInt8[np.ndarray, "n 16"]) -> np.ndarray:
    """Each digest as one element, which NumPy can sort."""
    return np.ascontiguousarray(digests).view("V16").ravel()


def drop_repeated(fate: Fate, digests: UInt8[np.ndarray, "n 16"], reason: Reason) -> None:
    """Drops every kept document whose digest an earlier kept one has."""
    first = repeated(digests, fate.keep)
    rows = np.flatnonzero(first != np.arange(len(first)))
    fate.drop(rows, reason, first[rows])


def drop_near(fate: Fate, images: VectorIndex, held_out: int, threshold: float) -> None:
    """Drops train documents until no two kept ones are above `threshold`, keeping earlier ones.

    Every document dropped here is above the threshold with an earlier one that is kept.

    Args:
      fate: of all documents, train last.
      images: the pictures' unit rows, in the same order; zeros stand for a missing picture.
      held_out: how many documents stand before those of train.
      threshold: inner product, positive.
    """
    train = fate.keep
    train[:held_out] = False
    # A document far from all others is neither dropped nor a reason to drop one: few are left.
    suspects = [np.zeros(0, np.int64)]
    for rows in _passes(np.flatnonzero(train)):
        scores, _ = images.search(images.take(rows), 1, exclude=rows, keep=train)
        suspects.append(rows[scores[:, 0] > threshold])
    rows = np.concatenate(suspects)
    if len(rows):
        among = VectorIndex([images.take(some).astype(images.dtype) for some in _passes(rows)])
        because, score = _near(among, threshold)
        copies = np.flatnonzero(because != NONE)
        fate.drop(rows[copies], "copy_near", rows[because[copies]], score[copies])


def _near(
    images: VectorIndex, threshold: float
) -> tuple[Int[np.ndarray, "n"], Float32[np.ndarray, "n"]]:
    """For each row an earlier kept one above the threshold, or -1 if it is kept; and the score."""
    because, score = np.full(len(images), NONE, np.int64), np.zeros(len(images), np.float32)
    places = np.arange(len(images))
    for start in range(0, len(images), _BLOCK):
        vectors = images.rows(start, min(start + _BLOCK, len(images))).astype(np.float32)
        if start:
            before = (because == NONE) & (places < start)
            scores, ids = images.search(vectors, 1, keep=before)
            because[start : start + _BLOCK] = np.where(scores > threshold, ids, NONE)[:, 0]
            score[start : start + _BLOCK] = scores[:, 0]
        # Within the block one after the other, for what is kept depends on what came before.
        alike = vectors @ vectors.T
        for place in range(len(vectors)):
            if because[start + place] == NONE:
                copies = place + 1 + np.flatnonzero(alike[place, place + 1 :] > threshold)
                copies = copies[because[start + copies] == NONE]
                because[start + copies], score[start + copies] = start + place, alike[place, copies]
    return because, score


def drop_evaluation(fate: Fate, images: VectorIndex, held_out: int, threshold: float) -> None:
    """Drops kept train documents above `threshold` to any document that is held out.

    The arguments are those of `drop_near`. What was dropped from the held-out splits still counts:
    it repeats something that is there.
    """
    others = np.arange(len(images)) < held_out
    for rows in _passes(np.flatnonzero(fate.keep & ~others)):
        scores, ids = images.search(images.take(rows), 1, keep=others)
        copies = scores[:, 0] > threshold
        fate.drop(rows[copies], "copy_of_evaluation", ids[copies, 0], scores[copies, 0])


def _passes(rows: Int[np.ndarray, "n"]) -> list[np.ndarray]:
    """As many rows at a time as a search answers in one pass over the bank."""
    return [rows[start : start + PASS] for start in range(0, len(rows), PASS)]
