"""Reads JSON lines that name image files: captions, interleaved documents and editing pairs.

Each line is a JSON object in one of three forms:

    {"image": "cat.png", "text": "a grey cat"}
    {"parts": [{"text": "first"}, {"image": "a.png"}, {"text": "then"}, {"image": "b.png"}]}
    {"source": "a.png", "instruction": "make it night", "target": "b.png"}

The first form may use the other names of `field_names.py`, and a list of captions. Images are named
by their paths relative to the folder of the JSONL file, and lie below it.
"""

import dataclasses
import functools
import os
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from leon_jax import storage
from leon_jax.config import UserError
from leon_jax.data.sources import field_names
from leon_jax.data.sources.field_values import RecordError, check_text, parse_object, read_metadata
from leon_jax.data.sources.files import find_files, fingerprint, read_inside, real_folder
from leon_jax.data.sources.raw_record import (
    MAX_IMAGE_BYTES,
    MAX_TEXT_BYTES,
    RawRecord,
    Reject,
    SourceConfig,
)

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BLOCK = 2**20


@dataclasses.dataclass(frozen=True)
class _LineRange:
    """The lines of a shard: the byte offset and number (from 1) of the first, and their count."""

    file: str
    offset: int
    line: int
    count: int


class Jsonl:
    """A source of JSONL files; a shard is a range of at most `shard_size` lines of a file.

    A small file has several shards too (`SourceConfig.records_per_shard`), so that a run that was
    stopped continues within the file.

    All images of a record together have at most `MAX_IMAGE_BYTES`, and a line has at most
    `MAX_TEXT_BYTES`. A longer line is skipped without being read into memory.

    Raises:
      UserError: a file does not exist or cannot be read.
    """

    def __init__(self, config: SourceConfig):
        self.config = config
        self._folder, self._files = find_files(config.path, (".jsonl",))

    def shards(self) -> list[str]:
        """Returns the names of all shards, e.g. `cats.jsonl:257` for the lines from 257 on."""
        return list(self._ranges)

    def version(self, shard: str) -> str:
        """Returns a fingerprint of the JSONL file; it does not depend on the image files."""
        return fingerprint([os.path.join(self._folder, self._ranges[shard].file)])

    def read(self, shard: str) -> Iterator[RawRecord | Reject]:
        """Yields the records of a shard, in the order of its lines."""
        lines = self._ranges[shard]
        path = os.path.join(self._folder, lines.file)
        try:
            with storage.local(path).open("rb") as file:
                file.seek(lines.offset)
                for number, line in numbered_lines(file, lines.line, lines.count):
                    yield from self._records(f"{lines.file}:{number}", line, real_folder(path))
        except OSError as error:
            yield RecordError("unreadable_shard", f"{path}: {error.strerror}").reject(shard)

    @functools.cached_property
    def _ranges(self) -> dict[str, _LineRange]:
        """All shards by name; this reads all files once."""
        ranges = {}
        step = self.config.records_per_shard(0)  # every shard has a multiple of it
        for name in self._files:
            try:
                with storage.local(os.path.join(self._folder, name)).open("rb") as file:
                    offsets = _offsets(file, step)
            except OSError as error:
                raise UserError(f"cannot read {name}: {error.strerror}") from error
            count = self.config.records_per_shard(len(offsets) * step)
            for index, offset in enumerate(offsets[:: count // step]):
                line = index * count + 1
                ranges[f"{name}:{line}"] = _LineRange(name, offset, line, count)
        return ranges

    def _records(self, key: str, line: bytes | None, image_folder: str) -> list[RawRecord | Reject]:
        try:
            if line is None:
                raise RecordError("record_too_large", f"the line has over {MAX_TEXT_BYTES} bytes")
            record = parse_object(line)
            editing = "instruction" in record or "target" in record
            # The `source` of an editing pair is its first image, not metadata.
            metadata = read_metadata({**record, "source": None} if editing else record, self.config)
            key = metadata["key"] or key
            images = _ImageReader(image_folder)
            if "parts" in record:
                parts = _interleaved(record["parts"], images)
            elif editing:
                parts = (
                    images.read(record.get("source"), "source"),
                    check_text(record.get("instruction"), "instruction"),
                    images.read(record.get("target"), "target"),
                )
            else:
                return self._captioned({**metadata, "key": key}, record, images)
            return [RawRecord(**{**metadata, "key": key}, parts=parts)]
        except RecordError as error:
            return [error.reject(key)]

    def _captioned(
        self, metadata: dict[str, str], record: dict[str, Any], images: "_ImageReader"
    ) -> list[RawRecord | Reject]:
        """Returns the records of an image and its captions."""
        names = field_names.filled(record)
        image_names = (*field_names.IMAGE_NAMES, *field_names.ENCODED_NAMES)
        try:
            text = field_names.choose(names, self.config.text, field_names.TEXT_NAMES, "text")
            captions, problem = record[text], None
        except RecordError as error:
            text, captions, problem = "caption", None, error
        image = field_names.choose(names, self.config.picture, image_names, "image")
        data = images.read(record[image], image)
        if problem is not None:
            captions = field_names.title_or(problem, data)
        return field_names.caption_records(metadata, captions, data, text)


class _ImageReader:
    """Reads the images of one record, whose total size is limited to `MAX_IMAGE_BYTES`."""

    def __init__(self, folder: str):
        self._folder = folder
        self._remaining = MAX_IMAGE_BYTES

    def read(self, value: Any, field: str) -> bytes:
        data = read_inside(self._folder, check_text(value, field), self._remaining)
        self._remaining -= len(data)
        return data


def _interleaved(values: Any, images: _ImageReader) -> tuple[str | bytes, ...]:
    if not isinstance(values, list):
        raise RecordError("unreadable_record", f"parts is a {type(values).__name__}, not a list")
    if not values:
        raise RecordError("missing_field", "parts is empty")
    parts: list[str | bytes] = []
    for index, value in enumerate(values):
        match value:
            case {"text": text, **rest} if "image" not in rest:
                parts.append(check_text(text, f"parts[{index}].text"))
            case {"image": name, **rest} if "text" not in rest:
                parts.append(images.read(name, f"parts[{index}].image"))
            case _:
                raise RecordError(
                    "unreadable_record", f"parts[{index}] must have either text or image"
                )
    return tuple(parts)


def numbered_lines(file: BinaryIO, first: int, count: int) -> Iterator[tuple[int, bytes | None]]:
    """Yields the next non-blank lines with their numbers; None replaces a line that is too long."""
    for number in range(first, first + count):
        line = file.readline(MAX_TEXT_BYTES + 1)
        if not line:
            return
        if len(line) > MAX_TEXT_BYTES and not line.endswith(b"\n"):
            while (rest := file.readline(_BLOCK)) and not rest.endswith(b"\n"):
                pass
            yield number, None
            continue
        if number == 1:
            line = line.removeprefix(_BYTE_ORDER_MARK)
        if line.strip():
            yield number, line


def _offsets(file: BinaryIO, size: int) -> list[int]:
    """Returns the byte offsets of the lines 1, 1 + size, 1 + 2 * size, ..."""
    offsets = []
    lines, position = 0, 0  # number of lines that have begun, and of bytes read
    while block := file.read(_BLOCK):
        starts = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + 1 + position
        if position == 0:
            starts = np.insert(starts, 0, 0)
        offsets += starts[-lines % size :: size].tolist()
        lines += len(starts)
        position += len(block)
    # After a final newline no line begins.
    return [offset for offset in offsets if offset < position]
