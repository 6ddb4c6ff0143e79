"""Tables of neighbours: the documents that each document of a split may retrieve, best first.

Each shard of records has one `.npy` file, with row i for record i. It is read through a memory map,
so a table may be far larger than memory, and a look-up reads one page.
"""

import bisect
import itertools
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from leon_jax.config import UserError

FIELDS = ("by_text_ids", "by_text_scores", "by_image_ids", "by_image_scores")


def row_type(k: int) -> np.dtype:
    """Returns the dtype of a row: for each modality k ids (train rows, -1: none) and k scores."""
    return np.dtype(
        [(name, np.int32 if name.endswith("ids") else np.float32, (k,)) for name in FIELDS]
    )


class Neighbours:
    """The neighbour table of a split, in one or more shards.

    Args:
      shards: arrays of `row_type(k)`.
    """

    def __init__(self, shards: Sequence[np.ndarray]):
        self.shards = list(shards)
        self._ends = list(itertools.accumulate(map(len, self.shards)))

    @classmethod
    def open(cls, paths: Sequence[str | os.PathLike]) -> "Neighbours":
        """Maps files into memory.

        Raises:
          UserError: a file is missing or damaged, or is not a table of neighbours.
        """
        shards = []
        for path in paths:
            try:
                shard = np.load(path, mmap_mode="r", allow_pickle=False)
            except FileNotFoundError:
                raise UserError(f"there is no file {os.fspath(path)}; run: leon prepare") from None
            except OSError as error:
                reason = error.strerror or "it is not a whole file"
                raise UserError(f"cannot read {os.fspath(path)}: {reason}") from error
            except (ValueError, EOFError) as error:
                raise UserError(f"{os.fspath(path)} is damaged; run: leon prepare") from error
            if shard.dtype.names != FIELDS or shard.ndim != 1:
                raise UserError(f"{os.fspath(path)} is not a table of neighbours")
            shards.append(shard)
        return cls(shards)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, row: int) -> np.void:
        """Returns a row with the fields of `row_type`.

        Raises:
          IndexError: there is no such row.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of a table with {len(self)}")
        shard = bisect.bisect_right(self._ends, row)
        return self.shards[shard][row - (self._ends[shard - 1] if shard else 0)]

    def column(self, name: str) -> Any:
        """Returns all rows of one field, in memory: int32 or float32[n, k]."""
        return np.concatenate([shard[name] for shard in self.shards])
