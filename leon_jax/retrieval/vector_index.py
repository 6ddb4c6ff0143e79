"""The unit rows of all indexed documents, in memory-mapped files.

A vector index is one or more plain `.npy` files, float16 or float32[n, d], read through memory
maps. Its rows are numbered through all files in order. A search reads one block at a time
(`leon_jax.retrieval.exact_search`), so an index may be far larger than memory.
"""

import bisect
import itertools
import os
import pathlib
from collections.abc import Sequence
from typing import Self

import numpy as np
from jaxtyping import Bool, Float32, Int, Int32, Num

from leon_jax.config import UserError
from leon_jax.retrieval.device_blocks import NotFiniteError, RowBlocks
from leon_jax.retrieval.exact_search import NONE, nearest
from leon_jax.sharding import current_mesh

# Recall of `approximate=True`: the part of the true k best that is returned on average.
RECALL = 0.99


class VectorIndex:
    """Rows that are searched by inner product. With unit rows, a score is a cosine.

    Args:
      arrays: at least one array, float16 or float32[n_i, d], all of one type and width. They may
        be memory maps. They must not change while the index is used.

    Raises:
      UserError: the arrays do not fit, or have 2**31 rows or more.
    """

    def __init__(self, arrays: Sequence[np.ndarray]):
        self._setup(list(arrays), [f"array {number}" for number in range(len(arrays))])

    @classmethod
    def open(cls, paths: Sequence[str | os.PathLike]) -> Self:
        """Maps `.npy` files into memory, in this order, without reading their rows.

        Raises:
          UserError: no files are given, or one is missing, damaged, or does not hold such rows.
        """
        names, arrays = [os.fspath(path) for path in paths], []
        for name in names:
            try:
                arrays.append(np.load(name, mmap_mode="r", allow_pickle=False))
            except FileNotFoundError:
                raise UserError(f"there is no file {name}; run: leon prepare") from None
            except OSError as error:
                reason = error.strerror or "it is not a whole file"
                raise UserError(f"cannot read {name}: {reason}") from error
            except (ValueError, EOFError) as error:
                raise UserError(f"{name} is not a whole .npy file") from error
        index = cls.__new__(cls)
        index._setup(arrays, names)
        index._paths = names
        return index

    def _setup(self, arrays: list[np.ndarray], names: list[str]) -> None:
        if not arrays:
            raise UserError("a vector index needs at least one file or array of rows")
        for array, name in zip(arrays, names, strict=True):
            kind = f"{array.dtype}{list(array.shape)}"
            if array.ndim != 2 or array.dtype not in (np.float16, np.float32):
                raise UserError(f"{name} has {kind}; a vector index needs float16 or float32[n, d]")
            if (array.dtype, array.shape[1]) != (arrays[0].dtype, arrays[0].shape[1]):
                raise UserError(
                    f"{name} has {kind}, but {names[0]} has {arrays[0].dtype}"
                    f"{list(arrays[0].shape)}; all rows of an index are of one type and width"
                )
        self._arrays, self._names = arrays, names
        self._ends = list(itertools.accumulate(map(len, arrays)))
        self._paths: list[str] | None = None
        self._blocks: RowBlocks | None = None
        if len(self) >= 2**31:
            raise UserError(f"a vector index has fewer than 2**31 rows, not {len(self)}")

    def __reduce__(self):
        if self._paths is not None:
            return type(self).open, (self._paths,)
        return type(self), (self._arrays,)

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def dimensions(self) -> int:
        """Length of a row."""
        return self._arrays[0].shape[1]

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the stored rows."""
        return self._arrays[0].dtype

    def rows(self, start: int, stop: int) -> Num[np.ndarray, "stop-start d"]:
        """Returns rows `start` to `stop` in their stored dtype; a copy if they span several files.

        Raises:
          UserError: the index has no such rows.
        """
        if not 0 <= start <= stop <= len(self):
            raise UserError(f"rows {start} to {stop} are not within an index of {len(self)}")
        slices, row = [], start
        while row < stop:
            number = bisect.bisect_right(self._ends, row)
            first = self._ends[number] - len(self._arrays[number])
            slices.append(self._arrays[number][row - first : min(stop, self._ends[number]) - first])
            row = self._ends[number]
        if not slices:
            return np.zeros((0, self.dimensions), self.dtype)
        return slices[0] if len(slices) == 1 else np.concatenate(slices)

    def take(self, ids: Int[np.ndarray, "*shape"]) -> Float32[np.ndarray, "*shape d"]:
        """Returns the rows of `ids` in float32; zeros for -1.

        Raises:
          UserError: the index has no such row.
        """
        ids = np.asarray(ids)
        flat = ids.ravel()
        if len(flat) and (flat.min() < NONE or flat.max() >= len(self)):
            raise UserError(f"rows {flat.min()} to {flat.max()} are not within 0 to {len(self)}")
        rows = np.zeros((len(flat), self.dimensions), np.float32)
        files = np.searchsorted(self._ends, flat, side="right")
        for number in np.unique(files[flat != NONE]):
            positions = np.flatnonzero((files == number) & (flat != NONE))
            array = self._arrays[number]
            rows[positions] = array[flat[positions] - (self._ends[number] - len(array))]
        return rows.reshape(*ids.shape, self.dimensions)

    def search(
        self,
        queries: Float32[np.ndarray, "q d"],
        k: int,
        *,
        exclude: Sequence[int] | Int[np.ndarray, "q"] | Int[np.ndarray, "q m"] | None = None,
        keep: Bool[np.ndarray, "n"] | None = None,
        approximate: bool | float = False,
    ) -> tuple[Float32[np.ndarray, "q k"], Int32[np.ndarray, "q k"]]:
        """Returns the k rows with the largest inner products, on the devices of the current mesh.

        With several processes, all must call it with the same arguments.

        Args:
          queries: float32[q, d], finite.
          k: number of rows for each query, at least 1.
          exclude: ids that are never returned: one for each query (int[q], -1 for none) or several
            (int[q, m]).
          keep: rows with False are never returned.
          approximate: False: an exact search. A number in (0, 1): the part of the true k best that
            an approximate search returns on average (see
            `leon_jax.retrieval.exact_search`). True: `RECALL`.

        Returns:
          Scores float32[q, k] and ids int32[q, k], best first. Equal scores are in the order of
          their ids, except in an approximate search. Where fewer than k rows remain, ids end in -1
          and scores in -inf.

        Raises:
          UserError: an argument does not fit the index, or a row that was read is not finite.
        """
        queries = np.asarray(queries, np.float32)
        if k < 1:
            raise UserError(f"k is {k}; a search returns at least 1 row")
        if queries.ndim != 2 or queries.shape[1] != self.dimensions:
            raise UserError(
                f"queries are {list(queries.shape)}; this index needs [q, {self.dimensions}]"
            )
        if not np.isfinite(queries).all():
            raise UserError("queries have numbers that are not finite")
        if keep is not None and (keep.dtype != np.bool_ or keep.shape != (len(self),)):
            raise UserError(
                f"keep is {keep.dtype}{list(keep.shape)}; this index needs bool[{len(self)}]"
            )
        recall = float(approximate) if approximate is not True else RECALL
        if not 0 <= recall < 1:
            raise UserError(f"approximate is {approximate}; it must be True, False or in (0, 1)")
        excluded = np.zeros((len(queries), 0), np.int64) if exclude is None else np.asarray(exclude)
        if excluded.ndim == 1:
            excluded = excluded[:, None]
        if excluded.ndim != 2 or len(excluded) != len(queries):
            raise UserError(
                f"exclude is {list(excluded.shape)}; {len(queries)} queries need "
                f"[{len(queries)}] or [{len(queries)}, m]"
            )
        # Excluded ids are removed afterwards, so the search returns that many rows more.
        count = min(k + excluded.shape[1], max(len(self), 1))
        try:
            scores, ids = nearest(self._row_blocks(), queries, count, keep, recall or 1.0)
        except NotFiniteError as error:
            raise UserError(self._not_finite_message(error.start, error.stop)) from error
        return _without(scores, ids, excluded, k)

    def _row_blocks(self) -> RowBlocks:
        mesh = current_mesh()
        if self._blocks is None or self._blocks.mesh != mesh:
            self._blocks = RowBlocks(self.rows, len(self), self.dimensions, self.dtype, mesh)
        return self._blocks

    def _not_finite_message(self, start: int, stop: int) -> str:
        """Returns the error message for a block with a row that is not finite."""
        for first in range(start, stop, 4096):
            finite = np.isfinite(self.rows(first, min(first + 4096, stop))).all(axis=1)
            if not finite.all():
                row = first + int(finite.argmin())
                number = bisect.bisect_right(self._ends, row)
                row -= self._ends[number] - len(self._arrays[number])
                return f"row {row} of {self._names[number]} has numbers that are not finite"
        return f"rows {start} to {stop} were not finite when they were searched"


def save_rows(path: str | os.PathLike, rows: np.ndarray) -> None:
    """Writes an array as `.npy` under a temporary name, then renames the file."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        np.save(file, rows, allow_pickle=False)
    os.replace(temporary, path)


def _without(
    scores: np.ndarray, ids: np.ndarray, excluded: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first k results that are not excluded, in order, padded with -inf and -1."""
    is_excluded = np.zeros(ids.shape, bool)
    for column in excluded.T:
        is_excluded |= ids == column[:, None]
    order = np.argsort(is_excluded, axis=1, kind="stable")[:, :k]
    removed = np.take_along_axis(is_excluded, order, axis=1)
    scores = np.where(removed, np.float32(-np.inf), np.take_along_axis(scores, order, axis=1))
    ids = np.where(removed, np.int32(NONE), np.take_along_axis(ids, order, axis=1))
    padding = ((0, 0), (0, k - ids.shape[1]))
    return (
        np.pad(scores, padding, constant_values=-np.inf),
        np.pad(ids, padding, constant_values=NONE),
    )
