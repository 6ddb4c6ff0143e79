"""10,200 hostile records through the whole of `leon prepare`: none stops it, each is accounted for.

What sources alone make of them, their memory and their doings: tests/data/sources/test_hostile.py.
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
from tests.prepare.made import left_beside

ROOT = pathlib.Path(__file__).resolve().parents[2]
COUNT = 3_400
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
    done = subprocess.run(
        [sys.executable, "-m", "tests.prepare.prepare_hostile", str(out), *arguments],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    printed = json.loads(done.stdout)
    manifest = printed["manifest"]

    # Nothing was written but the folder, and nothing of the corpus changed.
    assert sorted(os.walk(tmp_path / "data")) == before
    assert not left_beside(out)
    # Two threads may each decode a picture of 64 million pixels, 200 MiB, in several copies.
    assert printed["most"] - printed["before"] < 2500, printed

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
        anything = frozenset().union(*nameless) if nameless else frozenset()
        for key, reason in rejected[number]:
            assert reason in allowed.get(key, anything), (KINDS[number], key, reason)
        for key in used[number]:
            assert "used" in allowed.get(key, anything), (KINDS[number], key)
        must = sum("used" not in reasons for _, reasons in outcomes)
        assert len(rejected[number]) >= must > 0.5 * COUNT
    reasons = manifest["counts"]["train"]["rejected"]
    assert sum(reasons.values()) == sum(map(len, rejected.values()))
    for reason in (
        "picture_unreadable", "picture_too_large", "picture_mode", "picture_animated", "no_text",
        "text_too_long", "not_utf8", "missing_field", "unsafe_name", "unreadable_shard",
        "record_too_large", "missing_picture", "licence_unknown",
    ):  # fmt: skip
        assert reasons.get(reason, 0) > 0, reason
