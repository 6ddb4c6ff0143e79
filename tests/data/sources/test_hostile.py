"""No file makes a source raise, use much memory, write files or connect; bad records are rejected.

The corpus is `tests/data/hostile.py`.
"""

import collections
import gzip
import hashlib
import json
import os
import pathlib
import pickle
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from leon_jax.data.sources.open import open_source
from leon_jax.data.sources.raw_record import REASONS, Reject, SourceConfig
from tests.data import hostile
from tests.data.hostile_images import good
from tests.data.hostile_tar import member

ROOT = pathlib.Path(__file__).resolve().parents[3]
READER = pathlib.Path(__file__).with_name("read_hostile.py")
# Reasons for which a source rejects a record; images and texts are checked later.
SOURCE_REASONS = {
    "unreadable_shard",
    "unreadable_record",
    "unsafe_name",
    "missing_field",
    "missing_picture",
    "not_utf8",
    "record_too_large",
}
# Maximum memory for reading in MiB: the largest image, or the pages of a table.
GROWTH = {"jsonl": 100, "webdataset": 100, "parquet": 600}
# A line cannot make the rest of a file unreadable, and only lines name other files.
IMPOSSIBLE = {
    "jsonl": {"unreadable_shard"},
    "webdataset": {"missing_picture"},
    "parquet": {"unsafe_name"},
}

every_kind = pytest.mark.parametrize("kind", sorted(GROWTH))


def corpus(folder: pathlib.Path, kind: str, count: int) -> tuple[str, list[hostile.Expected]]:
    """Writes a corpus; returns its path and the expected outcomes."""
    expected = hostile.write(folder, kind, count, seed=0)
    return str(folder / "corpus" if kind == "jsonl" else folder), expected


def is_unexpected(outcome: tuple[str, str | None], expected: hostile.Expected) -> bool:
    (key, reason), (expected_key, reasons) = outcome, expected
    fits = reason in reasons if reason else bool(reasons - SOURCE_REASONS)
    return not fits or expected_key not in (None, key)


@every_kind
def test_a_hostile_corpus_is_read_with_the_expected_outcomes_and_without_side_effects(
    kind, tmp_path
):
    """Reads 850 records of a kind in a separate process; checks outcomes, memory and events."""
    (tmp_path / "data").mkdir()
    (tmp_path / "work").mkdir()
    path, expected = corpus(tmp_path / "data", kind, 850)
    before = sorted(os.walk(tmp_path))
    process = subprocess.run(
        [sys.executable, "-B", str(READER), kind, path],
        cwd=tmp_path / "work",
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path / "work")},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    result = json.loads(process.stdout)
    outcomes = [tuple(outcome) for outcome in result["outcomes"]]
    assert len(outcomes) == len(expected) >= 850
    wrong = [pair for pair in zip(outcomes, expected, strict=True) if is_unexpected(*pair)]
    assert not wrong, wrong[:5]
    assert result["events"] == []
    assert result["growth"] < GROWTH[kind]
    assert sorted(os.walk(tmp_path)) == before
    # The corpus must cover every reason.
    reasons = collections.Counter(reason for _, reason in outcomes)
    assert min(reasons[None], len(outcomes) - reasons[None]) > 125
    assert set(reasons) - {None} >= SOURCE_REASONS - IMPOSSIBLE[kind]


@every_kind
def test_the_corpus_uses_valid_reasons_and_is_deterministic(kind, tmp_path):
    digests, expectations = [], []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        _, expected = corpus(tmp_path / name, kind, 300)
        files = sorted(file for file in (tmp_path / name).rglob("*") if file.is_file())
        sums = [hashlib.sha256(file.read_bytes()).digest() for file in files]
        digests.append([file.relative_to(tmp_path / name) for file in files] + sums)
        expectations.append(expected)
    assert digests[0] == digests[1]
    assert expectations[0] == expectations[1]
    assert set().union(*(reasons for _, reasons in expectations[0])) <= {*REASONS, "used"}


@every_kind
def test_a_pickled_source_reads_the_same_records_and_rejects_are_valid_unicode(kind, tmp_path):
    path, _ = corpus(tmp_path, kind, 300)
    source = open_source(SourceConfig(kind, path, shard_size=100))
    shards = source.shards()
    again = pickle.loads(pickle.dumps(source))
    assert again.shards() == shards and len(set(shards)) == len(shards)
    for shard in shards:
        outcomes = list(source.read(shard))
        assert list(again.read(shard)) == outcomes
        for outcome in outcomes:
            if isinstance(outcome, Reject):
                outcome.key.encode()
                outcome.detail.encode()
                assert len(outcome.detail) <= 300
            else:
                for text in (*vars(outcome).values(), *outcome.parts):
                    if isinstance(text, str):
                        text.encode()


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.parquet", "a.jsonl"])
def test_reading_a_file_with_changed_bytes_raises_no_exception(name, tmp_path):
    rng = np.random.default_rng(0)
    data = _valid_file(name, rng)
    kind = {"tar": "webdataset", "gz": "webdataset"}.get(name.split(".")[-1], name.split(".")[-1])
    (tmp_path / name).write_bytes(data)
    valid = list(open_source(SourceConfig(kind, str(tmp_path / name))).read(_shard(name)))
    assert len(valid) == 10 and not any(isinstance(outcome, Reject) for outcome in valid)
    rejected = 0
    for _ in range(300):
        changed = bytearray(data[: rng.integers(len(data)) if rng.random() < 0.1 else None])
        for position in rng.integers(len(changed), size=rng.integers(1, 9)) if changed else ():
            changed[position] = rng.integers(256)
        (tmp_path / name).write_bytes(changed)
        source = open_source(SourceConfig(kind, str(tmp_path / name)))
        outcomes = [outcome for shard in source.shards() for outcome in source.read(shard)]
        rejected += any(isinstance(outcome, Reject) for outcome in outcomes)
    assert rejected > 30


def _shard(name: str) -> str:
    return f"{name}:1" if name.endswith(".jsonl") else name


def _valid_file(name: str, rng) -> bytes:
    """A file of ten valid records."""
    images = [good(rng) for _ in range(10)]
    if name.endswith(".jsonl"):
        parts = [{"text": f"number {n}"} for n in range(10)]
        return b"".join(json.dumps({"parts": [part]}).encode() + b"\n" for part in parts)
    if name.endswith(".parquet"):
        sink = pa.BufferOutputStream()
        table = {"caption": [f"number {n}" for n in range(10)], "jpg": images}
        pq.write_table(pa.table(table), sink)
        return sink.getvalue().to_pybytes()
    joined = b"".join(
        member(f"{n}.txt", b"a cat") + member(f"{n}.jpg", image) for n, image in enumerate(images)
    ) + bytes(1024)
    return gzip.compress(joined) if name.endswith("gz") else joined
