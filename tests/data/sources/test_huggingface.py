"""Datasets that Hugging Face's library wrote; the tests need no network."""

import json
import os
import pickle

import datasets
import numpy as np
import pytest

from leon_jax.config import UserError
from leon_jax.data.sources.open import open_source
from leon_jax.data.sources.raw_record import RawRecord, Reject, SourceConfig
from tests.data.hostile_images import good


def read(path, **config):
    source = open_source(SourceConfig("huggingface", str(path), **config))
    return [outcome for shard in source.shards() for outcome in source.read(shard)]


def table(**columns):
    """A dataset of three rows with a column of images, and the encoded images."""
    rng = np.random.default_rng(0)
    images = [good(rng) for _ in range(3)]
    cells = [{"bytes": data, "path": None} for data in images]
    rows = datasets.Dataset.from_dict({"image": cells, **columns})
    return rows.cast_column("image", datasets.Image()), images


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path_factory):
    """Disables the network, and caches tables in a temporary folder."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(
        datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "cache")
    )


def test_a_saved_dataset_is_read(tmp_path):
    texts = ["eine Katze 🐈", "two", ""]
    rows, images = table(text=texts, license=["CC0-1.0", None, "MIT"], width=[1, 2, 3])
    rows.save_to_disk(tmp_path / "cats")
    assert read(tmp_path / "cats") == [
        RawRecord(f"train/{n}", (texts[n], images[n]), licence=("CC0-1.0", "", "MIT")[n])
        for n in range(3)
    ]


def test_encoded_images_are_not_decoded(tmp_path):
    rows, _ = table(text=["a", "b", "c"])
    broken = [{"bytes": b"no picture", "path": None}] * 3
    rows = rows.remove_columns("image").add_column("image", broken)
    rows.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "cats")
    assert [raw.parts[1] for raw in read(tmp_path / "cats")] == [b"no picture"] * 3


def test_a_split_is_read_by_its_name(tmp_path):
    rows, _ = table(text=["a", "b", "c"])
    both = datasets.DatasetDict(train=rows.select([0, 1]), validation=rows.select([2]))
    both.save_to_disk(tmp_path / "cats")
    assert [raw.parts[0] for raw in read(tmp_path / "cats")] == ["a", "b"]
    [held_out] = read(tmp_path / "cats", split="held_out", read_split="validation")
    assert (held_out.key, held_out.parts[0]) == ("validation/0", "c")
    with pytest.raises(UserError, match="has no split 'test'; it has train, validation"):
        read(tmp_path / "cats", split="test")


def test_several_captions_of_an_image_form_a_group(tmp_path):
    rows, images = table(captions=[["a", None], [], ["c"]])
    rows.save_to_disk(tmp_path / "cats")
    assert read(tmp_path / "cats") == [
        RawRecord("train/0#1", ("a", images[0]), group="train/0"),
        Reject("train/0#2", "missing_field", "captions is missing"),
        Reject("train/1", "no_text", "captions is an empty list"),
        RawRecord("train/2", ("c", images[2])),
    ]


def test_the_configuration_names_other_columns(tmp_path):
    rows, _ = table(text=["a"] * 3, titel=["x", "y", "z"], other=invalid_images())
    rows.save_to_disk(tmp_path / "cats")
    parts = [raw.parts for raw in read(tmp_path / "cats", text="titel", picture="other")]
    assert parts == [("x", b"0"), ("y", b"1"), ("z", b"2")]
    with pytest.raises(UserError, match="no column title; the columns are image, text, titel"):
        read(tmp_path / "cats", text="title")


def invalid_images():
    return [{"bytes": b"%d" % n, "path": ""} for n in range(3)]


def test_a_dataset_without_a_column_of_images_raises_an_error(tmp_path):
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "cats")
    with pytest.raises(
        UserError, match=r"no column holds the image; the columns are text; .*--image_field=NAME"
    ):
        read(tmp_path / "cats")


def test_a_folder_of_images_with_metadata_is_read(tmp_path):
    folder = tmp_path / "cats"
    (folder / "more").mkdir(parents=True)
    rng = np.random.default_rng(0)
    images = {f"more/{n}.png": good(rng) for n in range(3)}
    lines = []
    for name, data in images.items():
        (folder / name).write_bytes(data)
        lines.append(json.dumps({"file_name": name, "text": f"text {name}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    outcomes = read(folder)
    assert {raw.parts for raw in outcomes} == {
        (f"text {name}", data) for name, data in images.items()
    }


def test_no_file_outside_of_the_folder_is_read(tmp_path):
    (tmp_path / "secret.png").write_bytes(b"secret")
    outside = [str(tmp_path / "secret.png"), "../secret.png", "nothing.png"]
    cells = [{"bytes": None, "path": path} for path in outside]
    # Without the feature type Image, the library does not read the files when it saves.
    rows = datasets.Dataset.from_dict({"text": ["a"] * 3, "cell": cells})
    rows.save_to_disk(tmp_path / "cats")
    reasons = [outcome.reason for outcome in read(tmp_path / "cats", picture="cell")]
    assert reasons == ["unsafe_name", "unsafe_name", "missing_picture"]


def test_damaged_rows_are_rejected_and_others_are_read(tmp_path):
    """The damage is an offset far behind the end of a table, and a text that is not UTF-8."""
    rows, _ = table(text=["abc", "katze", "ghi"])
    rows.save_to_disk(tmp_path / "cats")
    [file] = (tmp_path / "cats").glob("*.arrow")
    data = file.read_bytes()
    offsets = np.array([0, 3, 8, 11], "<i4").tobytes()
    for old, new, reasons in (
        (b"katze", b"\xffatze", [None, "unreadable_record", None]),
        (
            offsets,
            np.array([0, 3, 2**30, 11], "<i4").tobytes(),
            [None, "unreadable_record", "unreadable_record"],
        ),
    ):
        assert data.count(old) == 1
        file.write_bytes(data.replace(old, new))
        outcomes = read(tmp_path / "cats")
        assert [getattr(outcome, "reason", None) for outcome in outcomes] == reasons


def test_a_pickled_source_reads_the_same_records(tmp_path):
    rows, _ = table(text=["a", "b", "c"])
    rows.save_to_disk(tmp_path / "cats")
    source = open_source(SourceConfig("huggingface", str(tmp_path / "cats"), shard_size=2))
    again = pickle.loads(pickle.dumps(source))
    assert again.shards() == source.shards() == ["train/0", "train/2"]
    for shard in source.shards():
        assert list(again.read(shard)) == list(source.read(shard))
    before = source.version("train/0")
    [file] = (tmp_path / "cats").glob("*.arrow")
    os.utime(file, (1, 1))
    assert source.version("train/0") != before


@pytest.mark.parametrize("path", ["no_one/has_this", "no_one_has_this"])
def test_an_unknown_name_raises_an_error(path):
    with pytest.raises(UserError, match=rf"the split 'train' of the dataset {path} cannot be lo"):
        read(path)
