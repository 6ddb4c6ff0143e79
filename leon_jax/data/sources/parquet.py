"""Reads Parquet tables with images, or paths of image files, in a column.

img2dataset writes such tables. The columns are `jpg` (bytes), `caption`, `key`, `url`, `status`,
`license` and others. A table is read row by row, so that only one row and one page per column are
in memory.
"""

import os
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from leon_jax import storage
from leon_jax.data.sources import field_names
from leon_jax.data.sources.field_values import (
    METADATA_NAMES,
    RecordError,
    check_image,
    read_metadata,
)
from leon_jax.data.sources.files import find_files, fingerprint, read_inside, real_folder
from leon_jax.data.sources.raw_record import MAX_IMAGE_BYTES, RawRecord, Reject, SourceConfig

IMAGE_NAMES = (*field_names.ENCODED_NAMES, *field_names.IMAGE_NAMES)
TEXT_NAMES = field_names.CAPTION_FIRST
# An encoded image and Arrow's overhead.
_MAX_CELL_BYTES = MAX_IMAGE_BYTES + 2**10
_OTHER_NAMES = (*METADATA_NAMES, "status", "error_message")


class Parquet:
    """A source of Parquet files; each file is a shard.

    `text` and `picture` of the configuration name other columns than `TEXT_NAMES` and
    `IMAGE_NAMES`. A column of strings holds paths of image files relative to the folder of the
    table, below it. A list of texts is read as captions of one image. A row is rejected if its
    `status` is not "success", because img2dataset could not download its image.

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
            path = os.path.join(self._folder, shard)
            with storage.temporary_copy(path) as file:
                for index, row in enumerate(self._rows(str(file))):
                    yield from self._records(f"{shard}:{index + 1}", row, real_folder(path))
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
                text = _column(names, self.config.text, TEXT_NAMES, "text")
                image = _column(names, self.config.picture, IMAGE_NAMES, "image")
                others = (name for name in _OTHER_NAMES if names.count(name) == 1)
                columns = [text, image, *others]
                for batch in file.iter_batches(batch_size=1, columns=columns, use_threads=False):
                    yield batch.select(columns)
        except RecordError:
            raise
        except Exception as error:  # damaged files raise many kinds of exceptions
            raise RecordError("unreadable_shard", f"{type(error).__name__}: {error}") from error

    def _records(self, key: str, row: pa.RecordBatch, folder: str) -> list[RawRecord | Reject]:
        try:
            text, image, *others = range(row.num_columns)
            record = {row.schema.names[index]: _value(row, index) for index in others}
            metadata = read_metadata(record, self.config)
            key = metadata["key"] = metadata["key"] or key
            if record.get("status") not in (None, "success"):
                problem = f"{record['status']}: {record.get('error_message')}"
                raise RecordError("missing_picture", f"its status is {problem}")
            captions = _value(row, text)
            data = self._image(_value(row, image), row.schema.names[image], folder)
            name = row.schema.names[text]
            if captions is None:
                error = RecordError("missing_field", f"{name} is missing")
                captions = field_names.title_or(error, data)
            return field_names.caption_records(metadata, captions, data, name)
        except RecordError as error:
            return [error.reject(key)]

    def _image(self, value: Any, name: str, folder: str) -> bytes:
        """Returns the encoded image of a cell, or of the file that the cell names."""
        if isinstance(value, dict) and value.get("bytes") is None and value.get("path"):
            value = value["path"]  # an image of Hugging Face's `datasets` that is not embedded
        elif name in field_names.ENCODED_NAMES:
            return check_image(value, name)
        if isinstance(value, str):
            return read_inside(folder, value, MAX_IMAGE_BYTES)
        return check_image(value, name)


def _column(names: list[str], configured: str, usual: tuple[str, ...], content: str) -> str:
    """Returns the configured column, or the first usual column that a file has exactly once."""
    single = [name for name in names if names.count(name) == 1]
    try:
        return field_names.choose(single, configured, usual, content, "column")
    except RecordError as error:
        raise RecordError("unreadable_shard", str(error)) from None


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
