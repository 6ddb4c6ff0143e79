"""Lists the images below a folder, with the rows of metadata.jsonl and metadata.csv about them."""

import csv
import dataclasses
import functools
import os
import sys
import unicodedata
from collections.abc import Iterator
from typing import Any

from leon_jax.config import UserError
from leon_jax.data import image_formats
from leon_jax.data.sources import field_names
from leon_jax.data.sources.field_values import RecordError, parse_object
from leon_jax.data.sources.jsonl import numbered_lines

_METADATA = ("metadata.jsonl", "metadata.csv")
# Folders that other programs make; their files are no images.
_FOREIGN = ("__MACOSX",)
_ENDINGS = tuple(f".{ending}" for ending in image_formats.ENDINGS)
_FILE_NAMES = ("file_name", *field_names.IMAGE_NAMES)


@dataclasses.dataclass(frozen=True)
class Row:
    """What a metadata file says about an image.

    Attributes:
      file: path of the metadata file, relative to the folder; "" if no file names the image.
      line: the line of a metadata.jsonl.
      columns, values: the names and values of a row of a metadata.csv.
    """

    file: str = ""
    line: bytes = b"{}"
    columns: tuple[str, ...] = ()
    values: tuple[str, ...] = ()

    def fields(self) -> dict[str, Any]:
        """Returns the fields; an empty cell of a metadata.csv is None.

        Raises:
          RecordError: the line is not a JSON object.
        """
        if self.columns:
            pairs = zip(self.columns, self.values, strict=False)
            return {name: value or None for name, value in pairs}
        return parse_object(self.line)


@dataclasses.dataclass(frozen=True)
class ImageTree:
    """The images below a folder.

    Attributes:
      names: sorted paths of the images, and of those that only metadata names, relative to the
        folder. Links to folders are among them.
      links: the links to folders.
      metadata_files: paths of the metadata files.
      described: the rows of each image that a metadata file names, by its path in Unicode NFC.
      nameless: names such as "metadata.jsonl:17" of rows that name no image; `described` has them.
    """

    names: list[str]
    links: frozenset[str]
    metadata_files: list[str]
    described: dict[str, list[Row]]
    nameless: frozenset[str]

    def rows(self, name: str) -> list[Row]:
        """Returns the rows about an image, one empty row if there are none."""
        return self.described.get(_nfc(name), [Row()])


def list_images(folder: str) -> ImageTree:
    """Lists the images below a folder, and reads its metadata files.

    Raises:
      UserError: a folder or a metadata file cannot be read.
    """
    images, links, metadata_files = [], [], []
    for parent, folders, files in os.walk(folder, onerror=_raise):
        inside = os.path.relpath(parent, folder)
        prefix = "" if inside == "." else inside + "/"
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and name not in _FOREIGN
        )
        links += [prefix + name for name in folders if os.path.islink(os.path.join(parent, name))]
        for name in files:
            if name in _METADATA:
                metadata_files.append(prefix + name)
            elif name.lower().endswith(_ENDINGS) and not name.startswith("."):
                images.append(prefix + name)
    described: dict[str, list[Row]] = {}
    nameless = set()
    for file in sorted(metadata_files):
        for name, row, number in _read(folder, file):
            if not name:
                name = f"{file}:{number}"
                nameless.add(name)
            described.setdefault(_nfc(name), []).append(row)
    present = set(map(_nfc, images))
    absent = [name for name in described if name not in present]
    names = sorted([*images, *links, *absent])
    return ImageTree(
        names, frozenset(links), sorted(metadata_files), described, frozenset(nameless)
    )


def _raise(error: OSError) -> None:
    raise UserError(f"cannot read the folder {error.filename}: {error.strerror}") from error


def _read(folder: str, file: str) -> Iterator[tuple[str, Row, int]]:
    """Yields the path of an image relative to the folder, or "", its row and the row's line."""
    prefix = file[: file.rfind("/") + 1]
    path = os.path.join(folder, file)
    try:
        for number, name, row in (_read_jsonl if file.endswith(".jsonl") else _read_csv)(
            path, file
        ):
            yield prefix + name.removeprefix("./") if name else "", row, number
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (csv.Error, UnicodeError) as error:
        raise UserError(f"{path} is not a CSV file in UTF-8: {error}") from error


def _read_jsonl(path: str, file: str) -> Iterator[tuple[int, str, Row]]:
    with open(path, "rb") as lines:
        for number, line in numbered_lines(lines, 1, sys.maxsize - 1):
            row = Row(file, b"" if line is None else line.strip())
            try:
                fields = row.fields()
            except RecordError:
                fields = {}  # the row has no name, and is rejected when it is read
            name = next((fields[n] for n in _FILE_NAMES if fields.get(n) is not None), "")
            yield number, name if isinstance(name, str) else "", row


def _read_csv(path: str, file: str) -> Iterator[tuple[int, str, Row]]:
    with open(path, encoding="utf-8-sig", newline="") as text:
        lines = csv.reader(text, strict=True)
        columns = tuple(next(lines, ()))
        column = next((columns.index(name) for name in _FILE_NAMES if name in columns), None)
        if column is None:
            raise UserError(
                f"{path} has no column file_name; its columns are {', '.join(columns) or 'none'}"
            )
        for values in lines:
            if values:
                name = values[column] if column < len(values) else ""
                yield lines.line_num, name, Row(file, columns=columns, values=tuple(values))


@functools.lru_cache(2**16)
def _nfc(name: str) -> str:
    return unicodedata.normalize("NFC", name)
