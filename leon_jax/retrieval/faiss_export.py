"""Exports a vector index to FAISS, for serving on CPUs without JAX (the extra `faiss`)."""

import os
import pathlib
import struct
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float32

from leon_jax.config import UserError
from leon_jax.retrieval.vector_index import VectorIndex

FLAT = "Flat"
_ROWS = 65_536  # rows read at once
_TRAINING_ROWS = 262_144  # the most rows that a FAISS index is trained on


def export(index: VectorIndex, path: str | os.PathLike, factory: str = FLAT) -> None:
    """Writes a FAISS index for inner products. Its ids are the row numbers of `index`.

    A flat index is written row by row, so it may be larger than memory. An index of another kind
    is built in memory. The file appears under its name only when it is complete. Read it with
    `faiss.read_index`.

    Args:
      index: at least one row.
      path: the file to write.
      factory: a string for `faiss.index_factory`, for example `IVF4096,PQ64`. The FAISS index is
        trained on rows at equal distances in `index`.

    Raises:
      UserError: FAISS is not installed, the index is empty, or there is no such factory.
    """
    try:
        import faiss
    except ImportError as error:
        raise UserError("FAISS is not installed: pip install 'leon_jax[faiss]'") from error
    if not len(index):
        raise UserError("the vector index is empty; a FAISS index needs at least one row")
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    if factory == FLAT:
        with temporary.open("wb") as file:
            file.write(_flat_header(faiss, index.dimensions, len(index)))
            for rows in _blocks(index):
                file.write(rows.tobytes())
    else:
        try:
            built = faiss.index_factory(index.dimensions, factory, faiss.METRIC_INNER_PRODUCT)
            if not built.is_trained:
                count = min(len(index), _TRAINING_ROWS)
                built.train(index.take(np.arange(count) * len(index) // count))
        except RuntimeError as error:
            raise UserError(
                f"FAISS cannot build {factory!r} from {len(index)} rows; it must be a factory "
                "string of FAISS, for an index that this many rows can train"
            ) from error
        for rows in _blocks(index):
            built.add(rows)
        faiss.write_index(built, os.fspath(temporary))
    os.replace(temporary, path)


def _blocks(index: VectorIndex) -> Iterator[Float32[np.ndarray, "n d"]]:
    """Reads all rows in order, one block at a time."""
    for start in range(0, len(index), _ROWS):
        yield index.rows(start, min(start + _ROWS, len(index))).astype("<f4")


def _flat_header(faiss, dimensions: int, count: int) -> bytes:
    """Returns the bytes before the rows in the file of a flat index. They include two counts.

    Raises:
      UserError: this version of FAISS writes another format.
    """

    def with_rows(rows: int) -> bytes:
        header = bytearray(faiss.serialize_index(faiss.IndexFlatIP(dimensions)).tobytes())
        struct.pack_into("<q", header, 8, rows)  # after the kind and the width
        struct.pack_into("<Q", header, len(header) - 8, rows * dimensions)
        return bytes(header)

    one_row, row = faiss.IndexFlatIP(dimensions), np.ones((1, dimensions), "<f4")
    one_row.add(row)
    if faiss.serialize_index(one_row).tobytes() != with_rows(1) + row.tobytes():
        raise UserError(
            f"FAISS {faiss.__version__} writes flat indexes in a format that leon_jax does not know"
        )
    return with_rows(count)
