"""Parquet tables with the pictures in a column, as img2dataset writes them.

The columns are `jpg` (bytes), `caption`, `key`, `url`, `status`, `license` and others. A table is
read row by row, so that what is in memory is a page of each column and one row.
"""

import os
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from leon_jax.data.sources.field_values import CLAIM_NAMES, Fault, check_picture, check_text, claims
from leon_jax.data.sources.files import find, version
from leon_jax.data.sources.raw_record import LARGEST_PICTURE, Raw, Reject, SourceConfig

PICTURES = ("jpg", "jpeg", "png", "webp", "image")
TEXTS = ("caption", "text")
# A picture, and what Arrow keeps beside it.
_LARGEST_CELL = LARGEST_PICTURE + 2**10
_OTHERS = (*CLAIM_NAMES, "status", "error_message")


class Parquet:
    """A source of Parquet files; each is a shard.

    With `text` and `picture` the configuration names other columns than `TEXTS` and `PICTURES`. A
    row whose `status` is not "success" is one whose picture could not be had.

    Raises:
      UserError: there is no such file.
    """

    def __init__(self, config: SourceConfig):
        self.config = config
        self._folder, self._files = find(config.path, (".parquet",))

    def shards(self) -> list[str]:
        """The names of the files."""
        return list(self._files)

    def version(self, shard: str) -> str:
        """Of the file."""
        return version([os.path.join(self._folder, shard)])

    def read(self, shard: str) -> Iterator[Raw | Reject]:
        """The rows of a file, in order."""
        try:
            for index, row in enumerate(self._rows(os.path.join(self._folder, shard))):
                yield self._record(f"{shard}:{index + 1}", row)
        except Fault as fault:
            yield fault.reject(shard)

    def _rows(self, path: str) -> Iterator[pa.RecordBatch]:
        """The rows of a file: batches of one row, text first, then picture, then claims.

        Raises:
          Fault: the rest cannot be read.
        """
        try:
            # Without a buffer, whole columns would be read at once.
            with pq.ParquetFile(path, buffer_size=2**20, pre_buffer=False) as file:
                names = file.schema_arrow.names
                text = _column(names, self.config.text, TEXTS)
                picture = _column(names, self.config.picture, PICTURES)
                wanted = [text, picture, *(name for name in _OTHERS if names.count(name) == 1)]
                for batch in file.iter_batches(batch_size=1, columns=wanted, use_threads=False):
                    yield batch.select(wanted)
        except Fault:
            raise
        except Exception as error:  # a damaged file fails in many ways
            raise Fault("unreadable_shard", f"{type(error).__name__}: {error}") from error

    def _record(self, key: str, row: pa.RecordBatch) -> Raw | Reject:
        try:
            text, picture, *others = range(row.num_columns)
            record = {row.schema.names[index]: _value(row, index) for index in others}
            said = claims(record, self.config)
            key = said["key"] or key
            if record.get("status") not in (None, "success"):
                problem = f"{record['status']}: {record.get('error_message')}"
                raise Fault("missing_picture", f"its status is {problem}")
            return Raw(
                **{**said, "key": key},
                parts=(
                    check_text(_value(row, text), row.schema.names[text]),
                    check_picture(_value(row, picture), row.schema.names[picture]),
                ),
            )
        except Fault as fault:
            return fault.reject(key)


def _column(names: list[str], chosen: str, usual: tuple[str, ...]) -> str:
    """The one column to read among those that a file has."""
    wanted = (chosen,) if chosen else usual
    for name in wanted:
        if names.count(name) == 1:
            return name
    raise Fault(
        "unreadable_shard", f"no column is called {' or '.join(wanted)}; it has {', '.join(names)}"
    )


def _value(row: pa.RecordBatch, index: int) -> Any:
    column = row.column(index)
    if column.nbytes > _LARGEST_CELL:  # before it is copied
        raise Fault("record_too_large", f"{row.schema.names[index]} has {column.nbytes} bytes")
    try:
        return column[0].as_py()
    except UnicodeDecodeError as error:
        raise Fault("not_utf8", f"{row.schema.names[index]}: {error}") from error
    except Exception as error:  # for instance a date that Python cannot hold
        raise Fault("unreadable_record", f"{row.schema.names[index]}: {error}") from error
