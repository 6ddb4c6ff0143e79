"""A bank as a FAISS index, for serving on CPUs without JAX (the extra `faiss`)."""

import os
import pathlib
import struct
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float32

from leon_jax.config import UserError
from leon_jax.retrieval.vector_index import VectorIndex

FLAT = "Flat"
_ROWS = 65_536  # read at once
_SAMPLE = 262_144  # rows that an index is trained on at most


def export(bank: VectorIndex, path: str | os.PathLike, factory: str = FLAT) -> None:
    """Writes an index for inner products whose ids are the rows of the bank, whole or not at all.

    A flat index is written row by row, so it may be larger than memory; one of another kind is
    built in memory. Read it with `faiss.read_index`.

    Args:
      bank: at least one row.
      path: the file.
      factory: of `faiss.index_factory`, for example `IVF4096,PQ64`; it is trained on rows at equal
        distances in the bank.

    Raises:
      UserError: FAISS is not installed, the bank is empty, or there is no such factory.
    """
    try:
        import faiss
    except ImportError as error:
        raise UserError("FAISS is not installed: pip install 'leon_jax[faiss]'") from error
    if not len(bank):
        raise UserError("the bank is empty; a FAISS index needs at least one row")
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    if factory == FLAT:
        with temporary.open("wb") as file:
            file.write(_flat_header(faiss, bank.dimensions, len(bank)))
            for rows in _blocks(bank):
                file.write(rows.tobytes())
    else:
        try:
            index = faiss.index_factory(bank.dimensions, factory, faiss.METRIC_INNER_PRODUCT)
            if not index.is_trained:
                count = min(len(bank), _SAMPLE)
                index.train(bank.take(np.arange(count) * len(bank) // count))
        except RuntimeError as error:
            raise UserError(
                f"FAISS cannot make {factory!r} of a bank of {len(bank)} rows; it must be a "
                "factory string of FAISS, of an index that so many rows can train"
            ) from error
        for rows in _blocks(bank):
            index.add(rows)
        faiss.write_index(index, os.fspath(temporary))
    os.replace(temporary, path)


def _blocks(bank: VectorIndex) -> Iterator[Float32[np.ndarray, "n d"]]:
    """All rows in order."""
    for start in range(0, len(bank), _ROWS):
        yield bank.rows(start, min(start + _ROWS, len(bank))).astype("<f4")


def _flat_header(faiss, dimensions: int, count: int) -> bytes:
    """What stands before the rows in the file of a flat index: among others two counts.

    Raises:
      UserError: this version of FAISS writes something else.
    """

    def with_rows(rows: int) -> bytes:
        header = bytearray(faiss.serialize_index(faiss.IndexFlatIP(dimensions)).tobytes())
        struct.pack_into("<q", header, 8, rows)  # after the kind and the width
        struct.pack_into("<Q", header, len(header) - 8, rows * dimensions)
        return bytes(header)

    index, row = faiss.IndexFlatIP(dimensions), np.ones((1, dimensions), "<f4")
    index.add(row)
    if faiss.serialize_index(index).tobytes() != with_rows(1) + row.tobytes():
        raise UserError(
            f"FAISS {faiss.__version__} writes flat indexes in a way that is not known here"
        )
    return with_rows(count)
