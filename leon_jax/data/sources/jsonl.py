"""JSON lines beside picture files: captions, interleaved documents and editing pairs.

One JSON object a line, in one of three shapes:

    {"image": "cat.png", "text": "a grey cat"}
    {"parts": [{"text": "first"}, {"image": "a.png"}, {"text": "then"}, {"image": "b.png"}]}
    {"source": "a.png", "instruction": "make it night", "target": "b.png"}

Pictures are named by their path from the folder of the JSONL file and lie below it.
"""

import dataclasses
import functools
import os
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from leon_jax.config import UserError
from leon_jax.data.sources.field_values import Fault, check_text, claims, parse_object
from leon_jax.data.sources.files import find, read_inside, version
from leon_jax.data.sources.raw_record import (
    LARGEST_PICTURE,
    LARGEST_TEXT,
    Raw,
    Reject,
    SourceConfig,
)

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BLOCK = 2**20


@dataclasses.dataclass(frozen=True)
class _Stretch:
    """Some lines of a file: where they begin in bytes and, counted from 1, in lines."""

    file: str
    offset: int
    line: int


class Jsonl:
    """A source of JSONL files; a shard is `shard_size` lines of one.

    The pictures of a record have `LARGEST_PICTURE` bytes together at most, and a line
    `LARGEST_TEXT`; a longer line is passed over without being held.

    Raises:
      UserError: there is no such file, or it cannot be read.
    """

    def __init__(self, config: SourceConfig):
        self.config = config
        self._folder, self._files = find(config.path, (".jsonl",))

    def shards(self) -> list[str]:
        """The names of all shards, such as `cats.jsonl:10001` for the lines from 10,001 on."""
        return list(self._stretches)

    def version(self, shard: str) -> str:
        """Of the file of lines; a picture that changes under its name is not noticed."""
        return version([os.path.join(self._folder, self._stretches[shard].file)])

    def read(self, shard: str) -> Iterator[Raw | Reject]:
        """The records of a shard, in the order of its lines."""
        stretch = self._stretches[shard]
        path = os.path.join(self._folder, stretch.file)
        pictures = os.path.realpath(os.path.dirname(path) or ".")
        try:
            with open(path, "rb") as file:
                file.seek(stretch.offset)
                for number, line in _lines(file, stretch.line, self.config.shard_size):
                    yield self._record(f"{stretch.file}:{number}", line, pictures)
        except OSError as error:
            yield Fault("unreadable_shard", f"{path}: {error.strerror}").reject(shard)

    @functools.cached_property
    def _stretches(self) -> dict[str, _Stretch]:
        """All shards, found by reading through the files once."""
        found = {}
        for name in self._files:
            try:
                with open(os.path.join(self._folder, name), "rb") as file:
                    offsets = _offsets(file, self.config.shard_size)
            except OSError as error:
                raise UserError(f"cannot read {name}: {error.strerror}") from error
            for index, offset in enumerate(offsets):
                line = index * self.config.shard_size + 1
                found[f"{name}:{line}"] = _Stretch(name, offset, line)
        return found

    def _record(self, key: str, line: bytes | None, pictures: str) -> Raw | Reject:
        try:
            if line is None:
                raise Fault("record_too_large", f"the line has over {LARGEST_TEXT} bytes")
            record = parse_object(line)
            editing = "instruction" in record or "target" in record
            # The `source` of an editing pair is its first picture.
            said = claims({**record, "source": None} if editing else record, self.config)
            key = said["key"] or key
            folder = _Pictures(pictures)
            if "parts" in record:
                parts = _interleaved(record["parts"], folder)
            elif editing:
                parts = (
                    folder.read(record.get("source"), "source"),
                    check_text(record.get("instruction"), "instruction"),
                    folder.read(record.get("target"), "target"),
                )
            else:
                text, picture = self.config.text or "text", self.config.picture or "image"
                parts = (
                    check_text(record.get(text), text),
                    folder.read(record.get(picture), picture),
                )
            return Raw(**{**said, "key": key}, parts=parts)
        except Fault as fault:
            return fault.reject(key)


class _Pictures:
    """Reads the pictures of one record; together they have a bounded size."""

    def __init__(self, folder: str):
        self._folder = folder
        self._left = LARGEST_PICTURE

    def read(self, value: Any, field: str) -> bytes:
        data = read_inside(self._folder, check_text(value, field), self._left)
        self._left -= len(data)
        return data


def _interleaved(values: Any, folder: _Pictures) -> tuple[str | bytes, ...]:
    if not isinstance(values, list):
        raise Fault("unreadable_record", f"parts is a {type(values).__name__}, not a list")
    if not values:
        raise Fault("missing_field", "parts is empty")
    parts: list[str | bytes] = []
    for index, value in enumerate(values):
        match value:
            case {"text": text, **rest} if "image" not in rest:
                parts.append(check_text(text, f"parts[{index}].text"))
            case {"image": name, **rest} if "text" not in rest:
                parts.append(folder.read(name, f"parts[{index}].image"))
            case _:
                raise Fault("unreadable_record", f"parts[{index}] has not one of text and image")
    return tuple(parts)


def _lines(file: BinaryIO, first: int, count: int) -> Iterator[tuple[int, bytes | None]]:
    """The next lines that are not blank, with their numbers; None for one that is too long."""
    for number in range(first, first + count):
        line = file.readline(LARGEST_TEXT + 1)
        if not line:
            return
        if len(line) > LARGEST_TEXT and not line.endswith(b"\n"):
            while (rest := file.readline(_BLOCK)) and not rest.endswith(b"\n"):
                pass
            yield number, None
            continue
        if number == 1:
            line = line.removeprefix(_BYTE_ORDER_MARK)
        if line.strip():
            yield number, line


def _offsets(file: BinaryIO, size: int) -> list[int]:
    """Where every `size`-th line begins, the first included; none for an empty file."""
    offsets = []
    begun, position = 0, 0  # lines that have begun, and bytes read
    while block := file.read(_BLOCK):
        starts = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + 1 + position
        if position == 0:
            starts = np.insert(starts, 0, 0)
        offsets += starts[-begun % size :: size].tolist()
        begun += len(starts)
        position += len(block)
    # A line that would begin at the end of the file is none.
    return [offset for offset in offsets if offset < position]
