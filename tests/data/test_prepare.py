"""The prepared folder: what it holds, what never reaches the index, when it is made anew."""

import json

import jax
import numpy as np
import pytest

from leon_jax.config import UserError
from leon_jax.data import prepare as preparing
from leon_jax.data.prepare import prepare
from leon_jax.data.records import RecordSource
from leon_jax.retrieval.index import Views
from leon_jax.retrieval.selection import Neighbours, SelectionConfig
from tests import tiny

SELECTION = SelectionConfig(near_copy_text=2, near_copy_image=2, near_copy_document=2)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    from leon_jax import sharding

    with jax.set_mesh(sharding.make_mesh((1, 1, 1, 1), jax.devices()[:1])):
        return tiny.write_checkpoint(tmp_path_factory.mktemp("model"))


def splits():
    documents = tiny.documents()
    return {"train": documents[:8], "unseen": documents[8:]}


def make(files, out, **changes):
    arguments = {"selection": SELECTION, "sources": splits(), "progress": False, **changes}
    names = ("tokenizer.safetensors", "encoder.safetensors", "text.json")
    return prepare(out.parent, out, *(files / name for name in names), **arguments)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "prepared"


def test_records_keep_their_order_and_gain_codes(files, out):
    make(files, out)
    for split, documents in splits().items():
        records = RecordSource(out / f"{split}.array_record")
        assert len(records) == len(documents)
        for record, document in zip(records, documents, strict=True):
            assert record.parts[0] == document.parts[0]
            assert record.provenance == document.provenance
            np.testing.assert_array_equal(record.parts[1].pixels, document.parts[1].pixels)
            codes = record.parts[1].codes
            assert codes.shape == (tiny.GRID, tiny.GRID) and codes.max() < tiny.CODES


def test_nothing_held_out_reaches_the_index_or_the_neighbours(files, out):
    make(files, out)
    train = splits()["train"]
    assert len(Views.load(out / "index.safetensors")) == len(train)
    seen = set()
    for split, documents in splits().items():
        table = Neighbours.load(out / f"neighbours_{split}.safetensors")
        for ids in (table.by_text_ids, table.by_image_ids):
            assert ids.shape == (len(documents), 2) and ids.max() < len(train)
            seen |= set(ids.ravel().tolist())
    assert len(seen - {-1}) > 1
    # Other held-out documents leave the index as it is.
    before = Views.load(out / "index.safetensors")
    make(files, out, sources={**splits(), "unseen": tiny.documents()[9:]})
    after = Views.load(out / "index.safetensors")
    np.testing.assert_array_equal(before.document.embeddings, after.document.embeddings)


def test_row_i_of_the_index_is_record_i_and_no_record_is_its_own_neighbour(files, out):
    from leon_jax.retrieval.encoder import Encoder
    from leon_jax.tokenizers.text import TextTokenizer

    make(files, out)
    encoder = Encoder.load(files / "encoder.safetensors", TextTokenizer.load(files / "text.json"))
    records = RecordSource(out / "train.array_record")
    expected = encoder.embed_documents([records[i] for i in range(len(records))])
    rows = Views.load(out / "index.safetensors").document.embeddings
    np.testing.assert_allclose(rows, expected, atol=1e-5)
    table = Neighbours.load(out / "neighbours_train.safetensors")
    own = np.arange(len(records))[:, None]
    assert (table.by_text_ids != own).all() and (table.by_image_ids != own).all()


def test_the_manifest_says_what_was_used_and_preparing_again_does_nothing(files, out, monkeypatch):
    manifest = make(files, out)
    assert json.loads((out / "manifest.json").read_text()) == manifest
    assert manifest["splits"] == {"train": 8, "unseen": 4}
    assert set(manifest["sha256"]) == {"tokenizer", "encoder", "text"}
    assert manifest["selection"]["near_copy_text"] == 2
    monkeypatch.setattr(preparing, "embed_views", lambda *_: pytest.fail("prepared again"))
    assert make(files, out) == manifest


@pytest.mark.parametrize("change", ["selection", "documents"])
def test_other_inputs_make_the_folder_anew(files, out, change):
    make(files, out)
    if change == "selection":
        made = make(files, out, selection=SelectionConfig(1, 4, 2, 2, 2))
        table = Neighbours.load(out / "neighbours_train.safetensors")
        assert table.by_text_ids.shape == (8, 1)
    else:
        swapped = splits()["train"][::-1]
        made = make(files, out, sources={"train": swapped})
        assert RecordSource(out / "train.array_record")[0].parts[0] == swapped[0].parts[0]
    assert json.loads((out / "manifest.json").read_text()) == made
    assert [path.name for path in out.parent.iterdir()] == ["prepared"]


def test_a_failure_on_the_way_leaves_the_old_folder_and_no_rubbish(files, out, monkeypatch):
    manifest = make(files, out)

    def fail(*arguments, **options):
        raise RuntimeError("the machine was unplugged")

    monkeypatch.setattr(preparing, "build_neighbours", fail)
    with pytest.raises(RuntimeError, match="unplugged"):
        make(files, out, sources={"train": splits()["train"][::-1]})
    assert json.loads((out / "manifest.json").read_text()) == manifest
    assert [path.name for path in out.parent.iterdir()] == ["prepared"]


def test_a_folder_of_something_else_is_not_replaced(files, out):
    out.mkdir()
    (out / "letters.txt").write_text("keep me")
    with pytest.raises(UserError, match="not a prepared folder"):
        make(files, out)
    assert (out / "letters.txt").read_text() == "keep me"


def test_missing_files_and_splits_are_named(files, out):
    with pytest.raises(UserError, match=r"cannot read .*none\.json"):
        prepare(
            out,
            out,
            files / "tokenizer.safetensors",
            files / "encoder.safetensors",
            files / "none.json",
            sources=splits(),
        )
    with pytest.raises(UserError, match="no split 'train'"):
        make(files, out, sources={"unseen": splits()["unseen"]})
