"""WebDataset: tar files whose members are grouped into samples by name, as img2dataset writes them.

`0001.jpg`, `0001.txt` and `0001.json` are one sample. A tar file is read from front to back with
the standard library, and nothing is ever unpacked to a disk. Neither library nor file is trusted
with memory or time: every header and every member has a bounded cost.
"""

import dataclasses
import gzip
import io
import os
import tarfile
from collections.abc import Iterator

from leon_jax.data.sources.field_values import Fault, check_text, claims, parse_object
from leon_jax.data.sources.files import find, version
from leon_jax.data.sources.raw_record import (
    LARGEST_PICTURE,
    LARGEST_TEXT,
    Raw,
    Reject,
    SourceConfig,
)

PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")
_ARCHIVES = (".tar", ".tar.gz", ".tgz")
_GZIP = b"\x1f\x8b"
# Pictures do not get much smaller by gzip; what does is a trap.
_LARGEST_RATIO = 100
# Names have 4,096 bytes at most. Python's parser of extended headers takes time that grows with
# the square of their length.
_LONGEST_HEADER = 2**13


class WebDataset:
    """A source of tar files, plain or gzipped; each is a shard.

    The text of a sample is its `.txt`, or else `caption` or `text` of its `.json`; other claims
    (`CLAIMS` in fields.py) are read from its `.json`. With `text` and `picture` the configuration
    names other endings, and `text` may also name a field of the `.json`.

    Raises:
      UserError: there is no such file.
    """

    def __init__(self, config: SourceConfig):
        self.config = config
        self._folder, self._files = find(config.path, _ARCHIVES)
        self._pictures = (config.picture.lower(),) if config.picture else PICTURES
        self._texts = (config.text.lower() if config.text else "txt", "json")

    def shards(self) -> list[str]:
        """The names of the tar files."""
        return list(self._files)

    def version(self, shard: str) -> str:
        """Of the tar file."""
        return version([os.path.join(self._folder, shard)])

    def read(self, shard: str) -> Iterator[Raw | Reject]:
        """The samples of a tar file, in order; one whose end is missing with the file's is none."""
        name = shard.removesuffix(".gz").removesuffix(".tar").removesuffix(".tgz")
        try:
            for sample in self._samples(os.path.join(self._folder, shard)):
                yield self._record(f"{name}/{sample.name}", sample)
        except Fault as fault:
            yield fault.reject(shard)

    def _samples(self, path: str) -> Iterator["_Sample"]:
        sample = None
        for member, archive in _members(path):
            fault = _fault(member)
            name, ending = _split(member.name)
            # Hidden files and files without an ending are no part of any sample.
            if member.isdir() or (not ending and fault is None):
                continue
            if sample is None or name != sample.name:
                if sample is not None:
                    yield sample
                sample = _Sample(name)
            fault = fault or self._refusal(sample, ending, member.size)
            if fault is not None:
                sample.fault = sample.fault or fault
            elif ending in self._pictures + self._texts and sample.fault is None:
                sample.files[ending] = archive.contents(member)
        if sample is not None:
            yield sample

    def _refusal(self, sample: "_Sample", ending: str, size: int) -> Fault | None:
        """Why a file of so many bytes does not become part of a sample."""
        if ending in sample.files:
            return Fault("unreadable_record", f"it has two files ending in .{ending}")
        if ending in self._texts:
            most = LARGEST_TEXT
        elif ending in self._pictures:
            held = [data for end, data in sample.files.items() if end in self._pictures]
            most = LARGEST_PICTURE - sum(map(len, held))
        else:
            return None
        if size > most:
            return Fault("record_too_large", f".{ending} has {size} bytes, at most {most}")
        return None

    def _record(self, key: str, sample: "_Sample") -> Raw | Reject:
        try:
            if sample.fault:
                raise sample.fault
            fields = parse_object(sample.files["json"]) if "json" in sample.files else {}
            said = claims(fields, self.config)
            key = said["key"] or key
            if self._texts[0] in sample.files:
                # A mark at the beginning and a line's end are the editor's, not the text's.
                data = sample.files[self._texts[0]].removeprefix(b"\xef\xbb\xbf").rstrip(b"\r\n")
                text = check_text(data, f".{self._texts[0]}")
            else:
                names = (self.config.text,) if self.config.text else ("caption", "text")
                values = [fields[name] for name in names if fields.get(name) is not None]
                text = check_text(values[0] if values else None, f"the {names[0]}")
            pictures = [sample.files[end] for end in self._pictures if end in sample.files]
            if not pictures:
                raise Fault("missing_field", f"no file ends in .{' or .'.join(self._pictures)}")
            return Raw(**{**said, "key": key}, parts=(text, pictures[0]))
        except Fault as fault:
            return fault.reject(key)


@dataclasses.dataclass
class _Sample:
    """What was read of a sample: its files by ending, and the first thing wrong with it."""

    name: str
    files: dict[str, bytes] = dataclasses.field(default_factory=dict)
    fault: Fault | None = None


class _Metered:
    """A file for `tarfile`, with a limit on what may be read next and on how long it may be."""

    def __init__(self, file: io.BufferedIOBase, length: int):
        self._file = file
        self._length = length
        self._left = 0
        self.last = b""  # what was read last

    def allow(self, size: int) -> None:
        self._left = size

    def contents(self, member: tarfile.TarInfo) -> bytes:
        self.allow(member.size)
        try:
            self.seek(member.offset_data)
            data = self.read(member.size)
        except Exception as error:
            raise _unreadable(error) from error
        if len(data) != member.size:
            raise Fault("unreadable_shard", f"it ends within {member.name!r}")
        return data

    def read(self, size: int) -> bytes:
        if not 0 <= size <= self._left:
            raise tarfile.ReadError("a header is too long")
        self._left -= size
        self.last = self._file.read(size)
        return self.last

    def seek(self, position: int) -> None:
        if not 0 <= position <= self._length:
            raise tarfile.ReadError("it ends early, or unpacks to far more than it should")
        self._file.seek(position)

    def tell(self) -> int:
        return self._file.tell()


def _members(path: str) -> Iterator[tuple[tarfile.TarInfo, _Metered]]:
    """The members of a tar file in order, and where the contents of each can be read.

    Raises:
      Fault: the rest cannot be read.
    """
    try:
        with open(path, "rb") as plain:
            length = os.fstat(plain.fileno()).st_size
            packed = plain.read(len(_GZIP)) == _GZIP
            plain.seek(0)
            if not packed:
                yield from _walk(_Metered(plain, length))
                return
            with gzip.open(plain) as unpacked:
                yield from _walk(_Metered(unpacked, _LARGEST_RATIO * length + 2**20))
    except OSError as error:
        raise _unreadable(error) from error


def _walk(archive: _Metered) -> Iterator[tuple[tarfile.TarInfo, _Metered]]:
    archive.allow(_LONGEST_HEADER)
    try:
        tar = tarfile.TarFile(fileobj=archive)  # type: ignore[arg-type]
    except Exception as error:  # damaged headers fail in many ways, some by recursion
        raise _unreadable(error) from error
    position = -1
    while True:
        archive.allow(_LONGEST_HEADER)
        try:
            member = tar.next()
        except Exception as error:
            raise _unreadable(error) from error
        if member is None:
            break
        # Nothing looks back, so that memory need not grow with the archive.
        tar.members = []  # type: ignore[attr-defined]
        tar.pax_headers = {}
        if tar.offset <= position:
            raise Fault("unreadable_shard", "a member ends before it begins")
        position = tar.offset
        yield member, archive
    # The library ends quietly at a damaged header, but an archive ends with blocks of zeros.
    if not archive.last or archive.last.strip(b"\0"):
        raise Fault("unreadable_shard", f"it is damaged or cut short at byte {tar.offset}")


def _split(name: str) -> tuple[str, str]:
    """The sample that a member belongs to, which goes up to the first dot, and the rest."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, _, ending = base.partition(".")
    return (folder + slash + stem, ending.lower()) if stem and ending else (name, "")


def _fault(member: tarfile.TarInfo) -> Fault | None:
    """Why a member is not read, whatever it is for."""
    name = member.name
    if name.startswith("/") or ".." in name.split("/") or "\0" in name:
        return Fault("unsafe_name", f"{name!r} is not a path below a folder")
    if member.islnk() or member.issym():
        return Fault("unsafe_name", f"{name!r} is a link to {member.linkname!r}")
    if not (member.isdir() or member.isreg()) or member.issparse():
        return Fault("unreadable_record", f"{name!r} is not a plain file")
    if name != name.encode(errors="replace").decode():
        return Fault("not_utf8", f"the name {name!r}")
    return None


def _unreadable(error: Exception) -> Fault:
    return Fault("unreadable_shard", f"{type(error).__name__}: {error}")
