"""The unit rows of all indexed documents, in files that are searched where they lie.

A bank is one or more plain `.npy` files, float16 or float32[n, d], read through memory maps; its
rows are numbered through all files in order. Searching reads it a block at a time
(`leon_jax.retrieval.mining`), so a bank may be far larger than memory.
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
from leon_jax.retrieval.device_blocks import Blocks, NotFiniteError
from leon_jax.retrieval.mining import NONE, nearest
from leon_jax.sharding import current_mesh

# What `approximate=True` asks for: the part of the true k best that is found on average.
RECALL = 0.99


class VectorIndex:
    """Rows of a collection, searched by inner product. Unit rows make a score a cosine.

    Args:
      arrays: float16 or float32[n_i, d], all of one type and width, at least one; may be memory
        maps. They must not change while the bank is used.

    Raises:
      UserError: the arrays are not that, or have 2**31 rows or more.
    """

    def __init__(self, arrays: Sequence[np.ndarray]):
        self._setup(list(arrays), [f"array {number}" for number in range(len(arrays))])

    @classmethod
    def open(cls, paths: Sequence[str | os.PathLike]) -> Self:
        """Maps `.npy` files into memory, in this order; their rows are not read yet.

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
        bank = cls.__new__(cls)
        bank._setup(arrays, names)
        bank._paths = names
        return bank

    def _setup(self, arrays: list[np.ndarray], names: list[str]) -> None:
        if not arrays:
            raise UserError("a bank needs at least one file or array of rows")
        for array, name in zip(arrays, names, strict=True):
            kind = f"{array.dtype}{list(array.shape)}"
            if array.ndim != 2 or array.dtype not in (np.float16, np.float32):
                raise UserError(f"{name} holds {kind}; a bank needs float16 or float32[n, d]")
            if (array.dtype, array.shape[1]) != (arrays[0].dtype, arrays[0].shape[1]):
                raise UserError(
                    f"{name} holds {kind}, but {names[0]} {arrays[0].dtype}"
                    f"{list(arrays[0].shape)}; all rows of a bank are of one type and width"
                )
        self._arrays, self._names = arrays, names
        self._ends = list(itertools.accumulate(map(len, arrays)))
        self._paths: list[str] | None = None
        self._blocks: Blocks | None = None
        if len(self) >= 2**31:
            raise UserError(f"a bank holds less than 2**31 rows, not {len(self)}")

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
        """Of the stored rows."""
        return self._arrays[0].dtype

    def rows(self, start: int, stop: int) -> Num[np.ndarray, "stop-start d"]:
        """Rows `start` to `stop` as they are stored; a copy where they lie in several files.

        Raises:
          UserError: the bank has no such rows.
        """
        if not 0 <= start <= stop <= len(self):
            raise UserError(f"rows {start} to {stop} are not within a bank of {len(self)}")
        parts, at = [], start
        while at < stop:
            number = bisect.bisect_right(self._ends, at)
            first = self._ends[number] - len(self._arrays[number])
            parts.append(self._arrays[number][at - first : min(stop, self._ends[number]) - first])
            at = self._ends[number]
        if not parts:
            return np.zeros((0, self.dimensions), self.dtype)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def take(self, ids: Int[np.ndarray, "*shape"]) -> Float32[np.ndarray, "*shape d"]:
        """The rows of these ids, in float32; zeros for -1.

        Raises:
          UserError: the bank has no such row.
        """
        ids = np.asarray(ids)
        flat = ids.ravel()
        if len(flat) and (flat.min() < NONE or flat.max() >= len(self)):
            raise UserError(f"rows {flat.min()} to {flat.max()} are not within 0 to {len(self)}")
        taken = np.zeros((len(flat), self.dimensions), np.float32)
        files = np.searchsorted(self._ends, flat, side="right")
        for number in np.unique(files[flat != NONE]):
            here = np.flatnonzero((files == number) & (flat != NONE))
            array = self._arrays[number]
            taken[here] = array[flat[here] - (self._ends[number] - len(array))]
        return taken.reshape(*ids.shape, self.dimensions)

    def search(
        self,
        queries: Float32[np.ndarray, "q d"],
        k: int,
        *,
        exclude: Sequence[int] | Int[np.ndarray, "q"] | Int[np.ndarray, "q m"] | None = None,
        keep: Bool[np.ndarray, "n"] | None = None,
        approximate: bool | float = False,
    ) -> tuple[Float32[np.ndarray, "q k"], Int32[np.ndarray, "q k"]]:
        """The k rows with the largest inner products, best first, on the devices of the mesh.

        Equal scores come in the order of their ids (in an approximate search they may not). Where
        fewer than k rows are left, ids end in -1 and scores in -inf. With several processes all
        must call it with the same arguments.

        Args:
          queries: float32[q, d], finite.
          k: how many to return, at least 1.
          exclude: ids never to return: one for each query (int[q], -1 for none) or several
            (int[q, m]).
          keep: rows with False are never returned.
          approximate: the part of the true k best that an approximate search finds on average, more
            than 0 and less than 1; True: `RECALL`. What it means: `leon_jax.retrieval.mining`.

        Returns:
          Scores float32[q, k] and ids int32[q, k].

        Raises:
          UserError: an argument does not fit the bank, or a row that was read is not finite.
        """
        queries = np.asarray(queries, np.float32)
        if k < 1:
            raise UserError(f"k is {k}; a search returns at least 1 row")
        if queries.ndim != 2 or queries.shape[1] != self.dimensions:
            raise UserError(
                f"queries are {list(queries.shape)}; this bank needs [q, {self.dimensions}]"
            )
        if not np.isfinite(queries).all():
            raise UserError("queries hold numbers that are not finite")
        if keep is not None and (keep.dtype != np.bool_ or keep.shape != (len(self),)):
            raise UserError(
                f"keep is {keep.dtype}{list(keep.shape)}; this bank needs bool[{len(self)}]"
            )
        recall = float(approximate) if approximate is not True else RECALL
        if not 0 <= recall < 1:
            raise UserError(f"approximate is {approximate}; it must be True, False or in (0, 1)")
        banned = np.zeros((len(queries), 0), np.int64) if exclude is None else np.asarray(exclude)
        if banned.ndim == 1:
            banned = banned[:, None]
        if banned.ndim != 2 or len(banned) != len(queries):
            raise UserError(
                f"exclude is {list(banned.shape)}; {len(queries)} queries need "
                f"[{len(queries)}] or [{len(queries)}, m]"
            )
        # What is excluded takes at most as many of the best places as there are ids.
        wide = min(k + banned.shape[1], max(len(self), 1))
        try:
            scores, ids = nearest(self._on_mesh(), queries, wide, keep, recall or 1.0)
        except NotFiniteError as error:
            raise UserError(self._not_finite(error.start, error.stop)) from error
        return _without(scores, ids, banned, k)

    def _on_mesh(self) -> Blocks:
        mesh = current_mesh()
        if self._blocks is None or self._blocks.mesh != mesh:
            self._blocks = Blocks(self.rows, len(self), self.dimensions, self.dtype, mesh)
        return self._blocks

    def _not_finite(self, start: int, stop: int) -> str:
        """What to say of a block in which some row is not finite."""
        for first in range(start, stop, 4096):
            finite = np.isfinite(self.rows(first, min(first + 4096, stop))).all(axis=1)
            if not finite.all():
                row = first + int(finite.argmin())
                number = bisect.bisect_right(self._ends, row)
                row -= self._ends[number] - len(self._arrays[number])
                return f"row {row} of {self._names[number]} holds numbers that are not finite"
        return f"rows {start} to {stop} were not finite when they were searched"


def save_rows(path: str | os.PathLike, rows: np.ndarray) -> None:
    """Writes an array as `.npy` to a temporary name, then puts the file in place."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        np.save(file, rows, allow_pickle=False)
    os.replace(temporary, path)


def _without(
    scores: np.ndarray, ids: np.ndarray, banned: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The first k that are not banned, in their order, and nothing after them."""
    out = np.zeros(ids.shape, bool)
    for column in banned.T:
        out |= ids == column[:, None]
    order = np.argsort(out, axis=1, kind="stable")[:, :k]
    gone = np.take_along_axis(out, order, axis=1)
    scores = np.where(gone, np.float32(-np.inf), np.take_along_axis(scores, order, axis=1))
    ids = np.where(gone, np.int32(NONE), np.take_along_axis(ids, order, axis=1))
    missing = ((0, 0), (0, k - ids.shape[1]))
    return (
        np.pad(scores, missing, constant_values=-np.inf),
        np.pad(ids, missing, constant_values=NONE),
    )
