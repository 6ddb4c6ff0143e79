"""Prepares 2,550 hostile records: none stops `leon prepare`, and each is used or rejected.

tests/data/sources/test_hostile.py tests the sources alone, with their memory and system calls.
"""

import collections
import json
import os
import pathlib
import subprocess
import sys

import pytest

from leon_jax.prepare.gather import read_lines
from tests.data import hostile
from tests.prepare.folders import files_beside

ROOT = pathlib.Path(__file__).resolve().parents[2]
COUNT = 850
KINDS = ("jsonl", "webdataset", "parquet")


@pytest.mark.slow
def test_every_hostile_record_is_used_or_in_the_rejects_with_its_reason(tmp_path):
    expected, arguments = [], []
    for kind in KINDS:
        folder = tmp_path / "data" / kind
        folder.mkdir(parents=True)
        expected.append(hostile.write(folder, kind, COUNT, seed=1))
        arguments.append(f"{kind}={folder / 'corpus' if kind == 'jsonl' else folder}")
    before = sorted(os.walk(tmp_path / "data"))
    out = tmp_path / "out" / "prepared"
    process = subprocess.run(
        [sys.executable, "-m", "tests.prepare.prepare_hostile", str(out), *arguments],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    result = json.loads(process.stdout)
    manifest = result["manifest"]

    # Only the folder was written, and the corpus did not change.
    assert sorted(os.walk(tmp_path / "data")) == before
    assert not files_beside(out)
    # Two threads may each decode an image of 64 million pixels, 200 MiB, in several copies.
    assert result["after"] - result["before"] < 2500, result

    used, rejected = collections.defaultdict(list), collections.defaultdict(list)
    for shard, source in manifest["inputs"].items():
        for document in read_lines(out / f"{shard}.documents.jsonl"):
            used[source["source"]].append(document["key"])
        for reject in read_lines(out / f"{shard}.rejects.jsonl"):
            rejected[source["source"]].append((reject["key"], reject["reason"]))
            assert len(reject["detail"]) <= 300
    for number, outcomes in enumerate(expected):
        assert len(used[number]) + len(rejected[number]) == len(outcomes) >= COUNT
        allowed = {key: reasons | {"key_repeated"} for key, reasons in outcomes if key is not None}
        nameless = collections.Counter(
            frozenset(reasons) for key, reasons in outcomes if key is None
        )
        any_reason = frozenset().union(*nameless) if nameless else frozenset()
        for key, reason in rejected[number]:
            assert reason in allowed.get(key, any_reason), (KINDS[number], key, reason)
        for key in used[number]:
            assert "used" in allowed.get(key, any_reason), (KINDS[number], key)
        min_rejected = sum("used" not in reasons for _, reasons in outcomes)
        assert len(rejected[number]) >= min_rejected > 0.5 * COUNT
    reasons = manifest["counts"]["train"]["rejected"]
    assert sum(reasons.values()) == sum(map(len, rejected.values()))
    for reason in (
        "picture_unreadable", "picture_too_large", "picture_mode", "picture_animated", "no_text",
        "text_too_long", "not_utf8", "missing_field", "unsafe_name", "unreadable_shard",
        "record_too_large", "missing_picture", "licence_unknown",
    ):  # fmt: skip
        assert reasons.get(reason, 0) > 0, reason
