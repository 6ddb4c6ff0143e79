"""Stores documents as msgpack records in ArrayRecord files with random access.

A record is a msgpack map in which all keys are always present:

    leon        1, the version of this layout
    parts       list of ["text", str], ["image", png or nil, codes or nil] or ["hole", modality];
                png is a PNG file, codes is [rows, cols, little-endian int32 bytes]
    provenance  nil or a map: key, source, licence, attribution, language, group; and, if they are
                not empty, family and captions (a list). All others are strings

A file is an ArrayRecord with one document per record (group size 1), so that reading one retrieved
document costs one read. A file is written under a temporary name and renamed once it is complete.
"""

import bisect
import dataclasses
import errno
import functools
import io
import itertools
import os
import pathlib
import resource
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import msgpack
import numpy as np
import PIL.Image
from array_record.python import array_record_data_source, array_record_module
from jaxtyping import UInt8

from leon_jax.config import UserError
from leon_jax.documents import Document, Hole, Image, Part, Provenance, Text

_VERSION = 1
# The header and footer of an ArrayRecord file take 64 KiB, so no valid file is shorter.
_MIN_FILE_SIZE = 64 * 1024
# `RecordSource.read` holds this many records in memory at once.
_READ_BATCH = 4096
# Maximum number of open files of a source. The index of a file with 10,000 documents takes 0.2 MB;
# opening a file takes as long as reading 50 documents.
_MAX_OPEN_FILES = 4096


def to_bytes(document: Document) -> bytes:
    """Encodes a document as a record. It is lossless; pixels are stored as PNG."""
    provenance = document.provenance
    return msgpack.packb(
        {
            "leon": _VERSION,
            "parts": [_pack(part) for part in document.parts],
            "provenance": None if provenance is None else provenance.to_dict(),
        }
    )


def from_bytes(data: bytes, *, pixels: bool = True) -> Document:
    """Decodes the document of a record.

    Args:
      data: the record that `to_bytes` returned.
      pixels: whether to decode the pixels of images that have codes; False is several times faster.

    Raises:
      UserError: the record is damaged, or is not a document.
    """
    try:
        record = msgpack.unpackb(data)
        if not isinstance(record, dict) or "leon" not in record:
            raise UserError("the record cannot be read: it is not a leon_jax document")
        if record["leon"] != _VERSION:
            raise UserError(
                f"the record cannot be read: its version is {record['leon']}, this program reads "
                f"{_VERSION}"
            )
        provenance = record["provenance"]
        return Document(
            tuple(_unpack(part, pixels) for part in record["parts"]),
            None if provenance is None else Provenance(**provenance),
        )
    except UserError:
        raise
    except Exception as error:  # msgpack, PIL and the validation of documents raise different ones
        raise UserError("the record cannot be read: it is damaged") from error


def texts_of(data: bytes) -> list[str]:
    """Returns the texts of a record in order. It decodes no image.

    Raises:
      UserError: the record is damaged, or is not a document.
    """
    try:
        record = msgpack.unpackb(data)
        return [str(part[1]) for part in record["parts"] if part[0] == "text"]
    except Exception as error:  # as in `from_bytes`
        raise UserError("the record cannot be read: it is damaged") from error


def to_png(pixels: UInt8[np.ndarray, "height width 3"]) -> bytes:
    """Encodes an image as a PNG file."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, format="png")
    return buffer.getvalue()


def from_png(png: bytes) -> UInt8[np.ndarray, "height width 3"]:
    """Decodes a PNG file.

    Raises:
      OSError: the bytes are not an image, or are truncated.
    """
    return np.asarray(PIL.Image.open(io.BytesIO(png)).convert("RGB"))


def write(path: str | os.PathLike, documents: Iterable[Document]) -> int:
    """Writes documents, in order, to an ArrayRecord file. An existing file is replaced.

    Returns:
      The number of documents.

    Raises:
      UserError: the folder does not exist or is not writable, or the disk is full.
    """
    return _write(path, map(to_bytes, documents))


def copy(source: str | os.PathLike, path: str | os.PathLike, rows: Iterable[int]) -> int:
    """Copies the records with the given row numbers to another file, as `write` writes it.

    Returns:
      The number of records.
    """
    reader = array_record_data_source.ArrayRecordDataSource([os.fspath(source)])
    return _write(path, (reader[int(row)] for row in rows))


def _write(path: str | os.PathLike, data: Iterable[bytes]) -> int:
    path = pathlib.Path(path)
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    os.close(handle)
    try:
        writer = array_record_module.ArrayRecordWriter(temporary, "group_size:1")
        count = 0
        try:
            for record in data:
                _call_writer(path, writer.write, record)
                count += 1
        finally:
            _call_writer(path, writer.close)
        os.chmod(temporary, 0o644)  # only the owner can read the files of mkstemp
        os.replace(temporary, path)
    except BaseException:
        pathlib.Path(temporary).unlink(missing_ok=True)
        raise
    return count


def _call_writer(path: pathlib.Path, method: Callable[..., None], *arguments: bytes) -> None:
    """Calls a method of a writer and converts its errors to `UserError`."""
    try:
        method(*arguments)
    except RuntimeError as error:  # the writer names the error of the file system in the message
        reasons = [os.strerror(code) for code in errno.errorcode if os.strerror(code) in str(error)]
        reason = max(reasons, key=len, default="the file system refuses it")
        raise UserError(f"cannot write {path}: {reason}") from error


class RecordSource:
    """The documents of one or more files, with random access; a Grain data source.

    Args:
      paths: one file made by `write`, or several, whose documents are numbered consecutively.
      pixels: whether to decode the pixels of images that have codes.
      lengths: number of documents of each file. A file is then opened when it is first read. None
        opens all files now to count their documents.

    A source can be pickled; another process opens the files again. Only the most recently used
    files stay open.

    Raises:
      UserError: a file is missing, incomplete, not a file of documents, or its number of documents
        differs from `lengths`.
    """

    def __init__(
        self,
        paths: str | os.PathLike | Sequence[str | os.PathLike],
        *,
        pixels: bool = True,
        lengths: Sequence[int] | None = None,
    ):
        path_list = [paths] if isinstance(paths, str | os.PathLike) else paths
        self.paths = tuple(os.fspath(path) for path in path_list)
        self.pixels = pixels
        self.lengths = None if lengths is None else tuple(lengths)
        self._open()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Document:
        file, row = self._locate(index)
        return self._decode(self._record(file, row), file, row)

    def texts(self, index: int) -> list[str]:
        """Returns the texts of a document in order. It decodes no image.

        Raises:
          IndexError: the index is out of range.
          UserError: the record is damaged.
        """
        file, row = self._locate(index)
        try:
            return texts_of(self._record(file, row))
        except UserError as error:
            raise UserError(f"record {row} of {self.paths[file]} is damaged ({error})") from error

    def _locate(self, index: int) -> tuple[int, int]:
        """Returns the file of a record and its row in the file."""
        index = int(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)} in {self!r}")
        index %= len(self)
        file = bisect.bisect_right(self._ends, index)
        return file, index - (self._ends[file - 1] if file else 0)

    def _record(self, file: int, row: int) -> bytes:
        reader = self._reader(file)
        try:
            return reader[row]
        except (RuntimeError, ValueError) as error:
            raise UserError(f"record {row} of {self.paths[file]} is damaged") from error

    def _decode(self, record: bytes, file: int, row: int) -> Document:
        try:
            return from_bytes(record, pixels=self.pixels)
        except UserError as error:
            raise UserError(f"record {row} of {self.paths[file]} is damaged ({error})") from error
        except (RuntimeError, ValueError) as error:
            raise UserError(f"record {row} of {self.paths[file]} is damaged") from error

    def read(self, indices: Iterable[int]) -> Iterator[Document]:
        """Yields documents in the order of `indices`; it reads many records of a file at a time.

        Raises:
          IndexError: an index is out of range.
          UserError: a record is damaged.
        """
        for batch in itertools.batched(indices, _READ_BATCH):
            if not 0 <= min(batch) <= max(batch) < len(self):
                raise IndexError(f"records {min(batch)} to {max(batch)} of {len(self)} in {self!r}")
            by_file: dict[int, list[int]] = {}
            for index in sorted(set(batch)):
                by_file.setdefault(bisect.bisect_right(self._ends, index), []).append(index)
            documents: dict[int, Document] = {}
            for file, file_indices in by_file.items():
                start = self._ends[file - 1] if file else 0
                rows = [index - start for index in file_indices]
                try:
                    records = self._reader(file).__getitems__(rows)
                except (RuntimeError, ValueError):  # read them one by one to name the damaged one
                    records = [self._record(file, row) for row in rows]
                for index, row, record in zip(file_indices, rows, records, strict=True):
                    documents[index] = self._decode(record, file, row)
            yield from (documents[index] for index in batch)

    def __iter__(self) -> Iterator[Document]:
        return (self[index] for index in range(len(self)))

    def __repr__(self) -> str:
        # Grain identifies a source by its repr, so equal sources must have equal ones.
        paths = self.paths[0] if len(self.paths) == 1 else list(self.paths)
        return f"RecordSource({paths!r}, pixels={self.pixels})"

    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self.paths, "pixels": self.pixels, "lengths": self.lengths}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def _open(self) -> None:
        for path in self.paths:
            if not os.path.isfile(path):
                raise UserError(f"there is no file {path}; run: leon prepare")
            if os.path.getsize(path) < _MIN_FILE_SIZE:
                raise UserError(f"{path} is too short to be an ArrayRecord file")
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        max_open_files = min(_MAX_OPEN_FILES, max(limit // 4, 1))
        self._reader = functools.lru_cache(max_open_files)(self._open_file)
        lengths = self.lengths
        if lengths is None:
            lengths = tuple(len(_reader(path)) for path in self.paths)
        self._ends = list(itertools.accumulate(lengths))

    def _open_file(self, number: int) -> array_record_data_source.ArrayRecordDataSource:
        path, reader = self.paths[number], _reader(self.paths[number])
        if self.lengths is not None and len(reader) != self.lengths[number]:
            raise UserError(
                f"{path} holds {len(reader)} documents, but the manifest of its folder records "
                f"{self.lengths[number]}; run: leon prepare"
            )
        return reader


class JoinedSource(RecordSource):
    """Encoded documents with the pixels of the same documents in other files.

    Args:
      encoded: documents with codes.
      stored: documents with pixels.
      rows: int[n], for each encoded document its row in `stored`.
    """

    def __init__(self, encoded: RecordSource, stored: RecordSource, rows: np.ndarray):
        self.stored, self.rows = stored, np.asarray(rows, np.int64)
        super().__init__(encoded.paths, pixels=True, lengths=encoded.lengths)

    def __getitem__(self, index: int) -> Document:
        encoded = super().__getitem__(index)
        return _joined(encoded, self.stored[int(self.rows[index])])

    def read(self, indices: Iterable[int]) -> Iterator[Document]:
        """Yields documents in the order of `indices`; see `RecordSource.read`."""
        indices = list(indices)
        stored = self.stored.read(int(self.rows[index]) for index in indices)
        return map(_joined, super().read(indices), stored)

    def __repr__(self) -> str:
        return f"JoinedSource({super().__repr__()}, {self.stored!r})"

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"stored": self.stored, "rows": self.rows}


def _joined(encoded: Document, stored: Document) -> Document:
    """Returns the encoded document with the pixels of the stored one."""
    parts = tuple(
        Image(pixels.pixels, part.codes)
        if isinstance(part, Image) and isinstance(pixels, Image)
        else part
        for part, pixels in zip(encoded.parts, stored.parts, strict=True)
    )
    return dataclasses.replace(encoded, parts=parts)


def _reader(path: str) -> array_record_data_source.ArrayRecordDataSource:
    try:
        reader = array_record_data_source.ArrayRecordDataSource([path])
        if len(reader):
            from_bytes(reader[0], pixels=False)
    except UserError as error:
        raise UserError(
            f"{path} is not a complete ArrayRecord file of documents ({error})"
        ) from error
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{path} is not a complete ArrayRecord file of documents") from error
    return reader


def _pack(part: Part) -> list[Any]:
    match part:
        case Text(text):
            return ["text", text]
        case Hole(modality) if not part.first_rows:
            return ["hole", modality]
        case Image(pixels=pixels, codes=codes):
            return [
                "image",
                None if pixels is None else to_png(pixels),
                None if codes is None else [*codes.shape, codes.astype("<i4").tobytes()],
            ]
    raise TypeError(f"cannot store a {type(part).__name__}")


def _unpack(part: list[Any], decode: bool) -> Part:
    match part:
        case ["text", str(text)]:
            return Text(text)
        case ["hole", str(modality)]:
            return Hole(modality)  # type: ignore[arg-type]
        case ["image", png, packed]:
            codes = pixels = None
            if packed is not None:
                rows, cols, data = packed
                codes = np.frombuffer(data, "<i4").reshape(rows, cols).astype(np.int32)
            if png is not None and (decode or codes is None):
                pixels = from_png(png)
            return Image(pixels=pixels, codes=codes)
    raise ValueError(f"unknown part {str(part)[:60]}")
