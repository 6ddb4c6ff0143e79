"""Reads a folder of images with captions beside them.

The captions of an image are, in this order:

    metadata.jsonl or metadata.csv in its folder or in one above, as Hugging Face's imagefolder has
                        them: `file_name` and `text` or another usual name, and other fields
    cat.txt             beside cat.jpg (or cat.jpg.txt, or cat.caption), one caption in UTF-8
    title, description  of an SVG drawing
    grey-cat_012.jpg    the name of the file, "grey cat", if `caption_from_name` is set
"""

import functools
import hashlib
import os
import re
from collections.abc import Iterator
from typing import Any

from leon_jax import storage
from leon_jax.config import UserError
from leon_jax.data import image_formats, svg_files
from leon_jax.data.sources import field_names, image_metadata
from leon_jax.data.sources.field_values import RecordError, check_text, read_metadata
from leon_jax.data.sources.files import fingerprint, read_inside
from leon_jax.data.sources.raw_record import (
    MAX_IMAGE_BYTES,
    MAX_TEXT_BYTES,
    RawRecord,
    Reject,
    SourceConfig,
)

_CAPTION_ENDINGS = (".txt", ".caption")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_SEPARATORS = re.compile(r"[-_\s]+")
_TRAILING_NUMBER = re.compile(r"(?:^|\s+)(?:\d+|\(\d+\))$")


class ImageFolder:
    """A source of the images below a folder; a shard is a range of their sorted paths.

    Keys are paths relative to the folder. Hidden files and folders are left out. Links to folders
    are not followed, and are rejected, as are links to files outside of the folder.

    Raises:
      UserError: the folder does not exist or cannot be read, holds no image, or a metadata file of
        it cannot be used.
    """

    def __init__(self, config: SourceConfig):
        self.config = config
        if os.path.isfile(self._folder):
            raise UserError(f"{config.path} is a file; folder:PATH takes a folder of images")
        if not os.path.isdir(self._folder):
            raise UserError(f"there is no folder {config.path}")
        if not self._tree.names:
            endings = ", ".join(image_formats.ENDINGS[:4])
            raise UserError(f"the folder {config.path} has no image ({endings}, ...)")

    def shards(self) -> list[str]:
        """Returns the names of all shards, e.g. `images:257` for the images from number 257 on."""
        size = self.config.records_per_shard(len(self._tree.names))
        return [f"images:{start + 1}" for start in range(0, len(self._tree.names), size)]

    def version(self, shard: str) -> str:
        """Returns a fingerprint of the images of a shard, their captions and the metadata files."""
        names = self._names(shard)
        files = [*self._tree.metadata_files]
        for name in names:
            files += [name, *self._caption_files(name)]
        paths = [os.path.join(self._folder, name) for name in files]
        sizes = fingerprint(path for path in paths if os.path.isfile(path))
        listing = "\n".join(files).encode(errors="backslashreplace")
        return hashlib.sha256(sizes.encode() + listing).hexdigest()

    def read(self, shard: str) -> Iterator[RawRecord | Reject]:
        """Yields the records of a shard, in the order of the paths."""
        for name in self._names(shard):
            yield from self._records(name)

    def __getstate__(self) -> dict[str, Any]:
        """Another process lists the folder itself."""
        return {name: value for name, value in vars(self).items() if name == "config"}

    @functools.cached_property
    def _folder(self) -> str:
        """The real path of the folder, or of its copy on this machine's disk."""
        return os.path.realpath(storage.local(self.config.path))

    @functools.cached_property
    def _tree(self) -> image_metadata.ImageTree:
        return image_metadata.list_images(self._folder)

    def _names(self, shard: str) -> list[str]:
        start = int(shard.rpartition(":")[2]) - 1
        size = self.config.records_per_shard(len(self._tree.names))
        return self._tree.names[start : start + size]

    def _records(self, name: str) -> list[RawRecord | Reject]:
        try:
            name.encode()
        except UnicodeEncodeError:
            return [RecordError("not_utf8", "the name of the file").reject(name)]
        if name in self._tree.links:
            detail = "it is a link to a folder, which is not followed; give that folder as a source"
            return [RecordError("unsafe_name", detail).reject(name)]
        rows = self._tree.rows(name)
        try:
            if name in self._tree.nameless:
                names, usual = field_names.filled(rows[0].fields()), ("file_name",)
                raise RecordError("missing_field", field_names.missing(names, "", usual, "image"))
            data = read_inside(self._folder, name, MAX_IMAGE_BYTES)
        except RecordError as error:
            return [error.reject(name)]
        records: list[RawRecord | Reject] = []
        for number, row in enumerate(rows, start=1):
            key = name if len(rows) == 1 else f"{name}#{number}"
            group = name if len(rows) > 1 else ""
            try:
                records += self._captioned(key, name, group, row, data)
            except RecordError as error:
                records.append(error.reject(key))
        return records

    def _captioned(
        self, key: str, name: str, group: str, row: image_metadata.Row, data: bytes
    ) -> list[RawRecord | Reject]:
        """Returns the records of an image and one row of its metadata."""
        fields = row.fields()
        metadata = read_metadata(fields, self.config)
        metadata |= {"key": metadata["key"] or key, "group": metadata["group"] or group}
        names = field_names.filled(fields)
        usual = field_names.TEXT_NAMES
        for field in (self.config.text,) if self.config.text else usual:
            if field in names:
                return field_names.caption_records(metadata, fields[field], data, field)
        caption = self._caption_file(name) or svg_files.caption(data)
        if not caption and self.config.caption_from_name:
            caption = words_of(name)
        if not caption:
            raise RecordError("missing_field", self._missing(name, row, names))
        return field_names.caption_records(metadata, caption, data)

    def _caption_file(self, name: str) -> str:
        """Returns the text of the file beside an image, or ""."""
        for path in self._caption_files(name):
            data = read_inside(self._folder, path, MAX_TEXT_BYTES)
            text = check_text(data.removeprefix(_BYTE_ORDER_MARK), os.path.basename(path)).strip()
            if text:
                return text
        return ""

    def _caption_files(self, name: str) -> list[str]:
        """Returns the files beside an image that hold its caption, if they exist."""
        stem = name.rpartition(".")[0]
        candidates = [base + ending for base in (stem, name) for ending in _CAPTION_ENDINGS]
        return [path for path in candidates if os.path.lexists(os.path.join(self._folder, path))]

    def _missing(self, name: str, row: image_metadata.Row, names: list[str]) -> str:
        """Returns what would give an image a caption."""
        stem = os.path.basename(name).rpartition(".")[0]
        if self.config.caption_from_name:
            return f"it has no caption, and its name {stem!r} has no words"
        if row.file:
            usual = field_names.TEXT_NAMES
            detail = field_names.missing(names, self.config.text, usual, "text")
            return f"it has no {stem}.txt; in {row.file} {detail}"
        return (
            f"it has no caption; put it into {stem}.txt beside the image or into metadata.jsonl "
            '({"file_name": ..., "text": ...}), or take the names of the files '
            "(--caption_from_name)"
        )


def words_of(name: str) -> str:
    """Returns the words in the name of a file, which - and _ separate.

    A number at the end is dropped: "cats/grey-cat_012.jpg" gives "grey cat".
    """
    words = _SEPARATORS.sub(" ", os.path.basename(name).rpartition(".")[0]).strip()
    return _TRAILING_NUMBER.sub("", words)
