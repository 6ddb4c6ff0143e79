"""Examples become rows of a fixed length, in one of two ways.

    whole     an example is never cut; rows are filled side by side and padded at their ends
    stream    examples are laid end to end and cut wherever a row is full, pictures included

Both give rows dict(ids, targets, weights, segment_ids, positions), each [length]. In a row every
example has its own segment id (from 1; 0 is padding) and positions from 0, so the model meets
documents in training exactly as it meets prompts.

The stream is the paper's way (CM3Leon, section 2.2; metaseq's `sample_break_mode none`), and the
only one for examples longer than a row. What a border cuts off goes on in the next row as a segment
of its own: what came before it is not there to be seen, and its positions count from 0, so they
stay within the model's table however long the example is. Metaseq by default marks no segments:
attention crosses from one document to the next, and positions count through the row. Its blocks
have no token in common, so the first of a block is never predicted; here the last target of a row
is the first input of the next, and every token is a target once but for the first of an example.
"""

from collections.abc import Mapping
from typing import Any

import grain
import numpy as np

from leon_jax.vocabulary import Vocabulary

_TOKENS = ("ids", "targets", "weights")


def whole(
    examples: grain.IterDataset, length: int, bins: int, seed: int, vocabulary: Vocabulary
) -> grain.IterDataset:
    """Rows of examples that are never cut, each put where it leaves the least room (best fit).

    Args:
      examples: dict(ids, targets, weights, positions), of at most `length` tokens.
      length: tokens of a row.
      bins: rows that are filled side by side. When an example fits none of them they are given
        out, in random order. An iterator that is restored fills them again.
      seed: of that order.
      vocabulary: says what padding is.
    """
    padding = {"ids": vocabulary.pad, "targets": vocabulary.pad, "weights": 0, "positions": 0}
    packed = grain.experimental.BestFitPackIterDataset(
        examples,
        length_struct=dict.fromkeys(padding, length),
        num_packing_bins=bins,
        seed=seed % 2**32,
        padding_struct=padding,
    )
    return packed.map(_row)


def _row(packed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    row = {name: packed[name] for name in (*_TOKENS, "positions")}
    return row | {"segment_ids": packed["ids_segment_ids"]}


class Stream(grain.IterDataset):
    """Rows cut from examples laid end to end; when the examples end, what fills no row is dropped.

    Args:
      examples: dict(ids, targets, weights), of any length; other entries are left out.
      length: tokens of a row.
    """

    def __init__(self, examples: grain.IterDataset, length: int) -> None:
        super().__init__(examples)
        self._length = length

    def __iter__(self) -> "_StreamIterator":
        return _StreamIterator(iter(self._parent), self._length)


# Grain's ConcatThenSplitIterDataset cuts likewise, but reads tuples back from its state, which JSON
# turns into lists: from some states it goes on with other rows.
class _StreamIterator(grain.DatasetIterator):
    """Its state: where the examples are before the one being cut, and how much of it is used."""

    def __init__(self, examples: grain.DatasetIterator, length: int) -> None:
        super().__init__(examples)
        self._length = length
        self._example: dict[str, np.ndarray] | None = None  # the one being cut

    def __next__(self) -> dict[str, np.ndarray]:
        pieces: list[dict[str, np.ndarray]] = []
        room = self._length
        while room:
            example = self._open() if self._example is None else self._example
            start, stop = self._used, self._used + room
            piece = {name: example[name][start:stop] for name in _TOKENS}
            pieces.append(piece)
            room -= len(piece["ids"])
            self._used += len(piece["ids"])
            if self._used == len(example["ids"]):
                self._example = None
        sizes = [len(piece["ids"]) for piece in pieces]
        return {
            **{name: np.concatenate([piece[name] for piece in pieces]) for name in _TOKENS},
            "segment_ids": np.repeat(np.arange(1, len(sizes) + 1, dtype=np.int32), sizes),
            "positions": np.concatenate([np.arange(size, dtype=np.int32) for size in sizes]),
        }

    def get_state(self) -> dict[str, Any]:
        if self._example is None:
            return {"examples": self._parent.get_state(), "used": 0}
        return {"examples": self._before, "used": self._used}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["examples"])
        self._example = None
        if state["used"]:
            self._open()
            self._used = state["used"]

    def _open(self) -> dict[str, np.ndarray]:
        self._before, self._used = self._parent.get_state(), 0
        self._example = next(self._parent)
        return self._example
