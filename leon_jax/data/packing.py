"""Packs examples into rows of a fixed length.

    whole     never splits an example; several rows are filled in parallel and padded at their ends
    stream    concatenates examples and splits them wherever a row is full, also inside images

Both yield rows dict(ids, targets, weights, segment_ids, positions), each [length]. In a row every
example has a segment id (from 1; 0 is padding) and positions from 0, so the model sees documents in
training as it sees prompts.

"stream" is the packing of the paper (CM3Leon, section 2.2; `sample_break_mode none` in metaseq),
and the only one for examples longer than a row. The rest of a split example becomes a separate
segment of the next row. It does not attend to the first piece, and its positions start from 0, so
they stay within the model's table. Two things differ from metaseq. By default metaseq has no
segments: attention crosses documents, and positions count through the row. Its blocks share no
token, so the first token of a block is never a target. Here the last target of a row is the first
input of the next row, so every token except the first of an example is a target once.
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
    """Packs examples without splitting them, each into the fullest row that it fits (best fit).

    Args:
      examples: dict(ids, targets, weights, positions), of at most `length` tokens.
      length: tokens per row.
      bins: number of rows that are filled in parallel. If an example fits none of them, all are
        returned in random order. A restored iterator fills them again.
      seed: seed of that order.
      vocabulary: gives the padding id.
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
    """Rows of concatenated examples, which are split where a row is full.

    The incomplete row at the end of the examples is dropped.

    Args:
      examples: dict(ids, targets, weights), of any length; other entries are ignored.
      length: tokens per row.
    """

    def __init__(self, examples: grain.IterDataset, length: int) -> None:
        super().__init__(examples)
        self._length = length

    def __iter__(self) -> "_StreamIterator":
        return _StreamIterator(iter(self._parent), self._length)


# Grain's ConcatThenSplitIterDataset packs in the same way, but its state holds tuples, which JSON
# turns into lists; restored from some states, it continues with different rows.
class _StreamIterator(grain.DatasetIterator):
    """Iterates over the rows of a `Stream`.

    The state holds the state of the examples before the current one, and the number of tokens of
    the current example that are used.
    """

    def __init__(self, examples: grain.DatasetIterator, length: int) -> None:
        super().__init__(examples)
        self._length = length
        self._example: dict[str, np.ndarray] | None = None  # the current example

    def __next__(self) -> dict[str, np.ndarray]:
        pieces: list[dict[str, np.ndarray]] = []
        remaining = self._length
        while remaining:
            example = self._next_example() if self._example is None else self._example
            start, stop = self._used, self._used + remaining
            piece = {name: example[name][start:stop] for name in _TOKENS}
            pieces.append(piece)
            remaining -= len(piece["ids"])
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
        return {"examples": self._parent_state, "used": self._used}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["examples"])
        self._example = None
        if state["used"]:
            self._next_example()
            self._used = state["used"]

    def _next_example(self) -> dict[str, np.ndarray]:
        self._parent_state, self._used = self._parent.get_state(), 0
        self._example = next(self._parent)
        return self._example
