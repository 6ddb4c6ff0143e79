"""Audits a prepared folder, and removes documents from it."""

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
from tests.prepare.folders import files_beside, files_of


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
    """Everything that a folder records about its documents, with neighbours by key."""
    prepared = PreparedFolder(folder)
    keys = [document["key"] for document in prepared.listing()]
    vectors = prepared.vector_index().rows(0, len(keys))
    documents = {}
    for split in prepared.manifest["splits"]:
        table, records = prepared.neighbours(split), prepared.records(split)
        for row, listed in enumerate(prepared.listing(split)):
            neighbours = {
                modality: [
                    (keys[neighbour], score)
                    for neighbour, score in zip(
                        table[row][f"by_{modality}_ids"].tolist(),
                        table[row][f"by_{modality}_scores"].tolist(),
                        strict=True,
                    )
                    if neighbour >= 0
                ]
                for modality in ("text", "image")
            }
            documents[listed["key"]] = (listed, records[row], neighbours)
            if split == "train":
                documents[listed["key"]] += (vectors[row].tobytes(),)
    variants = np.concatenate([np.load(p) for p in prepared.paths("train", "variants.npy")])
    return documents, dict(zip(keys, variants, strict=True))


def test_an_audit_returns_the_origin_and_the_neighbours_of_a_document(folder):
    prepared = PreparedFolder(folder)
    (document,) = [d for d in audit_and_removal.audit(folder, "openmoji/0") if "split" in d]
    assert document["licence"] == "CC-BY-SA-4.0" and document["attribution"] == "OpenMoji authors"
    assert (document["split"], document["row"], document["shard"]) == ("train", 6, "train-00001")
    assert document["input"]["shard"] == "4-8"
    row, keys = prepared.neighbours()[6], [d["key"] for d in prepared.listing()]
    for modality, neighbours in document["neighbours"].items():
        ids = [i for i in row[f"by_{modality}_ids"].tolist() if i >= 0]
        assert [neighbour["key"] for neighbour in neighbours] == [keys[i] for i in ids] and ids


def test_an_audit_returns_why_a_record_was_rejected(folder):
    entries = audit_and_removal.audit(folder, "twemoji/0")
    assert [entry.get("reason") for entry in entries] == [None, "key_repeated"]
    assert entries[1]["shard"] == "train-00003" and entries[1]["input"]["shard"] == "12-13"
    with pytest.raises(UserError, match="holds no document with the key 'lion'"):
        audit_and_removal.audit(folder, "lion")


def test_removal_deletes_documents_from_all_files_and_changes_no_others(folder):
    before, variants = content(folder)
    count, unknown = audit_and_removal.remove(
        folder,
        {("", "twemoji/1"), ("OpenMoji", "openmoji/3"), ("", "held_out/2"), ("other", "twemoji/2"),
         ("", "lion")},
    )  # fmt: skip
    removed = {"twemoji/1", "openmoji/3", "held_out/2"}
    assert count == 3 and unknown == ["lion", "twemoji/2"]
    after, variants_after = content(folder)
    assert set(after) == set(before) - removed
    for key, (listed, record, neighbours, *vector) in after.items():
        assert (listed, record) == before[key][:2] and vector == list(before[key][3:])
        for modality, pairs in neighbours.items():
            assert pairs == [pair for pair in before[key][2][modality] if pair[0] not in removed]
    for key, codes in variants_after.items():
        np.testing.assert_array_equal(codes, variants[key])
    for name, data in files_of(folder).items():
        for key in removed:
            if key.encode() in data:
                allowed = name.endswith(".rejects.jsonl") or name == "removed.jsonl"
                assert allowed, f"{name} still holds {key}"
    manifest = PreparedFolder(folder).manifest
    assert manifest["splits"] == {"train": 10, "exam": 3}
    assert manifest["counts"]["train"]["rejected"]["removed_by_request"] == 2
    assert audit_and_removal.audit(folder, "openmoji/3")[0]["reason"] == "removed_by_request"
    assert not files_beside(folder)


def test_removed_documents_stay_removed_when_the_folder_is_prepared_again(folder):
    audit_and_removal.remove(folder, {("", "twemoji/1")})
    # A removed key also applies to documents that are added later, and to copies of a removed one.
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
        removed = {"twemoji/1", "held_out/2", "twemoji/9", "copy"}
        assert len(listed) == len(documents) + len(tiny.held_out()) - len(removed)
        assert not removed & set(listed)
        assert audit_and_removal.audit(folder, "copy")[0]["reason"] == "copy_exact"
        assert audit_and_removal.audit(folder, "twemoji/1")[0]["reason"] == "removed_by_request"


def test_all_documents_of_a_shard_can_be_removed(folder):
    keys = {("", f"twemoji/{number}") for number in range(4)}
    assert audit_and_removal.remove(folder, keys) == (4, [])
    assert list(PreparedFolder(folder).shards("train")) == ["train-00001", "train-00002"]
    assert len(PreparedFolder(folder).records()) == len(PreparedFolder(folder).vector_index()) == 8
    assert audit_and_removal.remove(folder, {("", "twemoji/4")}) == (1, [])


@pytest.mark.parametrize("number", range(6))
def test_an_interrupted_removal_leaves_a_complete_folder(folder, monkeypatch, number):
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


def test_lists_of_keys_are_read_and_invalid_ones_raise_an_error(folder, tmp_path):
    path = tmp_path / "keys.txt"
    path.write_text("twemoji/1\n\nOpenMoji\topenmoji/2\n")
    assert audit_and_removal.read_keys(path) == {("", "twemoji/1"), ("OpenMoji", "openmoji/2")}
    path.write_bytes("\ufeffa b\r\n c\u2028d\r\n".encode())
    assert audit_and_removal.read_keys(path) == {("", "a b"), ("", " c\u2028d")}
    path.write_text("\n")
    with pytest.raises(UserError, match="holds no keys"):
        audit_and_removal.read_keys(path)
    with pytest.raises(UserError, match="cannot read the keys"):
        audit_and_removal.read_keys(tmp_path / "none.txt")
    all_keys = {("", document.provenance.key) for document in tiny.documents()}
    before = files_of(folder)
    with pytest.raises(UserError, match="train would have no documents left"):
        audit_and_removal.remove(folder, all_keys)
    assert files_of(folder) == before
