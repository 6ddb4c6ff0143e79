"""Auditing a prepared folder, and taking documents out of it."""

import dataclasses
import os

import numpy as np
import pytest

from leon_jax.config import UserError
from leon_jax.documents import Text
from leon_jax.prepare import audit_and_removal
from leon_jax.prepare import prepare as preparing
from leon_jax.prepare.config import DuplicatesConfig
from leon_jax.retrieval.prepared_folder import PreparedFolder
from tests import tiny
from tests.prepare.made import files_of, left_beside


@pytest.fixture
def folder(tmp_path):
    documents = tiny.documents()
    config, sources = tiny.preparation(
        tiny.folders()[0],
        {"train": [*documents, documents[0]], "exam": tiny.held_out()},
        shard_size=4,
        variants=2,
    )
    preparing.prepare(config, tmp_path / "prepared", sources=sources, progress=False)
    return tmp_path / "prepared"


def content(folder):
    """Everything that a folder says of its documents, with neighbours by key."""
    prepared = PreparedFolder(folder)
    keys = [document["key"] for document in prepared.listing()]
    vectors = prepared.vector_index().rows(0, len(keys))
    found = {}
    for split in prepared.manifest["splits"]:
        table, records = prepared.neighbours(split), prepared.records(split)
        for row, listed in enumerate(prepared.listing(split)):
            neighbours = {
                modality: [
                    (keys[i], s)
                    for i, s in zip(
                        table[row][f"by_{modality}_ids"].tolist(),
                        table[row][f"by_{modality}_scores"].tolist(),
                        strict=True,
                    )
                    if i >= 0
                ]
                for modality in ("text", "image")
            }
            found[listed["key"]] = (listed, records[row], neighbours)
            if split == "train":
                found[listed["key"]] += (vectors[row].tobytes(),)
    variants = np.concatenate([np.load(p) for p in prepared.paths("train", "variants.npy")])
    return found, dict(zip(keys, variants, strict=True))


def test_an_audit_tells_where_a_document_came_from_and_what_it_reads(folder):
    prepared = PreparedFolder(folder)
    (document,) = [d for d in audit_and_removal.audit(folder, "openmoji/0") if "split" in d]
    assert document["licence"] == "CC-BY-SA-4.0" and document["attribution"] == "OpenMoji authors"
    assert (document["split"], document["row"], document["shard"]) == ("train", 6, "train-00001")
    assert document["input"]["shard"] == "4-8"
    row, keys = prepared.neighbours()[6], [d["key"] for d in prepared.listing()]
    for modality, found in document["neighbours"].items():
        ids = [i for i in row[f"by_{modality}_ids"].tolist() if i >= 0]
        assert [n["key"] for n in found] == [keys[i] for i in ids] and ids


def test_an_audit_tells_why_a_record_is_not_used(folder):
    found = audit_and_removal.audit(folder, "twemoji/0")
    assert [d.get("reason") for d in found] == [None, "key_repeated"]
    assert found[1]["shard"] == "train-00003" and found[1]["input"]["shard"] == "12-13"
    with pytest.raises(UserError, match="knows no document with the key 'lion'"):
        audit_and_removal.audit(folder, "lion")


def test_what_is_removed_is_gone_from_everywhere_and_the_rest_is_as_it_was(folder):
    before, variants = content(folder)
    count, unknown = audit_and_removal.remove(
        folder,
        {("", "twemoji/1"), ("OpenMoji", "openmoji/3"), ("", "held_out/2"), ("other", "twemoji/2"),
         ("", "lion")},
    )  # fmt: skip
    gone = {"twemoji/1", "openmoji/3", "held_out/2"}
    assert count == 3 and unknown == ["lion", "twemoji/2"]
    after, variants_after = content(folder)
    assert set(after) == set(before) - gone
    for key, (listed, record, neighbours, *vector) in after.items():
        assert (listed, record) == before[key][:2] and vector == list(before[key][3:])
        for modality, found in neighbours.items():
            assert found == [n for n in before[key][2][modality] if n[0] not in gone]
    for key, codes in variants_after.items():
        np.testing.assert_array_equal(codes, variants[key])
    for name, data in files_of(folder).items():
        for key in gone:
            if key.encode() in data:
                told = name.endswith(".rejects.jsonl") or name == "removed.jsonl"
                assert told, f"{name} still holds {key}"
    manifest = PreparedFolder(folder).manifest
    assert manifest["splits"] == {"train": 10, "exam": 3}
    assert manifest["counts"]["train"]["rejected"]["removed_by_request"] == 2
    assert audit_and_removal.audit(folder, "openmoji/3")[0]["reason"] == "removed_by_request"
    assert not left_beside(folder)


def test_what_was_removed_stays_away_when_the_folder_is_prepared_anew(folder):
    audit_and_removal.remove(folder, {("", "twemoji/1")})
    # What is not there now is kept away too, should it come; so are copies of what was removed.
    assert audit_and_removal.remove(folder, {("", "held_out/2"), ("", "twemoji/9")})[1] == [
        "twemoji/9"
    ]
    documents = tiny.documents()
    copy = dataclasses.replace(
        documents[1], provenance=dataclasses.replace(documents[1].provenance, key="copy")
    )
    documents += [
        copy,
        dataclasses.replace(
            documents[2],
            parts=(Text("new"), documents[2].parts[1]),
            provenance=dataclasses.replace(documents[2].provenance, key="twemoji/9"),
        ),
    ]
    for variants in (1, 3):
        config, sources = tiny.preparation(
            tiny.folders()[0],
            {"train": documents, "exam": tiny.held_out()},
            shard_size=3,
            variants=variants,
            duplicates=DuplicatesConfig(exact=True),
        )
        preparing.prepare(config, folder, sources=sources, progress=False)
        listed = [
            d["key"] for split in ("train", "exam") for d in PreparedFolder(folder).listing(split)
        ]
        gone = {"twemoji/1", "held_out/2", "twemoji/9", "copy"}
        assert len(listed) == len(documents) + len(tiny.held_out()) - len(gone)
        assert not gone & set(listed)
        assert audit_and_removal.audit(folder, "copy")[0]["reason"] == "copy_exact"
        assert audit_and_removal.audit(folder, "twemoji/1")[0]["reason"] == "removed_by_request"


def test_a_whole_shard_can_go(folder):
    keys = {("", f"twemoji/{number}") for number in range(4)}
    assert audit_and_removal.remove(folder, keys) == (4, [])
    assert list(PreparedFolder(folder).shards("train")) == ["train-00001", "train-00002"]
    assert len(PreparedFolder(folder).records()) == len(PreparedFolder(folder).vector_index()) == 8
    assert audit_and_removal.remove(folder, {("", "twemoji/4")}) == (1, [])


@pytest.mark.parametrize("number", range(6))
def test_a_removal_that_is_stopped_leaves_a_whole_folder(folder, monkeypatch, number):
    calls, rename = iter(range(100)), os.rename

    def stop(*arguments):
        if next(calls) == number // 2:
            if number % 2:
                rename(*arguments)
            raise KeyboardInterrupt
        rename(*arguments)

    before = files_of(folder)
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", stop)
        if number < 4:
            with pytest.raises(KeyboardInterrupt):
                audit_and_removal.remove(folder, {("", "twemoji/1")})
            if folder.exists():
                assert number == 3 or files_of(folder) == before
    audit_and_removal.remove(folder, {("", "twemoji/1")})
    assert "twemoji/1" not in content(folder)[0]
    assert PreparedFolder(folder).manifest["splits"]["train"] == 11


def test_a_list_of_keys_is_read_and_wrong_ones_are_named(folder, tmp_path):
    path = tmp_path / "keys.txt"
    path.write_text("twemoji/1\n\nOpenMoji\topenmoji/2\n")
    assert audit_and_removal.read_keys(path) == {("", "twemoji/1"), ("OpenMoji", "openmoji/2")}
    path.write_bytes("\ufeffa b\r\n c\u2028d\r\n".encode())
    assert audit_and_removal.read_keys(path) == {("", "a b"), ("", " c\u2028d")}
    path.write_text("\n")
    with pytest.raises(UserError, match="names no keys"):
        audit_and_removal.read_keys(path)
    with pytest.raises(UserError, match="cannot read the keys"):
        audit_and_removal.read_keys(tmp_path / "none.txt")
    everything = {("", document.provenance.key) for document in tiny.documents()}
    before = files_of(folder)
    with pytest.raises(UserError, match="no document of train would be left"):
        audit_and_removal.remove(folder, everything)
    assert files_of(folder) == before
