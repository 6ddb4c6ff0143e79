"""The prepared folder: its contents, what stays out of the index, and when it is prepared again."""

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

from leon_jax import safetensors_format, weight_files
from leon_jax.config import UserError, to_dict
from leon_jax.data.sources.raw_record import SourceConfig
from leon_jax.documents import Image
from leon_jax.prepare import folder_lock, mining
from leon_jax.prepare import prepare as preparing
from leon_jax.retrieval.encoder import RetrievalEncoder
from leon_jax.retrieval.prepared_folder import PreparedFolder
from leon_jax.tokenizers.image import ImageTokenizer, fit_image, normalize
from leon_jax.tokenizers.text import TextTokenizer
from tests import tiny
from tests.listed import Listed
from tests.prepare.folders import NEVER_NEAR, files_beside, files_of, make, splits


def test_records_keep_their_order_and_gain_codes(checkpoint, out):
    make(checkpoint, out)
    prepared = PreparedFolder(out)
    with jax.set_mesh(tiny.sharding.make_mesh()):
        tokenizer = ImageTokenizer.load(checkpoint / "tokenizer.safetensors")
        for split, documents in splits().items():
            records = prepared.records(split)
            assert len(records) == len(documents) == prepared.manifest["splits"][split]
            images = np.stack([fit_image(d.pixels, tiny.RESOLUTION) for d in documents])
            codes = tokenizer.encode(normalize(images))
            for record, document, expected in zip(records, documents, codes, strict=True):
                assert record.parts[0] == document.parts[0]
                assert record.provenance == document.provenance
                np.testing.assert_array_equal(record.pixels, document.pixels)
                np.testing.assert_array_equal(record.codes, expected)


def test_listings_hold_the_provenance_of_every_record(checkpoint, out):
    make(checkpoint, out)
    for split, documents in splits().items():
        listed = list(PreparedFolder(out).listing(split))
        pictures = [line.pop("picture") for line in listed]
        assert len(set(pictures)) == len(pictures) == len(documents)
        assert listed == [d.provenance.to_dict() | {"size": [16, 16]} for d in documents]


def test_held_out_documents_are_neither_in_the_index_nor_neighbours(checkpoint, out):
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
    # Other held-out documents do not change the index.
    before = prepared.vector_index().rows(0, len(train))
    make(checkpoint, out, {**splits(), "unseen": tiny.documents()[9:]})
    np.testing.assert_array_equal(before, PreparedFolder(out).vector_index().rows(0, len(train)))


def test_rows_of_the_index_match_the_records_and_no_record_neighbours_itself(checkpoint, out):
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


def test_the_manifest_records_the_inputs_and_preparing_again_does_nothing(checkpoint, out):
    manifest = make(checkpoint, out)
    assert json.loads((out / "manifest.json").read_text()) == manifest
    assert manifest["splits"] == {"train": 8, "unseen": 4}
    assert manifest["shards"]["train"] == {"train-00000": 3, "train-00001": 3, "train-00002": 2}
    assert set(manifest["sha256"]) == {"tokenizer", "encoder", "text"}
    assert manifest["config"]["selection"]["near_copy_query"] == 2
    assert manifest["counts"]["train"]["licence"] == {"CC-BY-4.0": 6, "CC-BY-SA-4.0": 2}
    assert make(checkpoint, out, run=lambda *_: pytest.fail("prepared again")) == manifest


@pytest.mark.parametrize("change", ["selection", "documents", "licences"])
def test_other_inputs_replace_the_folder(checkpoint, out, change):
    make(checkpoint, out)
    if change == "selection":
        manifest = make(checkpoint, out, selection=dataclasses.replace(NEVER_NEAR, per_modality=1))
        assert PreparedFolder(out).neighbours().column("by_text_ids").shape == (8, 1)
    elif change == "documents":
        swapped = splits()["train"][::-1]
        manifest = make(checkpoint, out, {"train": swapped})
        assert PreparedFolder(out).records()[0].parts[0] == swapped[0].parts[0]
    else:
        manifest = make(checkpoint, out, licences=("CC-BY-4.0",))
        assert manifest["splits"] == {"train": 6, "unseen": 0}
        assert manifest["counts"]["train"]["rejected"] == {"licence_not_allowed": 2}
    assert json.loads((out / "manifest.json").read_text()) == manifest
    assert not files_beside(out)


def test_a_folder_with_more_variants_is_used_and_one_with_fewer_is_replaced(checkpoint, out):
    manifest = make(checkpoint, out, variants=3)
    assert make(checkpoint, out, variants=2, run=lambda *_: pytest.fail("again")) == manifest
    codes = np.concatenate([np.load(p) for p in PreparedFolder(out).paths("train", "variants.npy")])
    assert codes.shape == (8, 3, tiny.GRID, tiny.GRID)
    for record, variants in zip(PreparedFolder(out).records(), codes, strict=True):
        np.testing.assert_array_equal(record.codes, variants[0])
    assert make(checkpoint, out, variants=4)["config"]["variants"] == 4


def record_byte_digests(path, checkpoint):
    """Writes digests of the files' bytes into a manifest or settings, as older versions did."""
    values = json.loads(path.read_text())
    for name in ("tokenizer", "encoder"):
        data = (checkpoint / f"{name}.safetensors").read_bytes()
        assert values["sha256"][name] != hashlib.sha256(data).hexdigest()
        values["sha256"][name] = hashlib.sha256(data).hexdigest()
    path.write_text(json.dumps(values, indent=1) + "\n")
    return values


def test_a_folder_with_digests_of_bytes_is_not_prepared_again(checkpoint, out, tmp_path):
    make(checkpoint, out)
    older = record_byte_digests(out / "manifest.json", checkpoint)
    assert make(checkpoint, out, run=lambda *_: pytest.fail("prepared again")) == older
    # With other weights the folder is replaced.
    other = shutil.copytree(checkpoint, tmp_path / "other")
    with jax.set_mesh(tiny.sharding.make_mesh()):
        tokenizer = ImageTokenizer.load(other / "tokenizer.safetensors").model
    changed, config = tiny.randomise(tokenizer, seed=5), to_dict(tokenizer.config)
    weight_files.save(other / "tokenizer.safetensors", changed, "tokenizer", config)
    assert make(other, out)["sha256"] != older["sha256"]


def test_a_run_of_an_older_version_is_resumed(checkpoint, out, monkeypatch):
    def stop(*arguments, **options):
        raise Killed

    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(preparing.gather, "gather", stop)
        make(checkpoint, out)
    work = out.parent / f".{out.name}.preparing"
    before = json.loads((work / "settings.json").read_text())
    older = record_byte_digests(work / "settings.json", checkpoint)
    names = [hashlib.sha256(json.dumps(s).encode()).hexdigest()[:16] for s in (before, older)]
    os.rename(work / f"shards-{names[0]}", work / f"shards-{names[1]}")
    manifest = make(checkpoint, out, run=lambda *_: pytest.fail("the shards were complete"))
    assert manifest["sha256"] == older["sha256"]


def test_saving_the_models_again_leaves_a_folder_valid(checkpoint, out, tmp_path):
    make(checkpoint, out)
    other = shutil.copytree(checkpoint, tmp_path / "other")
    path = other / "tokenizer.safetensors"
    metadata, arrays = safetensors_format.read(path)
    path.write_bytes(safetensors.numpy.save({k: np.array(v) for k, v in arrays.items()}, metadata))
    make(other, out, run=lambda *_: pytest.fail("prepared again"))


class Killed(BaseException):
    """Stands for the end of a killed process; no code catches it."""


def kill_at_rename(monkeypatch, number):
    """Kills the process at rename `number` (from 0) of a file or a folder."""
    counter = iter(range(10_000))

    def wrap(function):
        def wrapped(*arguments, **options):
            if next(counter) == number:
                raise Killed
            return function(*arguments, **options)

        return wrapped

    monkeypatch.setattr(os, "replace", wrap(os.replace))
    monkeypatch.setattr(os, "rename", wrap(os.rename))


def test_a_killed_run_resumes_and_ends_with_the_same_bytes(checkpoint, tmp_path, monkeypatch):
    make(checkpoint, tmp_path / "whole", variants=2)
    expected = files_of(tmp_path / "whole")
    out, stops = tmp_path / "out" / "prepared", 0
    make(checkpoint, out, {"train": splits()["train"][::-1]})
    older = files_of(out)
    while True:
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            kill_at_rename(patch, 8 + stops % 5)
            make(checkpoint, out, variants=2)
            break
        stops += 1
        assert stops < 50, "the runs make no progress"
        assert not out.exists() or files_of(out) in (older, expected)
    assert stops > 4
    assert files_of(out) == expected
    assert not files_beside(out)


def test_a_full_disk_raises_an_error_and_finished_work_remains(checkpoint, out, monkeypatch):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "train-00001.neighbours.npy")

    with monkeypatch.context() as patch:
        patch.setattr(mining, "save_rows", full)
        with pytest.raises(UserError, match=r"failed: No space left on device \(train-00001"):
            make(checkpoint, out)
    assert not out.exists()
    make(checkpoint, out, run=lambda *_: pytest.fail("the shards were complete"))


def test_two_processes_prepare_one_folder_once(checkpoint, out):
    """The second process waits for the first and uses its folder."""
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


def test_a_folder_of_other_files_is_not_replaced(checkpoint, out):
    out.mkdir()
    (out / "letters.txt").write_text("keep me")
    with pytest.raises(UserError, match="was not made by leon prepare"):
        make(checkpoint, out)
    assert (out / "letters.txt").read_text() == "keep me"


def test_a_folder_with_the_manifest_of_another_program_is_not_replaced(checkpoint, out):
    out.mkdir()
    (out / "manifest.json").write_text('{"name": "my web page"}')
    (out / "letters.txt").write_text("keep me")
    with pytest.raises(UserError, match="was not made by leon prepare"):
        make(checkpoint, out)
    assert (out / "letters.txt").read_text() == "keep me"


@pytest.mark.parametrize("call", [0, 1])
def test_a_folder_is_restored_after_a_killed_replacement(checkpoint, out, monkeypatch, call):
    older = make(checkpoint, out)
    calls, rename = iter(range(2)), os.rename

    def stop(*arguments):
        if next(calls) == call:
            raise Killed
        rename(*arguments)

    with pytest.raises(Killed), monkeypatch.context() as patch, folder_lock.hold(out):
        (out.parent / "new").mkdir()
        patch.setattr(os, "rename", stop)
        folder_lock.replace(out, out.parent / "new")
    (out.parent / ".prepared.preparing").mkdir()
    assert make(checkpoint, out, run=lambda *_: pytest.fail("prepared again")) == older
    assert files_beside(out) == ["new"]


def test_sources_with_equal_file_names_are_named_by_their_paths(checkpoint, out):
    documents = tiny.documents()
    keyed = [
        dataclasses.replace(d, provenance=dataclasses.replace(d.provenance, key=f"line {n % 4}"))
        for n, d in enumerate(documents)
    ]
    config, sources = tiny.preparation(checkpoint, {"train": keyed[:4], "exam": keyed[4:8]})
    named = [SourceConfig("jsonl", f"{c.split}/metadata.jsonl", c.split) for c in config.sources]
    config = dataclasses.replace(config, sources=tuple(named))

    class WithoutOrigin(Listed):
        def read(self, shard):
            for raw in super().read(shard):
                yield dataclasses.replace(raw, origin="")

    opened = [(c, WithoutOrigin(s.documents)) for c, (_, s) in zip(named, sources, strict=True)]
    manifest = preparing.prepare(config, out, sources=opened, progress=False)
    assert manifest["splits"] == {"train": 4, "exam": 4}
    assert {d["source"] for d in PreparedFolder(out).listing()} == {"train/metadata.jsonl"}


def test_missing_files_and_splits_raise_an_error(checkpoint, out):
    with pytest.raises(UserError, match=r"cannot read .*none\.json"):
        make(checkpoint, out, text=str(checkpoint / "none.json"))
    with pytest.raises(UserError, match="has the split 'train'; the splits are unseen"):
        make(checkpoint, out, {"unseen": splits()["unseen"]})
    with pytest.raises(UserError, match="'CC-BY', which is not an SPDX licence identifier"):
        make(checkpoint, out, licences=("CC-BY",))
    with pytest.raises(UserError, match=r"train can be used \(its sources are empty\)"):
        make(checkpoint, out, {"train": []})
    with pytest.raises(UserError, match=r"no document of train can be used \(8 licence_not_allo"):
        make(checkpoint, out, licences=("MIT",))


def test_a_folder_of_another_version_raises_an_error(checkpoint, out):
    make(checkpoint, out)
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps(manifest | {"format": 1}))
    with pytest.raises(UserError, match="written by another version"):
        PreparedFolder(out)


def test_a_large_image_is_cropped_to_the_stored_side(checkpoint, out):
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
