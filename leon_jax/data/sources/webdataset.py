"""Reads WebDataset: tar files whose members form samples by name, as img2dataset writes them.

`0001.jpg`, `0001.txt` and `0001.json` are one sample. So are `a.01.jpg` and `a.01.txt`, although
WebDataset cuts a name at its first dot (`tar_samples.py`). A tar file is read sequentially with the
standard library, and nothing is unpacked to disk. The files are untrusted: the memory and time for
each header and each member are limited.
"""

import gzip
import io
import os
import tarfile
from collections.abc import Iterator
from typing import Any

from leon_jax import storage
from leon_jax.data.sources import field_names
from leon_jax.data.sources.field_values import RecordError, parse_object, read_metadata
from leon_jax.data.sources.files import find_files, fingerprint
from leon_jax.data.sources.raw_record import (
    MAX_IMAGE_BYTES,
    MAX_TEXT_BYTES,
    RawRecord,
    Reject,
    SourceConfig,
)
from leon_jax.data.sources.tar_samples import Group, Sample

IMAGE_NAMES = (
    "jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "avif", "heic", "heif", "jxl",
    "svg",
)  # fmt: skip
_ARCHIVES = (".tar", ".tar.gz", ".tgz")
_GZIP = b"\x1f\x8b"
# Gzip barely compresses encoded images, so a higher ratio is a decompression bomb.
_MAX_COMPRESSION = 100
# Names have at most 4,096 bytes. The time of Python's parser for extended headers is quadratic in
# their length.
_MAX_HEADER_BYTES = 2**13


class WebDataset:
    """A source of tar files, plain or gzipped; each file is a shard.

    The text of a sample is its `.txt`, or else `caption`, `text` or another usual name
    (`field_names.CAPTION_FIRST`) in its `.json`; a list there is several captions. The metadata
    (`field_values.METADATA_FIELDS`) comes from the `.json`. `text` and `picture` of the
    configuration name other extensions, and `text` may also name a field of the `.json`.

    Raises:
      UserError: a file does not exist.
    """

    def __init__(self, config: SourceConfig):
        self.config = config
        self._folder, self._files = find_files(config.path, _ARCHIVES)
        self._image_extensions = (config.picture.lower(),) if config.picture else IMAGE_NAMES
        self._text_extensions = (config.text.lower() if config.text else "txt", "json")

    def shards(self) -> list[str]:
        """Returns the names of the tar files."""
        return list(self._files)

    def version(self, shard: str) -> str:
        """Returns a fingerprint of the tar file."""
        return fingerprint([os.path.join(self._folder, shard)])

    def read(self, shard: str) -> Iterator[RawRecord | Reject]:
        """Yields the samples of a tar file, in order. A sample that is cut off is left out."""
        name = shard.removesuffix(".gz").removesuffix(".tar").removesuffix(".tgz")
        group = None
        try:
            for member, archive in self._members(shard):
                error = _member_error(member)
                stem, extension = _split(member.name)
                # Hidden files and files without an extension belong to no sample.
                if member.isdir() or (not extension and error is None):
                    continue
                if group is None or stem != group.stem:
                    if group is not None:
                        yield from group.end()
                    group = Group(stem, self._split_dotted, lambda s: self._records(name, s))
                sample, extension, outcomes = group.sample(extension)
                yield from outcomes
                self._add(sample, extension, error, member, archive)
            if group is not None:
                yield from group.end()
        except RecordError as error:
            yield error.reject(shard)

    def _members(self, shard: str) -> Iterator[tuple[tarfile.TarInfo, "_LimitedFile"]]:
        with storage.temporary_copy(os.path.join(self._folder, shard)) as path:
            yield from _members(str(path))

    def _split_dotted(self, extension: str) -> tuple[str, str]:
        """Splits an extension with dots, such as "01.jpg", into a rest of the key and "jpg".

        An extension that is not an image or a text stays whole; so do all, if the configuration
        names one with a dot.
        """
        known = self._image_extensions + self._text_extensions
        rest, _, last = extension.rpartition(".")
        if not rest or last not in known or any("." in name for name in known):
            return "", extension
        return rest, last

    def _add(
        self,
        sample: Sample,
        extension: str,
        error: RecordError | None,
        member: tarfile.TarInfo,
        archive: "_LimitedFile",
    ) -> None:
        """Adds a member to its sample: its contents, or its error."""
        sample.list(extension)
        error = error or self._file_error(sample, extension, member.size)
        if error is not None:
            sample.error = sample.error or error
        elif extension in self._image_extensions + self._text_extensions and sample.error is None:
            sample.files[extension] = archive.contents(member)

    def _file_error(self, sample: Sample, extension: str, size: int) -> RecordError | None:
        """Returns why a file of `size` bytes cannot be added to a sample, or None."""
        if extension in sample.files:
            return RecordError("unreadable_record", f"it has two files ending in .{extension}")
        if extension in self._text_extensions:
            limit = MAX_TEXT_BYTES
        elif extension in self._image_extensions:
            images = [data for name, data in sample.files.items() if name in self._image_extensions]
            limit = MAX_IMAGE_BYTES - sum(map(len, images))
        else:
            return None
        if size > limit:
            return RecordError(
                "record_too_large", f".{extension} has {size} bytes, at most {limit}"
            )
        return None

    def _records(self, archive: str, sample: Sample) -> list[RawRecord | Reject]:
        key = f"{archive}/{sample.name}"
        try:
            if sample.error:
                raise sample.error
            fields = parse_object(sample.files["json"]) if "json" in sample.files else {}
            metadata = read_metadata(fields, self.config)
            key = metadata["key"] = metadata["key"] or key
            images = [sample.files[name] for name in self._image_extensions if name in sample.files]
            if not images:
                extensions = " or .".join(self._image_extensions)
                raise RecordError("missing_field", f"no file ends in .{extensions}{sample.listed}")
            name, captions = self._captions(sample, fields, images[0])
            return field_names.caption_records(metadata, captions, images[0], name)
        except RecordError as error:
            return [error.reject(key)]

    def _captions(self, sample: Sample, fields: dict[str, Any], image: bytes) -> tuple[str, Any]:
        """Returns the name of the field with the caption or captions of a sample, and its value."""
        extension = self._text_extensions[0]
        if extension in sample.files:
            # Editors add the byte order mark and the final newline.
            data = sample.files[extension].removeprefix(b"\xef\xbb\xbf").rstrip(b"\r\n")
            return f".{extension}", data
        names = field_names.filled(fields)
        try:
            name = field_names.choose(names, self.config.text, field_names.CAPTION_FIRST, "text")
        except RecordError as error:
            detail = f"no file ends in .{extension}{sample.listed}; in its .json {error}"
            return "title", field_names.title_or(RecordError(error.reason, detail), image)
        return f"the {name}", fields[name]


class _LimitedFile:
    """A file for `tarfile` that limits the bytes of the next reads and the size of the file.

    Args:
      file: the archive, unpacked.
      length: maximum number of bytes of the unpacked archive.
    """

    def __init__(self, file: io.BufferedIOBase, length: int):
        self._file = file
        self._length = length
        self._remaining = 0
        self.last = b""  # result of the last read

    def allow(self, size: int) -> None:
        """Permits reads of `size` bytes in total until the next call."""
        self._remaining = size

    def contents(self, member: tarfile.TarInfo) -> bytes:
        self.allow(member.size)
        try:
            self.seek(member.offset_data)
            data = self.read(member.size)
        except Exception as error:
            raise _unreadable(error) from error
        if len(data) != member.size:
            raise RecordError("unreadable_shard", f"the file ends within {member.name!r}")
        return data

    def read(self, size: int) -> bytes:
        if not 0 <= size <= self._remaining:
            raise tarfile.ReadError("a header is too long")
        self._remaining -= size
        self.last = self._file.read(size)
        return self.last

    def seek(self, position: int) -> None:
        if not 0 <= position <= self._length:
            raise tarfile.ReadError("the file is truncated, or its compression ratio is too high")
        self._file.seek(position)

    def tell(self) -> int:
        return self._file.tell()


def _members(path: str) -> Iterator[tuple[tarfile.TarInfo, _LimitedFile]]:
    """Yields the members of a tar file in order, each with the archive to read its contents from.

    Raises:
      RecordError: the rest of the file cannot be read.
    """
    try:
        with open(path, "rb") as plain:
            length = os.fstat(plain.fileno()).st_size
            gzipped = plain.read(len(_GZIP)) == _GZIP
            plain.seek(0)
            if not gzipped:
                yield from _walk(_LimitedFile(plain, length))
                return
            with gzip.open(plain) as unpacked:
                yield from _walk(_LimitedFile(unpacked, _MAX_COMPRESSION * length + 2**20))
    except OSError as error:
        raise _unreadable(error) from error


def _walk(archive: _LimitedFile) -> Iterator[tuple[tarfile.TarInfo, _LimitedFile]]:
    archive.allow(_MAX_HEADER_BYTES)
    try:
        tar = tarfile.TarFile(fileobj=archive)  # type: ignore[arg-type]
    except Exception as error:  # damaged headers raise many exceptions, also RecursionError
        raise _unreadable(error) from error
    position = -1
    while True:
        archive.allow(_MAX_HEADER_BYTES)
        try:
            member = tar.next()
        except Exception as error:
            raise _unreadable(error) from error
        if member is None:
            break
        # Forget earlier members, so that memory does not grow with the archive.
        tar.members = []  # type: ignore[attr-defined]
        tar.pax_headers = {}
        if tar.offset <= position:
            raise RecordError("unreadable_shard", "a member ends before it begins")
        position = tar.offset
        yield member, archive
    # `tarfile` stops silently at a damaged header. A complete archive ends with blocks of zeros.
    if not archive.last or archive.last.strip(b"\0"):
        raise RecordError(
            "unreadable_shard", f"the file is damaged or truncated at byte {tar.offset}"
        )


def _split(name: str) -> tuple[str, str]:
    """Splits the name of a member at its first dot into the sample and the extension."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, _, extension = base.partition(".")
    return (folder + slash + stem, extension.lower()) if stem and extension else (name, "")


def _member_error(member: tarfile.TarInfo) -> RecordError | None:
    """Returns why a member cannot be read, whatever its extension, or None."""
    name = member.name
    if name.startswith("/") or ".." in name.split("/") or "\0" in name:
        return RecordError("unsafe_name", f"{name!r} is not a path below a folder")
    if member.islnk() or member.issym():
        return RecordError("unsafe_name", f"{name!r} is a link to {member.linkname!r}")
    if not (member.isdir() or member.isreg()) or member.issparse():
        return RecordError("unreadable_record", f"{name!r} is not a plain file")
    if name != name.encode(errors="replace").decode():
        return RecordError("not_utf8", f"the name {name!r}")
    return None


def _unreadable(error: Exception) -> RecordError:
    return RecordError("unreadable_shard", f"{type(error).__name__}: {error}")
