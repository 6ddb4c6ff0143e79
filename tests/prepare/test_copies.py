"""Copies: what is dropped, what is said of it, and what is never a neighbour of its original."""

import dataclasses
import errno
import json
import os
import re

import numpy as np
import pytest

from leon_jax.config import UserError
from leon_jax.documents import Image, Text
from leon_jax.prepare import gather
from leon_jax.prepare import prepare as preparing
from leon_jax.prepare.config import DuplicatesConfig
from leon_jax.retrieval.prepared_folder import PreparedFolder
from leon_jax.retrieval.selection import SelectionConfig
from tests import tiny
from tests.prepare.made import make


def test_copies_are_dropped_where_they_repeat_and_the_rejects_say_what(checkpoint, out):
    documents = tiny.documents()
    copy = dataclasses.replace(
        documents[0], provenance=dataclasses.replace(documents[0].provenance, key="copy")
    )
    held_out = dataclasses.replace(
        documents[1], provenance=dataclasses.replace(documents[1].provenance, key="exam")
    )
    sources = {"train": [*documents[:6], documents[2], copy], "exam": [held_out]}
    rules = DuplicatesConfig(exact=True)
    made = make(checkpoint, out, sources, duplicates=rules)
    kept = [document["key"] for document in PreparedFolder(out).listing()]
    assert kept == [documents[i].provenance.key for i in (0, 2, 3, 4, 5)]
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
    assert made["counts"]["train"]["rejected"] == {"copy_exact": 2, "key_repeated": 1}


def test_a_near_copy_is_dropped_with_its_similarity(checkpoint, out):
    documents = tiny.documents()
    text, picture = documents[0].parts
    darker = Image(pixels=(picture.pixels * 0.98).astype(np.uint8))
    copy = dataclasses.replace(
        documents[0],
        parts=(text, darker),
        provenance=dataclasses.replace(documents[0].provenance, key="copy"),
    )
    rules = DuplicatesConfig(near=0.999)
    made = make(checkpoint, out, {"train": [documents[0], copy]}, duplicates=rules)
    assert made["splits"] == {"train": 1}
    (line,) = (out / "train-00000.rejects.jsonl").read_text().splitlines()
    reject, first = json.loads(line), documents[0].provenance
    assert (reject["key"], reject["reason"]) == ("copy", "copy_near")
    assert re.fullmatch(
        rf"it repeats {first.key} of {first.source}, similarity (0\.999|1\.000)", reject["detail"]
    )


def test_copies_are_judged_once(checkpoint, out, monkeypatch):
    """A second judgement might differ in rounding from the one that files were written by."""

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(UserError, match="No space left"):
        patch.setattr(preparing, "save_rows", full)
        make(checkpoint, out)
    with monkeypatch.context() as patch:
        patch.setattr(gather, "judge", lambda *_: pytest.fail("judged again"))
        make(checkpoint, out)


def test_shards_that_search_together_find_what_each_would_find_alone(
    checkpoint, tmp_path, monkeypatch
):
    tables = []
    for number in (1, 4, 100):
        monkeypatch.setattr(preparing, "PASS", number)
        make(checkpoint, tmp_path / str(number))
        tables.append(PreparedFolder(tmp_path / str(number)).neighbours())
    for table in tables[1:]:
        for name in ("by_text_ids", "by_image_ids"):
            np.testing.assert_array_equal(table.column(name), tables[0].column(name))


@pytest.mark.parametrize(("most", "alone"), [(100, {"a": 1}), (5, {})])
def test_counts_stay_small_however_many_credit_lines_there_are(
    checkpoint, out, monkeypatch, most, alone
):
    """Only the largest are listed; and the rarest go where there are too many to tell apart."""
    monkeypatch.setattr(gather, "_MOST", most)
    monkeypatch.setattr(gather, "_LISTED", 3)
    credits = ["a", "b", "b", "c", "d", "d", "e", "f"]
    documents = [
        dataclasses.replace(d, provenance=dataclasses.replace(d.provenance, attribution=credit))
        for d, credit in zip(tiny.documents(), credits, strict=False)
    ]
    made = make(checkpoint, out, {"train": documents})
    others = 4 - len(alone)
    assert made["counts"]["train"]["credit"] == {"b": 2, "d": 2, "(others)": others} | alone
    card = (out / "card.md").read_text()
    assert "- b (2 documents)\n" in card and ("- a (1 document)\n" in card) == bool(alone)
    assert f"- {others} documents more, whose credit lines are in" in card


@pytest.mark.parametrize("limits", [(0.98, None), (2, 0.98), (2, None)])
@pytest.mark.parametrize("together", [1, 100])
def test_a_near_copy_of_a_document_is_never_its_neighbour(
    checkpoint, out, monkeypatch, limits, together
):
    """By the whole documents where the text is the same, by the pictures whatever it is."""
    monkeypatch.setattr(preparing, "PASS", together)
    document, picture = limits
    documents = tiny.documents()
    originals = documents[:6]
    copies = [
        dataclasses.replace(
            original,
            parts=(
                Text("another caption") if picture else original.parts[0],
                Image(pixels=(original.pixels * 0.98).astype(np.uint8)),
            ),
            provenance=dataclasses.replace(original.provenance, key=f"copy/{number}"),
        )
        for number, original in enumerate(originals)
    ]
    sources = {"train": [*originals, *copies], "exam": copies}
    selection = SelectionConfig(
        near_copy_query=document, near_copy_document=2, near_copy_picture=picture
    )
    rules = DuplicatesConfig(exact=False)
    sources["exam"] = [
        dataclasses.replace(copy, provenance=dataclasses.replace(copy.provenance, source="an exam"))
        for copy in copies
    ]
    make(checkpoint, out, sources, duplicates=rules, selection=selection)
    found = 0
    for split in ("train", "exam"):
        table = PreparedFolder(out).neighbours(split)
        for row in range(len(table)):
            ids = {*table[row]["by_text_ids"].tolist(), *table[row]["by_image_ids"].tolist()}
            of = row % 6
            found += bool({of, of + 6} & (ids - {row if split == "train" else -1}))
    if (document, picture) == (2, None):
        assert found == 18
    else:
        assert found == 0
