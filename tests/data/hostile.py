"""Writes a corpus of malicious and damaged records with their expected outcomes.

The corpus is deterministic for a seed. The reader's configuration gives the licence of records
without one. The expected outcomes assume the default limits of `leon prepare`.
"""

import json
import os
import pathlib
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.data import hostile_tar
from tests.data.hostile_contents import (
    MISSING,
    NO_TEXT,
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
from tests.data.hostile_images import good

MISSING_IMAGE = frozenset({"missing_picture"})


def write(folder: str | os.PathLike, kind: str, count: int, seed: int) -> list[Expected]:
    """Writes a corpus into an empty folder.

    Args:
      folder: an existing empty folder.
      kind: "jsonl", "webdataset" or "parquet".
      count: minimum number of records.
      seed: seed of the content.

    Returns:
      The expected outcomes, in the order of reading: the key, or None if the key is undetermined,
      and the acceptable reasons, with "used" among them if the record may be used.
    """
    writers = {"jsonl": _jsonl, "webdataset": hostile_tar.write, "parquet": _parquet}
    return writers[kind](pathlib.Path(folder), count, np.random.default_rng(seed))


# JSON lines ---------------------------------------------------------------------------------------


def _record(**fields) -> bytes:
    return json.dumps(fields).encode()


def _good_with(**fields) -> Callable[[str], bytes]:
    return lambda text: _record(**{"image": "good.jpg", "text": text, **fields})


def _constant(line: bytes) -> Callable[[str], bytes]:
    return lambda text: line


# Functions that make a line from a unique text, and the acceptable outcomes.
_LINES: list[tuple[Callable[[str], bytes], frozenset[str]]] = [
    (_constant(b"{"), UNREADABLE),
    (_constant(b"null"), UNREADABLE),
    (_constant(b"3"), UNREADABLE),
    (_constant(b'"text"'), UNREADABLE),
    (_constant(b'[{"image": "good.jpg", "text": "a"}]'), UNREADABLE),
    (_constant(b'{"image": "good.jpg", "text": "a"'), UNREADABLE),
    (_constant(b'{"image": "good.jpg", "text": "a"} {}'), UNREADABLE),
    (_constant(b"{'image': 'good.jpg', 'text': 'a'}"), UNREADABLE),
    (_constant(b'{"image": "good.jpg", "text": "a\0b"}'), UNREADABLE),
    (_constant(b"\0" * 100), UNREADABLE),
    (_constant(b"\xff\xfe{\0}\0"), NOT_UTF8),
    (_constant(b'\xef\xbb\xbf{"image": "good.jpg", "text": "a"}'), UNREADABLE),
    (_constant(b'{"text": ' + b"[" * 100_000), UNREADABLE),
    (_constant(b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"), UNREADABLE),
    (_constant(b'{"a":' * 50_000 + b"1" + b"}" * 50_000), UNREADABLE),
    (_constant(b'{"image": "good.jpg", "text": ' + b"9" * 10_000 + b"}"), UNREADABLE),
    (_constant(b'{"image": "good.jpg", "text": 1e999}'), UNREADABLE),
    (_constant(b'{"image": "good.jpg", "text": NaN}'), MISSING),
    (_constant(b'{"image": "good.jpg", "text": "a", "text": "b"}'), UNREADABLE),
    (_constant(b"{}"), MISSING),
    (_good_with(text=None), MISSING),
    (_good_with(text=7), UNREADABLE),
    (_good_with(text=True), UNREADABLE),
    (_good_with(text=[["b"]]), UNREADABLE),
    (_good_with(text=[]), NO_TEXT),
    (_good_with(text={"en": "a"}), UNREADABLE),
    (_good_with(text="\ud800"), NOT_UTF8),
    (_good_with(image="\udfff.jpg"), NOT_UTF8),
    (_good_with(key="\ud83d"), NOT_UTF8),
    (_good_with(image=None), MISSING),
    (_good_with(image=7), UNREADABLE),
    (_good_with(image=["good.jpg"]), UNREADABLE),
    (_good_with(image="../good.jpg"), UNSAFE),
    (_good_with(image="folder/../../good.jpg"), UNSAFE),
    (_good_with(image="/etc/hostname"), UNSAFE),
    (_good_with(image="good.jpg\0.png"), UNSAFE),
    (_good_with(image="link_out.jpg"), UNSAFE),
    (_good_with(image="folder_out/good.jpg"), UNSAFE),
    (_good_with(image=""), MISSING_IMAGE),
    (_good_with(image="."), MISSING_IMAGE),
    (_good_with(image="folder"), MISSING_IMAGE),
    (_good_with(image="pipe.jpg"), MISSING_IMAGE),
    (_good_with(image="loop.jpg"), MISSING_IMAGE),
    (_good_with(image="nothing.jpg"), MISSING_IMAGE),
    (_good_with(image="good.jpg/good.jpg"), MISSING_IMAGE),
    (_good_with(image="x" * 5_000), MISSING_IMAGE),
    (_good_with(image="x/" * 5_000), MISSING_IMAGE),
    (_good_with(image="https://example.org/good.jpg"), MISSING_IMAGE),
    (_good_with(image="..\\good.jpg"), MISSING_IMAGE),
    (_good_with(image="huge.jpg"), RECORD_TOO_LARGE),
    (_good_with(licence=4), UNREADABLE),
    (_good_with(licence=["CC0-1.0"]), UNREADABLE),
    (_good_with(key={"a": 1}), UNREADABLE),
    (_good_with(attribution=b"\xff".decode(errors="surrogateescape")), NOT_UTF8),
    (_good_with(source=1.5), UNREADABLE),
    (_good_with(key=None, licence=None, attribution=None, group=None), VALID),
    (_good_with(image="link_in.jpg"), VALID),
    (_good_with(image="line\nbreak.jpg"), VALID),
    (_good_with(image="\U0001f408 n\u0303 $(rm -rf) ;'\".jpg"), VALID),
    (_good_with(unknown={"deep": [[[1]]]}, number=10**30, real=1e-300), VALID),
    (lambda text: b"  " + _good_with()(text) + b"\r", VALID),
    (lambda text: _record(parts=[]), MISSING),
    (lambda text: _record(parts={"text": text}), UNREADABLE),
    (lambda text: _record(parts=[1, None, "a"]), UNREADABLE),
    (lambda text: _record(parts=[{"text": text, "image": "good.jpg"}]), UNREADABLE),
    (lambda text: _record(parts=[{"video": "good.mp4"}]), UNREADABLE),
    (lambda text: _record(parts=[{"text": text}, {"image": None}]), MISSING),
    (lambda text: _record(parts=[{"text": text}, {"image": "../good.jpg"}]), UNSAFE),
    (lambda text: _record(parts=[{"text": text}] + [{"image": "large.jpg"}] * 4), RECORD_TOO_LARGE),
    (lambda text: _record(parts=[{"text": text}, {"image": "good.jpg"}, {"text": "b"}]), VALID),
    (lambda text: _record(source="good.jpg", instruction=text, target="good.jpg"), VALID),
    (lambda text: _record(source="good.jpg", instruction=text), MISSING),
    (lambda text: _record(source="good.jpg", instruction=text, target="/good.jpg"), UNSAFE),
    (lambda text: _record(instruction=text, target="good.jpg"), MISSING),
]


def _jsonl(folder: pathlib.Path, count: int, rng: np.random.Generator) -> list[Expected]:
    inside = folder / "corpus"
    (inside / "folder").mkdir(parents=True)
    (inside / "images").mkdir()
    for name in ("good.jpg", "line\nbreak.jpg", "\U0001f408 n\u0303 $(rm -rf) ;'\".jpg"):
        (inside / name).write_bytes(good(rng))
    (folder / "good.jpg").write_bytes(good(rng))
    (inside / "link_out.jpg").symlink_to("../good.jpg")
    (inside / "folder_out").symlink_to("..")
    (inside / "link_in.jpg").symlink_to("good.jpg")
    (inside / "loop.jpg").symlink_to("loop.jpg")
    os.mkfifo(inside / "pipe.jpg")
    for name, size in (("huge.jpg", 65), ("large.jpg", 20)):
        with open(inside / name, "wb") as file:
            file.truncate(size * 2**20)
    (inside / "empty.jsonl").write_bytes(b"")
    (inside / "no_line.jsonl").write_bytes(b"\n \r\n\t\n")
    # A byte order mark at the beginning of a file is ignored.
    (inside / "marked.jsonl").write_bytes(b"\xef\xbb\xbf" + _good_with()(caption(rng)))
    expected: list[Expected] = [("marked.jsonl:1", VALID)]
    endless = contents(rng)
    file, number = None, 0
    while len(expected) < count:
        if file is None or number > 4_000:
            if file is not None:
                file.close()
            name, number = f"part-{len(expected):06}.jsonl", 0
            file = (inside / name).open("wb")
        if rng.integers(20) == 0:
            file.write(b"  \n")
            number += 1
        if rng.integers(3) == 0:
            make, outcome = _LINES[len(expected) % len(_LINES)]
            line = make(caption(rng))
        else:
            content = next(endless)
            line, outcome = _line(inside, len(expected), content), content.expected
        file.write(line + b"\n")
        number += 1
        expected.append((f"{name}:{number}", outcome))
    file.write(b"x" * 3 * 2**20)  # the last line has no newline
    file.close()
    return [*expected, (f"{name}:{number + 1}", RECORD_TOO_LARGE)]


def _line(folder: pathlib.Path, index: int, content: Content) -> bytes:
    record: dict[str, str | None] = {"licence": content.licence}
    if content.image is not None:
        record["image"] = f"images/{index:06}"
        (folder / record["image"]).write_bytes(content.image)
    if isinstance(content.text, bytes):
        return _record(**record)[:-1] + b', "text": "' + content.text + b'"}'
    if content.text is not None:
        record["text"] = content.text
    return json.dumps(record, ensure_ascii=bool(index % 2)).encode()


# Parquet ------------------------------------------------------------------------------------------


def _parquet(folder: pathlib.Path, count: int, rng: np.random.Generator) -> list[Expected]:
    expected: list[Expected] = []
    endless = contents(rng)
    for part in range(100):
        if len(expected) >= count:
            break
        rows = [next(endless) for _ in range(min(2_000, count))]
        failed = rng.integers(50, size=len(rows)) == 0
        name = f"{part:05}.parquet"
        keys = [f"{part:05}{row:04}" for row in range(len(rows))]
        columns = {
            "caption": _strings([row.text for row in rows]),
            "url": pa.array(["https://example.org/a.jpg"] * len(rows)),
            "status": pa.array(["failed_to_download" if f else "success" for f in failed]),
            "error_message": pa.array(["<urlopen error>" if f else None for f in failed]),
            "license": pa.array([row.licence for row in rows]),
            "jpg": pa.array(
                [None if f else row.image for f, row in zip(failed, rows, strict=True)]
            ),
        }
        if part % 2:
            columns["key"] = pa.array(keys)
        pq.write_table(pa.table(columns), folder / name, row_group_size=500)
        for row, (content, fail) in enumerate(zip(rows, failed, strict=True)):
            key = keys[row] if part % 2 else f"{name}:{row + 1}"
            expected.append((key, MISSING_IMAGE if fail else content.expected))
    for name, data, outcomes in _parquet_files(rng):
        name = f"odd {name}.parquet"
        if isinstance(data, bytes):
            (folder / name).write_bytes(data)
        else:
            pq.write_table(data, folder / name, compression="zstd")
        if outcomes == UNREADABLE_SHARD:
            expected.append((name, outcomes))
        else:
            expected += [(f"{name}:{row + 1}", outcomes) for row in range(data.num_rows)]
    return expected


def _strings(values: list[str | bytes | None]) -> pa.Array:
    """A column of strings, which may hold bytes that are not UTF-8."""
    data = [value.encode() if isinstance(value, str) else value for value in values]
    return pa.array(data, pa.binary()).view(pa.string())


def _parquet_files(rng) -> list[tuple[str, pa.Table | bytes, frozenset[str]]]:
    """Unusual files in the order of their names, with the acceptable outcomes of their rows."""
    texts = [caption(rng) for _ in range(4)]
    files = [good(rng) for _ in range(4)]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"caption": texts, "jpg": files}), sink)
    whole = sink.getvalue().to_pybytes()

    def table(**columns):
        return pa.table({"caption": texts, "jpg": files, **columns})

    cells = [{"bytes": data, "path": "a.jpg"} for data in files]
    return [
        ("a dates as keys", table(key=pa.array([2**40] * 4, pa.timestamp("s"))), UNREADABLE),
        ("b numbers as captions", table(caption=[1, 2, 3, 4]), UNREADABLE),
        ("c lists as captions", table(caption=[[text] for text in texts]), VALID),
        ("d texts as images", table(jpg=texts), UNREADABLE),
        ("e no captions", table(caption=pa.nulls(4)), MISSING),
        ("f no images", table(jpg=pa.nulls(4, pa.binary())), MISSING),
        ("g numbers as licences", table(license=[1, 2, 3, 4]), UNREADABLE),
        ("h a dictionary", table(caption=pa.array(texts).dictionary_encode()), VALID),
        ("i large", table(jpg=pa.array(files, pa.large_binary())), VALID),
        ("j cells", pa.table({"text": texts, "image": cells}), VALID),
        ("k a bomb", pa.table({"caption": ["m" * 2**27], "jpg": files[:1]}), RECORD_TOO_LARGE),
        ("l no column of images", pa.table({"caption": texts}), UNREADABLE_SHARD),
        ("m no column of captions", pa.table({"jpg": files}), UNREADABLE_SHARD),
        (
            "n two columns of captions",
            pa.Table.from_arrays(
                [pa.array(texts), pa.array(texts), pa.array(files)], ["caption", "caption", "jpg"]
            ),
            UNREADABLE_SHARD,
        ),
        ("o empty", b"", UNREADABLE_SHARD),
        ("p cut", whole[:-100], UNREADABLE_SHARD),
        ("q without a beginning", whole[100:], UNREADABLE_SHARD),
        ("r a footer that lies", whole[:-8] + b"\xff\xff\xff\x7fPAR1", UNREADABLE_SHARD),
        ("s magic", b"PAR1" * 100, UNREADABLE_SHARD),
        ("t noise", rng.bytes(5_000), UNREADABLE_SHARD),
    ]
