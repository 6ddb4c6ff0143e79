"""Duplicates: which are dropped, what is recorded, and that a near copy is never a neighbour."""

import dataclasses
import errno
import json
import os
import re

import numpy as np
import pytest

from leon_jax.config import UserError
from leon_jax.documents import Image, Text
from leon_jax.prepare import gather, mining
from leon_jax.prepare.config import DuplicatesConfig
from leon_jax.retrieval.neighbour_selection import SelectionConfig
from leon_jax.retrieval.prepared_folder import PreparedFolder
from tests import tiny
from tests.prepare.folders import make


def test_exact_duplicates_are_dropped_and_the_rejects_name_the_original(checkpoint, out):
    documents = tiny.documents()
    copy = dataclasses.replace(
        documents[0], provenance=dataclasses.replace(documents[0].provenance, key="copy")
    )
    held_out = dataclasses.replace(
        documents[1], provenance=dataclasses.replace(documents[1].provenance, key="exam")
    )
    sources = {"train": [*documents[:6], documents[2], copy], "exam": [held_out]}
    rules = DuplicatesConfig(exact=True)
    manifest = make(checkpoint, out, sources, duplicates=rules)
    keys = [document["key"] for document in PreparedFolder(out).listing()]
    assert keys == [documents[i].provenance.key for i in (0, 2, 3, 4, 5)]
    rejects = [
        json.loads(line)
        for path in sorted(out.glob("train-*.rejects.jsonl"))
        for line in path.read_text().splitlines()
    ]
    key = [document.provenance.key for document in documents]
    source = documents[0].provenance.source
    assert sorted((r["key"], r["reason"], r["detail"]) for r in rejects) == sorted(
        [
            (key[1], "copy_exact", f"it repeats exam of {source}"),
            (key[2], "key_repeated", f"it repeats {key[2]} of {source}"),
            ("copy", "copy_exact", f"it repeats {key[0]} of {source}"),
        ]
    )
    assert manifest["counts"]["train"]["rejected"] == {"copy_exact": 2, "key_repeated": 1}


def test_a_near_copy_is_dropped_with_its_similarity(checkpoint, out):
    documents = tiny.documents()
    text, image = documents[0].parts
    darker = Image(pixels=(image.pixels * 0.98).astype(np.uint8))
    copy = dataclasses.replace(
        documents[0],
        parts=(text, darker),
        provenance=dataclasses.replace(documents[0].provenance, key="copy"),
    )
    rules = DuplicatesConfig(near=0.999)
    manifest = make(checkpoint, out, {"train": [documents[0], copy]}, duplicates=rules)
    assert manifest["splits"] == {"train": 1}
    (line,) = (out / "train-00000.rejects.jsonl").read_text().splitlines()
    reject, first = json.loads(line), documents[0].provenance
    assert (reject["key"], reject["reason"]) == ("copy", "copy_near")
    assert re.fullmatch(
        rf"it repeats {first.key} of {first.source}, similarity (0\.999|1\.000)", reject["detail"]
    )


def test_duplicates_are_decided_once(checkpoint, out, monkeypatch):
    """A second decision could differ in rounding from the one that files were written with."""

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(UserError, match="No space left"):
        patch.setattr(mining, "save_rows", full)
        make(checkpoint, out)
    with monkeypatch.context() as patch:
        patch.setattr(gather, "decide", lambda *_: pytest.fail("decided again"))
        make(checkpoint, out)


def test_shards_that_share_a_search_find_the_same_neighbours_as_alone(
    checkpoint, tmp_path, monkeypatch
):
    tables = []
    for number in (1, 4, 100):
        monkeypatch.setattr(mining, "PASS", number)
        make(checkpoint, tmp_path / str(number))
        tables.append(PreparedFolder(tmp_path / str(number)).neighbours())
    for table in tables[1:]:
        for name in ("by_text_ids", "by_image_ids"):
            np.testing.assert_array_equal(table.column(name), tables[0].column(name))


@pytest.mark.parametrize(("max_counted", "single"), [(100, {"a": 1}), (5, {})])
def test_the_number_of_listed_credit_lines_is_limited(
    checkpoint, out, monkeypatch, max_counted, single
):
    """Only the largest counts are listed; too many different lines are counted as others."""
    monkeypatch.setattr(gather, "_MAX_COUNTED", max_counted)
    monkeypatch.setattr(gather, "_MAX_LISTED", 3)
    credits = ["a", "b", "b", "c", "d", "d", "e", "f"]
    documents = [
        dataclasses.replace(d, provenance=dataclasses.replace(d.provenance, attribution=credit))
        for d, credit in zip(tiny.documents(), credits, strict=False)
    ]
    manifest = make(checkpoint, out, {"train": documents})
    others = 4 - len(single)
    assert manifest["counts"]["train"]["credit"] == {"b": 2, "d": 2, "(others)": others} | single
    card = (out / "card.md").read_text()
    assert "- b (2 documents)\n" in card and ("- a (1 document)\n" in card) == bool(single)
    assert f"- {others} more documents; their credit lines are in" in card


@pytest.mark.parametrize("limits", [(0.98, None), (2, 0.98), (2, None)])
@pytest.mark.parametrize("pass_size", [1, 100])
def test_a_near_copy_of_a_document_is_never_its_neighbour(
    checkpoint, out, monkeypatch, limits, pass_size
):
    """Whole documents are compared where the text is the same, images with any text."""
    monkeypatch.setattr(mining, "PASS", pass_size)
    document_limit, image_limit = limits
    documents = tiny.documents()
    originals = documents[:6]
    copies = [
        dataclasses.replace(
            original,
            parts=(
                Text("another caption") if image_limit else original.parts[0],
                Image(pixels=(original.pixels * 0.98).astype(np.uint8)),
            ),
            provenance=dataclasses.replace(original.provenance, key=f"copy/{number}"),
        )
        for number, original in enumerate(originals)
    ]
    sources = {"train": [*originals, *copies], "exam": copies}
    selection = SelectionConfig(
        near_copy_query=document_limit, near_copy_document=2, near_copy_picture=image_limit
    )
    rules = DuplicatesConfig(exact=False)
    sources["exam"] = [
        dataclasses.replace(copy, provenance=dataclasses.replace(copy.provenance, source="an exam"))
        for copy in copies
    ]
    make(checkpoint, out, sources, duplicates=rules, selection=selection)
    matches = 0
    for split in ("train", "exam"):
        table = PreparedFolder(out).neighbours(split)
        for row in range(len(table)):
            ids = {*table[row]["by_text_ids"].tolist(), *table[row]["by_image_ids"].tolist()}
            original = row % 6
            matches += bool({original, original + 6} & (ids - {row if split == "train" else -1}))
    if (document_limit, image_limit) == (2, None):
        assert matches == 18
    else:
        assert matches == 0
