"""Collecting documents without models, and encoding them with models afterwards."""

import collections
import dataclasses
import json
import pickle
import shutil

import jax
import numpy as np
import pytest

from leon_jax.config import UserError
from leon_jax.data.document_folder import DocumentFolder
from leon_jax.data.records import RecordSource
from leon_jax.data.sources.raw_record import SourceConfig
from leon_jax.documents import Document, Image, Provenance, Text
from leon_jax.prepare import audit_and_removal, splitting
from leon_jax.prepare import encode as encoding
from leon_jax.prepare import prepare as preparing
from leon_jax.prepare.config import PrepareConfig
from leon_jax.prepare.encode import EncodeConfig, encode
from leon_jax.retrieval.prepared_folder import PreparedFolder, encodings
from leon_jax.tokenizers.image import ImageTokenizer
from tests import tiny
from tests.listed import Listed
from tests.prepare.folders import NEVER_NEAR, files_of


def documents(count: int, captions: int = 1) -> list[Document]:
    """Returns documents with random stripes; `captions` documents share each image."""
    result = []
    for number in range(count):
        rng = np.random.default_rng(number)
        pixels = rng.integers(0, 256, (1, 20, 3), np.uint8).repeat(20, axis=0)
        for caption in range(captions):
            provenance = Provenance(f"{number}/{caption}", "stripes", "CC0-1.0", "")
            text = Text(f"stripes {number}, caption {caption}")
            result.append(Document((text, Image(pixels=pixels)), provenance))
    return result


def collect(out, splits, **changes):
    """Collects documents in memory, by split, into a documents folder without models."""
    sources = tuple(SourceConfig("jsonl", "stripes", split=split) for split in splits)
    config = PrepareConfig(sources, picture_side=20, min_side=1, **changes)
    opened = [
        (source, Listed(split, 7)) for source, split in zip(sources, splits.values(), strict=True)
    ]
    return preparing.prepare(config, out, sources=opened, progress=False)


@pytest.fixture
def encode_config(checkpoint):
    return EncodeConfig(
        tokenizer=str(checkpoint / "tokenizer.safetensors"),
        encoder=str(checkpoint / "encoder.safetensors"),
        text=str(checkpoint / "text.json"),
        selection=NEVER_NEAR,
    )


def pictures_of(folder, split):
    return {document["picture"] for document in DocumentFolder(folder).listing(split)}


def test_without_models_documents_are_collected_and_not_encoded(out):
    manifest = collect(out, {"train": documents(9), "exam": documents(12)[9:]})
    folder = DocumentFolder(out)
    assert folder.splits == {"train": 9, "exam": 3} and manifest["sha256"] == {}
    for split, first in (("train", 0), ("exam", 9)):
        for number, document in enumerate(folder.records(split), first):
            (expected,) = documents(number + 1)[number:]
            assert document.text == expected.text and document.parts[1].codes is None
            np.testing.assert_array_equal(document.pixels, expected.pixels)
    assert not list(out.glob("*.npy")) and (out / "card.md").is_file()
    with pytest.raises(UserError, match=r"has documents without codes; run: leon encode --folder="):
        PreparedFolder(out)
    with pytest.raises(UserError, match="no split 'test'; its splits are train, exam"):
        folder.records("test")


def test_a_second_call_does_nothing_and_other_settings_replace_the_folder(out):
    collect(out, {"train": documents(9)})
    before = files_of(out)
    collect(out, {"train": documents(9)})
    assert files_of(out) == before
    manifest = collect(out, {"train": documents(11)}, max_text=20)
    assert manifest["counts"]["train"]["rejected"] == {"text_too_long": 1}
    assert DocumentFolder(out).manifest == manifest


def test_a_share_of_the_groups_is_held_out(out):
    collect(out, {"": documents(200, captions=2)}, held_out=0.2)
    folder = DocumentFolder(out)
    assert sum(folder.splits.values()) == 400
    assert 40 <= folder.splits["held_out"] <= 120
    # Both captions of an image are in one split.
    assert not pictures_of(out, "train") & pictures_of(out, "held_out")
    for split in folder.splits:
        counts = collections.Counter(d["picture"] for d in folder.listing(split))
        assert set(counts.values()) == {2}
    # Every document is in exactly one file.
    keys = [d["key"] for split in folder.splits for d in folder.listing(split)]
    assert len(set(keys)) == 400
    for split in folder.splits:
        listed = [d["key"] for d in folder.listing(split)]
        assert [d.provenance.key for d in folder.records(split)] == listed


def test_what_is_held_out_does_not_depend_on_the_other_documents(tmp_path):
    collect(tmp_path / "few", {"": documents(60)}, held_out=0.2)
    collect(tmp_path / "many", {"": documents(100)}, held_out=0.2)
    few, many = (pictures_of(tmp_path / name, "held_out") for name in ("few", "many"))
    trained = pictures_of(tmp_path / "many", "train")
    assert few and few <= many and not few & trained


def test_a_small_share_holds_out_one_group_and_a_large_one_never_all(out):
    digests = np.arange(5 * 16, dtype=np.uint8).reshape(5, 16)
    assert splitting.held_out(digests[2:], digests[2:], 0.001).sum() == 0
    assert splitting.held_out(digests[2:], digests[2:], 0.17).sum() == 1
    assert splitting.held_out(digests, digests, 1 - 1e-9).sum() == 4
    assert not splitting.held_out(digests[:1], digests[:1], 0.5).any()
    assert collect(out, {"": documents(3)}, held_out=0.01)["splits"] == {"train": 3}


def test_groups_and_images_connect_documents():
    a, b, c, d = (np.full(16, number, np.uint8) for number in range(4))
    groups, pictures = np.stack([a, a, b, c, d]), np.stack([a, b, b, c, d])
    sets = splitting.connected_sets(groups, pictures)
    assert sets[0] == sets[1] == sets[2] and len(set(sets.tolist())) == 3


def test_a_train_document_with_the_image_of_a_held_out_one_is_dropped(out):
    train, exam = documents(6), documents(8)[5:]
    renamed = dataclasses.replace(exam[0].provenance, key="another")
    exam[0] = Document((Text("another caption"), exam[0].parts[1]), renamed)
    manifest = collect(out, {"train": train, "exam": exam})
    assert manifest["splits"] == {"train": 5, "exam": 3}
    assert manifest["counts"]["train"]["rejected"] == {"picture_held_out": 1}


def test_encoding_adds_codes_vectors_and_neighbours(out, encode_config, checkpoint):
    collect(out, {"train": documents(9), "exam": documents(12)[9:]})
    before = files_of(out)
    path, manifest = encode(out, encode_config, progress=False)
    assert manifest["splits"] == {"train": 9, "exam": 3}
    assert {name: data for name, data in files_of(out).items() if name in before} == before
    prepared = PreparedFolder(out)
    assert prepared.folder == path and path.parent == out / "encoded"
    with jax.set_mesh(tiny.sharding.make_mesh()):
        tokenizer = ImageTokenizer.load(checkpoint / "tokenizer.safetensors")
        images = np.stack([tokenizer.preprocess(d.pixels) for d in DocumentFolder(out).records()])
        codes = tokenizer.encode(images)
    for document, original, expected in zip(
        prepared.records(), DocumentFolder(out).records(), codes, strict=True
    ):
        np.testing.assert_array_equal(document.codes, expected)
        np.testing.assert_array_equal(document.pixels, original.pixels)
        assert document.provenance == original.provenance
    assert len(prepared.vector_index()) == 9 and len(prepared.neighbours("exam")) == 3


def test_an_encoding_stores_no_images_and_reads_those_of_the_documents(out, encode_config):
    """Also when documents were dropped, and after a removal."""
    collect(out, {"train": documents(20), "exam": documents(24)[20:]})
    config = dataclasses.replace(encode_config, near=0.999, variants=2)
    path, manifest = encode(out, config, progress=False)
    for shard in manifest["shards"]["train"]:
        (first, *_) = RecordSource(path / f"{shard}.array_record")
        assert first.parts[1].pixels is None
    assert PreparedFolder(out).variants(PreparedFolder(out).records()).count == 2

    def check():
        stored = {
            d.provenance.key: d for s in ("train", "exam") for d in DocumentFolder(out).records(s)
        }
        for split in ("train", "exam"):
            records = pickle.loads(pickle.dumps(PreparedFolder(out).records(split)))
            rows = range(len(records))
            for document in [*records, *records.read(reversed(rows))]:
                original = stored[document.provenance.key]
                np.testing.assert_array_equal(document.pixels, original.pixels)
                assert document.codes is not None and document.text == original.text
            assert records.texts(0) == [records[0].text]

    check()
    audit_and_removal.remove(out, {("", "0/0"), ("", "9/0"), ("", "21/0")})
    check()
    # Without the documents folder the codes remain.
    shutil.copytree(PreparedFolder(out).folder, out.parent / "alone")
    alone = PreparedFolder(out.parent / "alone").records()
    assert alone[0].parts[1].pixels is None and alone[0].codes is not None


def test_the_sources_are_not_read_again_for_another_model(out, encode_config, checkpoint, tmp_path):
    collect(out, {"train": documents(9)})
    first, _ = encode(out, encode_config, progress=False)
    text = json.loads((checkpoint / "text.json").read_text())
    (tmp_path / "text.json").write_text(json.dumps(text, indent=1))
    other = dataclasses.replace(encode_config, text=str(tmp_path / "text.json"))
    second, _ = encode(out, other, progress=False)
    assert encodings(out) == sorted([first, second]) and len({first, second}) == 2
    with pytest.raises(UserError, match="has several encodings; name one of"):
        PreparedFolder(out)
    assert len(PreparedFolder(first).records()) == 9


def test_several_captions_of_an_image_are_one_image(out, encode_config):
    """They never retrieve each other, and removal of near copies keeps or drops all of them."""
    collect(out, {"train": documents(12, captions=3)})
    encode(out, dataclasses.replace(encode_config, near=0.9999), progress=False)
    prepared = PreparedFolder(out)
    pictures = [document["picture"] for document in prepared.listing()]
    assert set(collections.Counter(pictures).values()) == {3}
    for row in range(len(pictures)):
        for modality in ("text", "image"):
            ids = [i for i in prepared.neighbours()[row][f"by_{modality}_ids"].tolist() if i >= 0]
            retrieved = [pictures[i] for i in ids]
            assert ids and pictures[row] not in retrieved
            assert len(set(retrieved)) == len(retrieved)


def test_a_killed_encoding_resumes_with_the_same_bytes(out, encode_config, monkeypatch, tmp_path):
    collect(out, {"train": documents(20), "exam": documents(24)[20:]})
    expected, _ = encode(out, encode_config, progress=False)
    files = files_of(expected)
    shutil.rmtree(out / "encoded")

    class Killed(Exception):
        pass

    calls = []
    original = encoding.prepare.__globals__["Worker"].__call__

    def killed(self, shard):
        calls.append(shard)
        if len(calls) == 3:
            raise Killed
        return original(self, shard)

    monkeypatch.setattr(encoding.prepare.__globals__["Worker"], "__call__", killed)
    with pytest.raises(Killed):
        encode(out, encode_config, progress=False)
    assert not encodings(out)
    monkeypatch.undo()
    path, _ = encode(out, encode_config, progress=False)
    assert files_of(path) == files


def test_removal_and_audit_reach_the_documents_and_their_encoding(out, encode_config):
    collect(out, {"train": documents(9), "exam": documents(12)[9:]})
    encode(out, encode_config, progress=False)
    collected, encoded = audit_and_removal.audit(out, "4/0")
    assert "neighbours" not in collected and encoded["neighbours"]["text"]
    assert encoded["encoding"] == encodings(out)[0].name
    count, unknown = audit_and_removal.remove(out, {("", "4/0"), ("", "10/0"), ("", "x")})
    assert count == 2 and unknown == ["x"]
    for folder in (DocumentFolder(out), PreparedFolder(out)):
        assert folder.splits == {"train": 8, "exam": 2}
        keys = [d["key"] for split in folder.splits for d in folder.listing(split)]
        assert "4/0" not in keys and "10/0" not in keys
        assert [d.provenance.key for d in folder.records()] == [d["key"] for d in folder.listing()]
    with pytest.raises(UserError, match="holds no document"):
        audit_and_removal.audit(out, "0")
    # The removed documents stay out when both steps run again.
    collect(out, {"train": documents(9), "exam": documents(12)[9:]}, max_text=100)
    encode(out, encode_config, progress=False)
    assert PreparedFolder(out).splits == {"train": 8, "exam": 2}


def test_only_a_documents_folder_is_encoded(out, encode_config):
    with pytest.raises(UserError, match="is a prepared folder; its documents are encoded already"):
        encode(tiny.folders()[1], encode_config)
    with pytest.raises(UserError, match="nowhere is not a documents folder"):
        encode("nowhere", encode_config)
    with pytest.raises(UserError, match="encoder is empty; give all three"):
        PrepareConfig((SourceConfig("jsonl", "x"),), tokenizer="a", text="b")
