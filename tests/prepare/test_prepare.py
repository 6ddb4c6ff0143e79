"""The prepared folder: what it holds, what never reaches the index, when it is made anew."""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import shutil
import threading

import jax
import numpy as np
import pytest
import safetensors.numpy

from leon_jax import tensor_files, weight_files
from leon_jax.config import UserError, to_dict
from leon_jax.data.sources.raw_record import SourceConfig
from leon_jax.documents import Image
from leon_jax.prepare import folder_lock
from leon_jax.prepare import prepare as preparing
from leon_jax.retrieval.encoder import RetrievalEncoder
from leon_jax.retrieval.prepared_folder import PreparedFolder
from leon_jax.tokenizers.image import ImageTokenizer, fit_image, normalize
from leon_jax.tokenizers.text import TextTokenizer
from tests import tiny
from tests.listed import Listed
from tests.prepare.made import NEVER_NEAR, files_of, left_beside, make, splits


def test_records_keep_their_order_and_gain_codes(checkpoint, out):
    make(checkpoint, out)
    prepared = PreparedFolder(out)
    with jax.set_mesh(tiny.sharding.make_mesh()):
        tokenizer = ImageTokenizer.load(checkpoint / "tokenizer.safetensors")
        for split, documents in splits().items():
            records = prepared.records(split)
            assert len(records) == len(documents) == prepared.manifest["splits"][split]
            pictures = np.stack([fit_image(d.pixels, tiny.RESOLUTION) for d in documents])
            codes = tokenizer.encode(normalize(pictures))
            for record, document, expected in zip(records, documents, codes, strict=True):
                assert record.parts[0] == document.parts[0]
                assert record.provenance == document.provenance
                np.testing.assert_array_equal(record.pixels, document.pixels)
                np.testing.assert_array_equal(record.codes, expected)


def test_listings_say_where_every_record_comes_from(checkpoint, out):
    make(checkpoint, out)
    for split, documents in splits().items():
        listed = list(PreparedFolder(out).listing(split))
        expected = [vars(d.provenance) | {"size": [16, 16]} for d in documents]
        assert listed == expected


def test_nothing_held_out_reaches_the_index_or_the_neighbours(checkpoint, out):
    make(checkpoint, out)
    prepared, train = PreparedFolder(out), splits()["train"]
    assert len(prepared.vector_index()) == len(train)
    seen = set()
    for split, documents in splits().items():
        table = prepared.neighbours(split)
        assert len(table) == len(documents)
        for name in ("by_text_ids", "by_image_ids"):
            ids = table.column(name)
            assert ids.max() < len(train)
            seen |= set(ids.ravel().tolist())
    assert len(seen - {-1}) > 1
    # Other held-out documents leave the index as it is.
    before = prepared.vector_index().rows(0, len(train))
    make(checkpoint, out, {**splits(), "unseen": tiny.documents()[9:]})
    np.testing.assert_array_equal(before, PreparedFolder(out).vector_index().rows(0, len(train)))


def test_row_i_of_the_index_is_record_i_and_no_record_is_its_own_neighbour(checkpoint, out):
    make(checkpoint, out)
    prepared = PreparedFolder(out)
    with jax.set_mesh(tiny.sharding.make_mesh()):
        text = TextTokenizer.load(checkpoint / "text.json")
        encoder = RetrievalEncoder.load(checkpoint / "encoder.safetensors", text)
        expected = encoder.embed_documents(list(prepared.records()))
    rows = prepared.vector_index().rows(0, 8)
    np.testing.assert_allclose(rows.astype(np.float32), expected, atol=1e-3)
    table = prepared.neighbours()
    for row in range(8):
        assert row not in table[row]["by_text_ids"] and row not in table[row]["by_image_ids"]


def test_the_manifest_says_what_was_used_and_preparing_again_does_nothing(checkpoint, out):
    manifest = make(checkpoint, out)
    assert json.loads((out / "manifest.json").read_text()) == manifest
    assert manifest["splits"] == {"train": 8, "unseen": 4}
    assert manifest["shards"]["train"] == {"train-00000": 3, "train-00001": 3, "train-00002": 2}
    assert set(manifest["sha256"]) == {"tokenizer", "encoder", "text"}
    assert manifest["config"]["selection"]["near_copy_query"] == 2
    assert manifest["counts"]["train"]["licence"] == {"CC-BY-4.0": 6, "CC-BY-SA-4.0": 2}
    assert make(checkpoint, out, run=lambda *_: pytest.fail("prepared again")) == manifest


@pytest.mark.parametrize("change", ["selection", "documents", "licences"])
def test_other_inputs_make_the_folder_anew(checkpoint, out, change):
    make(checkpoint, out)
    if change == "selection":
        made = make(checkpoint, out, selection=dataclasses.replace(NEVER_NEAR, per_modality=1))
        assert PreparedFolder(out).neighbours().column("by_text_ids").shape == (8, 1)
    elif change == "documents":
        swapped = splits()["train"][::-1]
        made = make(checkpoint, out, {"train": swapped})
        assert PreparedFolder(out).records()[0].parts[0] == swapped[0].parts[0]
    else:
        made = make(checkpoint, out, licences=("CC-BY-4.0",))
        assert made["splits"] == {"train": 6, "unseen": 0}
        assert made["counts"]["train"]["rejected"] == {"licence_not_allowed": 2}
    assert json.loads((out / "manifest.json").read_text()) == made
    assert not left_beside(out)


def test_more_variants_than_asked_for_serve_and_fewer_do_not(checkpoint, out):
    made = make(checkpoint, out, variants=3)
    assert make(checkpoint, out, variants=2, run=lambda *_: pytest.fail("again")) == made
    codes = np.concatenate([np.load(p) for p in PreparedFolder(out).paths("train", "variants.npy")])
    assert codes.shape == (8, 3, tiny.GRID, tiny.GRID)
    for record, variants in zip(PreparedFolder(out).records(), codes, strict=True):
        np.testing.assert_array_equal(record.codes, variants[0])
    assert make(checkpoint, out, variants=4)["config"]["variants"] == 4


def as_an_older_version_recorded(path, checkpoint):
    """A manifest or settings with the digests of the files' bytes."""
    values = json.loads(path.read_text())
    for name in ("tokenizer", "encoder"):
        data = (checkpoint / f"{name}.safetensors").read_bytes()
        assert values["sha256"][name] != hashlib.sha256(data).hexdigest()
        values["sha256"][name] = hashlib.sha256(data).hexdigest()
    path.write_text(json.dumps(values, indent=1) + "\n")
    return values


def test_a_folder_that_records_digests_of_bytes_serves_as_before(checkpoint, out, tmp_path):
    make(checkpoint, out)
    older = as_an_older_version_recorded(out / "manifest.json", checkpoint)
    assert make(checkpoint, out, run=lambda *_: pytest.fail("prepared again")) == older
    # Of other weights it is still another folder.
    other = shutil.copytree(checkpoint, tmp_path / "other")
    with jax.set_mesh(tiny.sharding.make_mesh()):
        tokenizer = ImageTokenizer.load(other / "tokenizer.safetensors").model
    changed, config = tiny.randomise(tokenizer, seed=5), to_dict(tokenizer.config)
    weight_files.save(other / "tokenizer.safetensors", changed, "tokenizer", config)
    assert make(other, out)["sha256"] != older["sha256"]


def test_a_run_begun_by_an_older_version_goes_on(checkpoint, out, monkeypatch):
    def stop(*arguments, **options):
        raise Unplugged

    with monkeypatch.context() as patch, contextlib.suppress(Unplugged):
        patch.setattr(preparing.gather, "gather", stop)
        make(checkpoint, out)
    work = out.parent / f".{out.name}.preparing"
    before = json.loads((work / "settings.json").read_text())
    older = as_an_older_version_recorded(work / "settings.json", checkpoint)
    names = [hashlib.sha256(json.dumps(s).encode()).hexdigest()[:16] for s in (before, older)]
    os.rename(work / f"shards-{names[0]}", work / f"shards-{names[1]}")
    made = make(checkpoint, out, run=lambda *_: pytest.fail("the shards were done"))
    assert made["sha256"] == older["sha256"]


def test_saving_the_models_again_leaves_a_folder_valid(checkpoint, out, tmp_path):
    make(checkpoint, out)
    other = shutil.copytree(checkpoint, tmp_path / "other")
    path = other / "tokenizer.safetensors"
    metadata, arrays = tensor_files.read(path)
    path.write_bytes(safetensors.numpy.save({k: np.array(v) for k, v in arrays.items()}, metadata))
    make(other, out, run=lambda *_: pytest.fail("prepared again"))


class Unplugged(BaseException):
    """What ends a program that nothing catches."""


def unplugged_at(monkeypatch, number):
    """The machine is unplugged when a file or a folder is put in place for the n-th time."""
    counter = iter(range(10_000))

    def wrap(function):
        def wrapped(*arguments, **options):
            if next(counter) == number:
                raise Unplugged
            return function(*arguments, **options)

        return wrapped

    monkeypatch.setattr(os, "replace", wrap(os.replace))
    monkeypatch.setattr(os, "rename", wrap(os.rename))


def test_a_run_stopped_anywhere_goes_on_and_ends_with_the_same_bytes(
    checkpoint, tmp_path, monkeypatch
):
    make(checkpoint, tmp_path / "whole", variants=2)
    expected = files_of(tmp_path / "whole")
    out, stops = tmp_path / "out" / "prepared", 0
    make(checkpoint, out, {"train": splits()["train"][::-1]})
    older = files_of(out)
    while True:
        with monkeypatch.context() as patch, contextlib.suppress(Unplugged):
            unplugged_at(patch, 8 + stops % 5)
            make(checkpoint, out, variants=2)
            break
        stops += 1
        assert stops < 50, "no run gets further than the one before"
        assert not out.exists() or files_of(out) in (older, expected)
    assert stops > 4
    assert files_of(out) == expected
    assert not left_beside(out)


def test_a_full_disk_is_one_sentence_and_what_is_done_is_kept(checkpoint, out, monkeypatch):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "train-00001.neighbours.npy")

    with monkeypatch.context() as patch:
        patch.setattr(preparing, "save_rows", full)
        with pytest.raises(UserError, match=r"stopped: No space left on device \(train-00001"):
            make(checkpoint, out)
    assert not out.exists()
    make(checkpoint, out, run=lambda *_: pytest.fail("the shards were done"))


def test_two_processes_prepare_one_folder_once(checkpoint, out):
    """The second one waits for the first, and takes what that one made."""
    started, results = threading.Event(), []

    def slow(config, sources, folder, shards):
        started.set()
        preparing.in_process(False)(config, sources, folder, shards)

    first = threading.Thread(target=lambda: results.append(make(checkpoint, out, run=slow)))
    first.start()
    assert started.wait(60)
    second = make(checkpoint, out, run=lambda *_: pytest.fail("prepared twice"))
    first.join()
    assert results == [second]


def test_a_folder_of_something_else_is_not_replaced(checkpoint, out):
    out.mkdir()
    (out / "letters.txt").write_text("keep me")
    with pytest.raises(UserError, match="not a prepared folder"):
        make(checkpoint, out)
    assert (out / "letters.txt").read_text() == "keep me"


def test_another_programs_manifest_is_not_taken_for_ours(checkpoint, out):
    out.mkdir()
    (out / "manifest.json").write_text('{"name": "my web page"}')
    (out / "letters.txt").write_text("keep me")
    with pytest.raises(UserError, match="not a prepared folder"):
        make(checkpoint, out)
    assert (out / "letters.txt").read_text() == "keep me"


@pytest.mark.parametrize("call", [0, 1])
def test_a_folder_killed_while_it_is_replaced_is_put_back(checkpoint, out, monkeypatch, call):
    older = make(checkpoint, out)
    calls, rename = iter(range(2)), os.rename

    def stop(*arguments):
        if next(calls) == call:
            raise Unplugged
        rename(*arguments)

    with pytest.raises(Unplugged), monkeypatch.context() as patch, folder_lock.hold(out):
        (out.parent / "new").mkdir()
        patch.setattr(os, "rename", stop)
        folder_lock.replace(out, out.parent / "new")
    (out.parent / ".prepared.preparing").mkdir()
    assert make(checkpoint, out, run=lambda *_: pytest.fail("made again")) == older
    assert left_beside(out) == ["new"]


def test_sources_whose_files_are_called_alike_are_told_apart(checkpoint, out):
    documents = tiny.documents()
    keyed = [
        dataclasses.replace(d, provenance=dataclasses.replace(d.provenance, key=f"line {n % 4}"))
        for n, d in enumerate(documents)
    ]
    config, sources = tiny.preparation(checkpoint, {"train": keyed[:4], "exam": keyed[4:8]})
    named = [SourceConfig("jsonl", f"{c.split}/metadata.jsonl", c.split) for c in config.sources]
    config = dataclasses.replace(config, sources=tuple(named))

    class Unsaid(Listed):
        def read(self, shard):
            for raw in super().read(shard):
                yield dataclasses.replace(raw, origin="")

    opened = [(c, Unsaid(s.documents)) for c, (_, s) in zip(named, sources, strict=True)]
    made = preparing.prepare(config, out, sources=opened, progress=False)
    assert made["splits"] == {"train": 4, "exam": 4}
    assert {d["source"] for d in PreparedFolder(out).listing()} == {"train/metadata.jsonl"}


def test_missing_files_and_splits_are_named(checkpoint, out):
    with pytest.raises(UserError, match=r"cannot read .*none\.json"):
        make(checkpoint, out, text=str(checkpoint / "none.json"))
    with pytest.raises(UserError, match="becomes the split 'train', only unseen"):
        make(checkpoint, out, {"unseen": splits()["unseen"]})
    with pytest.raises(UserError, match="'CC-BY', which is no SPDX licence identifier"):
        make(checkpoint, out, licences=("CC-BY",))
    with pytest.raises(UserError, match=r"train can be used \(its sources are empty\)"):
        make(checkpoint, out, {"train": []})
    with pytest.raises(UserError, match=r"no document of train can be used \(8 licence_not_allo"):
        make(checkpoint, out, licences=("MIT",))


def test_an_older_version_of_the_folder_is_named(checkpoint, out):
    make(checkpoint, out)
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps(manifest | {"format": 1}))
    with pytest.raises(UserError, match="prepared by another version"):
        PreparedFolder(out)


def test_a_large_picture_is_cropped_to_the_stored_side(checkpoint, out):
    rng = np.random.default_rng(0)
    documents = [
        dataclasses.replace(
            document,
            parts=(document.parts[0], Image(pixels=rng.integers(0, 255, (40, 60, 3), np.uint8))),
        )
        for document in splits()["train"]
    ]
    make(checkpoint, out, {"train": documents}, picture_side=20)
    for record, document in zip(PreparedFolder(out).records(), documents, strict=True):
        np.testing.assert_array_equal(record.pixels, fit_image(document.pixels, 20))
    assert next(PreparedFolder(out).listing())["size"] == [60, 40]
