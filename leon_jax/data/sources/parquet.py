"""Reads Parquet tables with encoded images in a column, as img2dataset writes them.

The columns are `jpg` (bytes), `caption`, `key`, `url`, `status`, `license` and others. A table is
read row by row, so that only one row and one page per column are in memory.
"""

import os
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from leon_jax.data.sources.field_values import (
    METADATA_NAMES,
    RecordError,
    check_image,
    check_text,
    read_metadata,
)
from leon_jax.data.sources.files import find_files, fingerprint
from leon_jax.data.sources.raw_record import MAX_IMAGE_BYTES, RawRecord, Reject, SourceConfig

IMAGE_NAMES = ("jpg", "jpeg", "png", "webp", "image")
TEXT_NAMES = ("caption", "text")
# An encoded image and Arrow's overhead.
_MAX_CELL_BYTES = MAX_IMAGE_BYTES + 2**10
_OTHER_NAMES = (*METADATA_NAMES, "status", "error_message")


class Parquet:
    """A source of Parquet files; each file is a shard.

    `text` and `picture` of the configuration name other columns than `TEXT_NAMES` and
    `IMAGE_NAMES`. A row is rejected if its `status` is not "success", because img2dataset could
    not download its image.

    Raises:
      UserError: a file does not exist.
    """

    def __init__(self, config: SourceConfig):
        self.config = config
        self._folder, self._files = find_files(config.path, (".parquet",))

    def shards(self) -> list[str]:
        """Returns the names of the files."""
        return list(self._files)

    def version(self, shard: str) -> str:
        """Returns a fingerprint of the file."""
        return fingerprint([os.path.join(self._folder, shard)])

    def read(self, shard: str) -> Iterator[RawRecord | Reject]:
        """Yields the records of a file, in the order of its rows."""
        try:
            for index, row in enumerate(self._rows(os.path.join(self._folder, shard))):
                yield self._record(f"{shard}:{index + 1}", row)
        except RecordError as error:
            yield error.reject(shard)

    def _rows(self, path: str) -> Iterator[pa.RecordBatch]:
        """Yields batches of one row, with the columns text, image and metadata in this order.

        Raises:
          RecordError: the rest of the file cannot be read.
        """
        try:
            # Without a buffer, pyarrow would read whole columns at once.
            with pq.ParquetFile(path, buffer_size=2**20, pre_buffer=False) as file:
                names = file.schema_arrow.names
                text = _column(names, self.config.text, TEXT_NAMES)
                image = _column(names, self.config.picture, IMAGE_NAMES)
                others = (name for name in _OTHER_NAMES if names.count(name) == 1)
                columns = [text, image, *others]
                for batch in file.iter_batches(batch_size=1, columns=columns, use_threads=False):
                    yield batch.select(columns)
        except RecordError:
            raise
        except Exception as error:  # damaged files raise many kinds of exceptions
            raise RecordError("unreadable_shard", f"{type(error).__name__}: {error}") from error

    def _record(self, key: str, row: pa.RecordBatch) -> RawRecord | Reject:
        try:
            text, image, *others = range(row.num_columns)
            record = {row.schema.names[index]: _value(row, index) for index in others}
            metadata = read_metadata(record, self.config)
            key = metadata["key"] or key
            if record.get("status") not in (None, "success"):
                problem = f"{record['status']}: {record.get('error_message')}"
                raise RecordError("missing_picture", f"its status is {problem}")
            return RawRecord(
                **{**metadata, "key": key},
                parts=(
                    check_text(_value(row, text), row.schema.names[text]),
                    check_image(_value(row, image), row.schema.names[image]),
                ),
            )
        except RecordError as error:
            return error.reject(key)


def _column(names: list[str], configured: str, defaults: tuple[str, ...]) -> str:
    """Returns the configured column, or the first default column that a file has exactly once."""
    candidates = (configured,) if configured else defaults
    for name in candidates:
        if names.count(name) == 1:
            return name
    raise RecordError(
        "unreadable_shard",
        f"there is no column {' or '.join(candidates)}; the columns are {', '.join(names)}",
    )


def _value(row: pa.RecordBatch, index: int) -> Any:
    column = row.column(index)
    if column.nbytes > _MAX_CELL_BYTES:  # check before copying
        raise RecordError(
            "record_too_large", f"{row.schema.names[index]} has {column.nbytes} bytes"
        )
    try:
        return column[0].as_py()
    except UnicodeDecodeError as error:
        raise RecordError("not_utf8", f"{row.schema.names[index]}: {error}") from error
    except Exception as error:  # for example a date that Python cannot represent
        raise RecordError("unreadable_record", f"{row.schema.names[index]}: {error}") from error
