"""The hostile corpus as tar files: unusual members in valid archives, and damaged archives."""

import gzip
import json
import pathlib
import struct
import tarfile
from collections.abc import Callable

import numpy as np

from tests.data.hostile_contents import (
    MISSING,
    NOT_UTF8,
    RECORD_TOO_LARGE,
    UNREADABLE,
    UNREADABLE_SHARD,
    UNSAFE,
    VALID,
    Content,
    Expected,
    caption,
    contents,
)
from tests.data.hostile_images import UNREADABLE as IMAGE_UNREADABLE
from tests.data.hostile_images import good

_END = bytes(1024)
# Members of a sample: name, contents, and fields of the header.
Members = list[tuple[str, bytes, dict]]


def member(name: str, data: bytes, **fields) -> bytes:
    """A member of a tar file, whose header has the given fields."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    header = info.tobuf(tarfile.PAX_FORMAT, errors="surrogateescape")
    return header + data + bytes(-len(data) % 512)


def raw_header(name: str, size: bytes, kind: bytes = b"0") -> bytes:
    """A header with the given twelve bytes as size, and a correct checksum."""
    header = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT))
    header[124:136] = size
    header[156:157] = kind
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def number(value: int) -> bytes:
    """A size in base 256, which may be very large or negative."""
    return struct.pack(">i", -1 if value < 0 else -(2**31)) + struct.pack(">q", value)


# Functions that make the members of a sample from its name, a text and an image, and the acceptable
# outcomes.
_SAMPLES: list[tuple[Callable[[str, bytes, bytes], Members], frozenset[str]]] = [
    (lambda n, t, p: [(f"{n}.jpg", p, {})], MISSING),
    (lambda n, t, p: [(f"{n}.txt", t, {})], MISSING),
    (lambda n, t, p: [(f"{n}.txt", t, {}), (f"{n}.jpg", b"", {})], IMAGE_UNREADABLE),
    (lambda n, t, p: [(f"{n}.jpg", p, {}), (f"{n}.jpg", p, {}), (f"{n}.txt", t, {})], UNREADABLE),
    (lambda n, t, p: [(f"../{n}.jpg", p, {}), (f"../{n}.txt", t, {})], UNSAFE),
    (lambda n, t, p: [(f"/tmp/{n}.jpg", p, {}), (f"/tmp/{n}.txt", t, {})], UNSAFE),
    (lambda n, t, p: [(f"a/../{n}.jpg", p, {}), (f"a/../{n}.txt", t, {})], UNSAFE),
    (lambda n, t, p: [(f"../../{n}", p, {})], UNSAFE),
    (lambda n, t, p: [(f"{n}.jpg", b"", _link(tarfile.SYMTYPE)), (f"{n}.txt", t, {})], UNSAFE),
    (lambda n, t, p: [(f"{n}.txt", t, {}), (f"{n}.jpg", b"", _link(tarfile.LNKTYPE))], UNSAFE),
    (lambda n, t, p: [(f"{n}.jpg", b"", {"type": tarfile.CHRTYPE, "devminor": 5})], UNREADABLE),
    (lambda n, t, p: [(f"{n}.jpg", b"", {"type": tarfile.BLKTYPE})], UNREADABLE),
    (lambda n, t, p: [(f"{n}.jpg", b"", {"type": tarfile.FIFOTYPE})], UNREADABLE),
    (lambda n, t, p: [(f"{n}.jpg", p, {"pax_headers": _SPARSE}), (f"{n}.txt", t, {})], UNREADABLE),
    (lambda n, t, p: [(f"\udcff{n}.jpg", p, {}), (f"\udcff{n}.txt", t, {})], NOT_UTF8),
    (lambda n, t, p: [(f"a\nb{n}.jpg", p, {}), (f"a\nb{n}.txt", t, {})], VALID),
    (lambda n, t, p: [(f"\U0001f408{n}.jpg", p, {}), (f"\U0001f408{n}.txt", t, {})], VALID),
    (lambda n, t, p: [("x/" * 200 + f"{n}.jpg", p, {}), ("x/" * 200 + f"{n}.txt", t, {})], VALID),
    (lambda n, t, p: [(f"{n}.JPG", p, {}), (f"{n}.TXT", t, {}), (f"{n}.exe", p, {})], VALID),
    (
        lambda n, t, p: [(f"{n}.txt", b"\xef\xbb\xbf" + t + b"\r\n", {}), (f"{n}.png", p, {})],
        VALID,
    ),
    (lambda n, t, p: [(f"{n}.jpg", p, {}), (f"{n}.json", _json(caption=t.decode()), {})], VALID),
    (lambda n, t, p: [(f"{n}.jpg", p, {}), (f"{n}.json", _json(caption=None), {})], MISSING),
    (lambda n, t, p: [(f"{n}.jpg", p, {}), (f"{n}.json", _json(caption=[1]), {})], UNREADABLE),
    (lambda n, t, p: [(f"{n}.jpg", p, {}), (f"{n}.json", _json(caption="\ud800"), {})], NOT_UTF8),
    (lambda n, t, p: _with_json(n, t, p, b""), UNREADABLE),
    (lambda n, t, p: _with_json(n, t, p, b"[]"), UNREADABLE),
    (lambda n, t, p: _with_json(n, t, p, b'{"license": ' + b"[" * 100_000), UNREADABLE),
    (lambda n, t, p: _with_json(n, t, p, b'{"width": ' + b"9" * 10_000 + b"}"), UNREADABLE),
    (lambda n, t, p: _with_json(n, t, p, b'{"license": "\xff"}'), NOT_UTF8),
    (lambda n, t, p: _with_json(n, t, p, _json(license=7)), UNREADABLE),
    (lambda n, t, p: _with_json(n, t, p, b'{"similarity": NaN, "url": null}'), VALID),
    (lambda n, t, p: _with_json(n, t, p, _json(padding="x" * 2**20)), RECORD_TOO_LARGE),
]
_SPARSE = {"GNU.sparse.map": "0,1", "GNU.sparse.size": str(2**40), "GNU.sparse.numblocks": "1"}

# Folders, hidden files and files without an extension belong to no sample.
_NEUTRAL = [
    member("some/", b"", type=tarfile.DIRTYPE),
    member(".hidden.jpg", b"a"),
    member("README", b"a"),
]

# Bytes after a part of a sample that make the rest of the archive unreadable.
_BREAKS: list[Callable[[str, np.random.Generator], bytes]] = [
    lambda n, rng: b"",
    lambda n, rng: member(f"{n}.jpg", good(rng))[:300],
    lambda n, rng: member(f"{n}.jpg", good(rng))[:700],
    lambda n, rng: rng.bytes(2_048) + _END,
    lambda n, rng: member(f"{n}.jpg", good(rng)).replace(b"ustar", b"USTAR") + _END,
    lambda n, rng: raw_header(f"{n}.jpg", b"77777777777\0") + _END,
    lambda n, rng: raw_header(f"{n}.jpg", number(2**62)) + _END,
    lambda n, rng: raw_header(f"{n}.jpg", number(10**6)) + _END,
    lambda n, rng: raw_header(f"{n}.jpg", number(-4_096)) + _END,
    lambda n, rng: raw_header(f"{n}.jpg", b"not octal!!\0") + _END,
    lambda n, rng: raw_header("long", number(2**40), tarfile.GNUTYPE_LONGNAME) + _END,
    lambda n, rng: raw_header("header", number(2**33), tarfile.XHDTYPE) + _END,
    lambda n, rng: raw_header("long", b"%011o\0" % 0, tarfile.GNUTYPE_LONGNAME) * 5_000 + _END,
    lambda n, rng: _pax(b"9" * 60_000) + member(f"{n}.jpg", good(rng)) + _END,
    lambda n, rng: _pax(b"22 size=-99999999999\n") + member(f"{n}.jpg", good(rng)) + _END,
    lambda n, rng: _pax(b"26 size=9999999999999999\n") + member(f"{n}.jpg", good(rng)) + _END,
    lambda n, rng: _pax(b"0 path=a\n") + member(f"{n}.jpg", good(rng)) + _END,
]


def write(folder: pathlib.Path, count: int, rng: np.random.Generator) -> list[Expected]:
    """Writes archives of some dozens of samples, of which many are damaged at the end."""
    expected: list[Expected] = []
    endless = contents(rng)
    archive = 0
    while len(expected) < count:
        name = f"{archive:05}"
        data = []
        for _ in range(100):
            sample = f"{len(expected):06}"
            if rng.integers(3):
                content = next(endless)
                members, outcome = _members(sample, content), content.expected
            else:
                make, outcome = _SAMPLES[len(expected) % len(_SAMPLES)]
                members = make(sample, caption(rng).encode(), good(rng))
            data += [member(path, contents, **fields) for path, contents, fields in members]
            data.append(_NEUTRAL[len(expected) % len(_NEUTRAL)])
            first = members[0][0]
            key = None if outcome in (UNSAFE, NOT_UTF8) else f"{name}/{first[: first.rindex('.')]}"
            expected.append((key, outcome))
        packed = archive % 5 == 4
        file = folder / (name + (".tar.gz" if packed else ".tar"))
        if archive % 2:
            end = _BREAKS[archive // 2 % len(_BREAKS)]("last", rng)
            data += [member("last.txt", b"a cat"), end]
            expected.append((file.name, UNREADABLE_SHARD))
        else:
            data.append(_END)
        joined = b"".join(data)
        file.write_bytes(gzip.compress(joined, 1, mtime=0) if packed else joined)
        archive += 1
    for name, data, outcomes in _archives(rng):
        (folder / name).write_bytes(data)
        expected += outcomes
    with (folder / "odd i large.tar").open("wb") as file:
        file.write(member("a.txt", b"a cat") + raw_header("a.jpg", b"%011o\0" % (65 * 2**20)))
        file.seek(65 * 2**20, 1)
        file.write(_END)
    return [*expected, ("odd i large/a", RECORD_TOO_LARGE)]


def _archives(rng: np.random.Generator) -> list[tuple[str, bytes, list[Expected]]]:
    """Unusual archives in the order of their names, with their expected outcomes."""
    packed = gzip.compress(member("a.txt", b"a cat") + member("a.jpg", good(rng)) + _END, mtime=0)
    # A member that is skipped, and unpacks to a thousand times its size.
    bomb = gzip.compress(member("a.zero", bytes(100 * 2**20)) + _END, 9, mtime=0)
    broken = {
        "odd a empty.tar": b"",
        "odd c noise.tar": rng.bytes(5_000),
        "odd d zip.tar": b"PK\3\4" + rng.bytes(5_000),
        "odd e cut.tar.gz": packed[: len(packed) // 2],
        "odd f no gzip.tar.gz": b"\x1f\x8b" + rng.bytes(5_000),
        "odd g bomb.tar.gz": bomb,
    }
    valid: list[tuple[str, bytes, list[Expected]]] = [
        ("odd b nothing but an end.tar", _END, []),
        # Bytes after the end of an archive, such as the checksum, are not read.
        ("odd h wrong sum.tar.gz", packed[:-8] + bytes(8), [("odd h wrong sum/a", VALID)]),
    ]
    return sorted(
        valid + [(name, data, [(name, UNREADABLE_SHARD)]) for name, data in broken.items()]
    )


def _members(name: str, content: Content) -> Members:
    members: Members = [(f"{name}.json", _json(license=content.licence, status="success"), {})]
    if content.image is not None:
        members.append((f"{name}.jpg", content.image, {}))
    if content.text is not None:
        text = content.text.encode() if isinstance(content.text, str) else content.text
        members.append((f"{name}.txt", text, {}))
    return members


def _with_json(name: str, text: bytes, image: bytes, data: bytes) -> Members:
    return [(f"{name}.jpg", image, {}), (f"{name}.json", data, {}), (f"{name}.txt", text, {})]


def _json(**fields) -> bytes:
    return json.dumps(fields).encode()


def _link(kind: bytes) -> dict:
    return {"type": kind, "linkname": "../../etc/hostname"}


def _pax(data: bytes) -> bytes:
    """An extended header with this content."""
    return (
        raw_header("header", b"%011o\0" % len(data), tarfile.XHDTYPE)
        + data
        + bytes(-len(data) % 512)
    )
