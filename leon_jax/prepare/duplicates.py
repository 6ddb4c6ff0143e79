"""Drops documents that duplicate other documents exactly or nearly.

The order of the documents decides which of two duplicates is dropped, so the result is
deterministic.
"""

import os
import pathlib

import numpy as np
from jaxtyping import Bool, Float32, Int, UInt8

from leon_jax.data.sources.raw_record import REASONS, Reason
from leon_jax.retrieval.exact_search import NONE, PASS
from leon_jax.retrieval.vector_index import VectorIndex, save_rows

_BLOCK = 4096  # documents that are compared pairwise in one matrix product


class Decisions:
    """For each document whether it is kept or dropped, and why.

    Attributes:
      rows: structured [n] with the fields `reason` (uint8: 0 if the document is kept, else 1 + its
        index in `REASONS`), `because` (int32: row of the document that it duplicates, or -1) and
        `score` (float32: their similarity).
    """

    def __init__(self, count: int):
        fields = [("reason", np.uint8), ("because", np.int32), ("score", np.float32)]
        self.rows = np.zeros(count, fields)
        self.rows["because"] = NONE

    @classmethod
    def open(cls, path: pathlib.Path) -> "Decisions":
        """Reads the file that `save` wrote."""
        decisions = cls(0)
        decisions.rows = np.load(path, allow_pickle=False)
        return decisions

    def save(self, path: str | os.PathLike) -> None:
        """Writes the decisions to a file, atomically."""
        save_rows(path, self.rows)

    @property
    def keep(self) -> Bool[np.ndarray, "n"]:
        """Mask of the documents that are kept."""
        return self.rows["reason"] == 0

    def drop(
        self,
        rows: int | Int[np.ndarray, "m"],
        reason: Reason,
        because: int | Int[np.ndarray, "m"] = NONE,
        score: float | Float32[np.ndarray, "m"] = 1.0,
    ) -> None:
        """Drops documents.

        Args:
          rows: rows of documents that have been kept so far.
          reason: the reason to record.
          because: rows of the documents that they duplicate, or NONE (-1).
          score: similarity to those documents.
        """
        self.rows["reason"][rows] = 1 + REASONS.index(reason)
        self.rows["because"][rows] = because
        self.rows["score"][rows] = score

    def reason(self, row: int) -> str:
        """Returns why a document is dropped."""
        return REASONS[int(self.rows["reason"][row]) - 1]


def first_occurrence(digests: UInt8[np.ndarray, "n 16"], mask: Bool[np.ndarray, "n"]) -> np.ndarray:
    """Returns for each row the first row with the same digest.

    Args:
      digests: one digest per row.
      mask: rows to compare; a row outside the mask maps to itself.

    Returns:
      int64[n]
    """
    first = np.arange(len(digests))
    rows = np.flatnonzero(mask)
    elements = _as_elements(digests[rows])
    _, starts, inverse = np.unique(elements, return_index=True, return_inverse=True)
    first[rows] = rows[starts[inverse]]
    return first


def _as_elements(digests: UInt8[np.ndarray, "n 16"]) -> np.ndarray:
    """Returns V16[n], with one element per digest, which NumPy can sort."""
    return np.ascontiguousarray(digests).view("V16").ravel()


def drop_exact(decisions: Decisions, digests: UInt8[np.ndarray, "n 16"], reason: Reason) -> None:
    """Drops every kept document that has the digest of an earlier kept document."""
    first = first_occurrence(digests, decisions.keep)
    rows = np.flatnonzero(first != np.arange(len(first)))
    decisions.drop(rows, reason, first[rows])


def drop_held_out_pictures(
    decisions: Decisions, pictures: UInt8[np.ndarray, "n 16"], held_out: int
) -> None:
    """Drops train documents that have the images of a held-out document.

    Args:
      decisions: the decisions about all documents, train last.
      pictures: a digest of each document's images.
      held_out: number of held-out documents, which come before those of train.
    """
    first = first_occurrence(pictures, np.ones(len(pictures), bool))
    train = np.arange(len(pictures)) >= held_out
    rows = np.flatnonzero(decisions.keep & train & (first < held_out))
    decisions.drop(rows, "picture_held_out", first[rows])


def drop_near(
    decisions: Decisions,
    images: VectorIndex,
    held_out: int,
    threshold: float,
    pictures: UInt8[np.ndarray, "n 16"] | None = None,
) -> None:
    """Drops train documents that are similar to an earlier kept train document.

    Afterwards no two kept train documents have a similarity above `threshold`, unless their images
    are equal: several captions of an image are kept or dropped together.

    Args:
      decisions: the decisions about all documents, train last.
      images: unit rows of the images, in the same order; a zero row means a missing image.
      held_out: number of held-out documents, which come before those of train.
      threshold: inner product, positive.
      pictures: a digest of each document's images; None: documents with equal images are copies.
    """
    train = decisions.keep
    train[:held_out] = False
    first = np.arange(len(train))
    if pictures is not None:
        # The first document of each image stands for the others.
        first = first_occurrence(pictures, train)
        train &= first == np.arange(len(train))
    # Compare only documents that have a close neighbour; this leaves few.
    candidates = [np.zeros(0, np.int64)]
    for rows in _passes(np.flatnonzero(train)):
        scores, _ = images.search(images.take(rows), 1, exclude=rows, keep=train)
        candidates.append(rows[scores[:, 0] > threshold])
    rows = np.concatenate(candidates)
    if len(rows):
        index = VectorIndex([images.take(chunk).astype(images.dtype) for chunk in _passes(rows)])
        because, score = _near(index, threshold)
        copies = np.flatnonzero(because != NONE)
        reasons, scores = np.full(len(train), NONE), np.zeros(len(train), np.float32)
        reasons[rows[copies]], scores[rows[copies]] = rows[because[copies]], score[copies]
        dropped = np.flatnonzero(decisions.keep & (reasons[first] != NONE))
        dropped = dropped[dropped >= held_out]
        decisions.drop(dropped, "copy_near", reasons[first[dropped]], scores[first[dropped]])


def _near(
    images: VectorIndex, threshold: float
) -> tuple[Int[np.ndarray, "n"], Float32[np.ndarray, "n"]]:
    """Returns for each row an earlier kept row above the threshold, or -1, and the similarity."""
    because, score = np.full(len(images), NONE, np.int64), np.zeros(len(images), np.float32)
    positions = np.arange(len(images))
    for start in range(0, len(images), _BLOCK):
        vectors = images.rows(start, min(start + _BLOCK, len(images))).astype(np.float32)
        if start:
            earlier = (because == NONE) & (positions < start)
            scores, ids = images.search(vectors, 1, keep=earlier)
            because[start : start + _BLOCK] = np.where(scores > threshold, ids, NONE)[:, 0]
            score[start : start + _BLOCK] = scores[:, 0]
        # Within a block the loop is sequential: a row is kept or not depending on earlier rows.
        similarity = vectors @ vectors.T
        for offset in range(len(vectors)):
            row = start + offset
            if because[row] == NONE:
                copies = offset + 1 + np.flatnonzero(similarity[offset, offset + 1 :] > threshold)
                copies = copies[because[start + copies] == NONE]
                because[start + copies], score[start + copies] = row, similarity[offset, copies]
    return because, score


def drop_evaluation(
    decisions: Decisions, images: VectorIndex, held_out: int, threshold: float
) -> None:
    """Drops train documents that are similar to a held-out document.

    The arguments are those of `drop_near`. Dropped held-out documents still count here, because
    each of them duplicates a held-out document that is kept.
    """
    evaluation = np.arange(len(images)) < held_out
    for rows in _passes(np.flatnonzero(decisions.keep & ~evaluation)):
        scores, ids = images.search(images.take(rows), 1, keep=evaluation)
        copies = scores[:, 0] > threshold
        decisions.drop(rows[copies], "copy_of_evaluation", ids[copies, 0], scores[copies, 0])


def _passes(rows: Int[np.ndarray, "n"]) -> list[np.ndarray]:
    """Splits rows into chunks that a search answers in one pass over the index."""
    return [rows[start : start + PASS] for start in range(0, len(rows), PASS)]
