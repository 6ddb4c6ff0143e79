"""Parquet tables as img2dataset writes them."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from leon_jax.config import UserError
from leon_jax.data.sources.open import open_source
from leon_jax.data.sources.raw_record import RawRecord, Reject, SourceConfig
from tests.data.hostile_images import good


def read(path, **config):
    source = open_source(SourceConfig("parquet", str(path), **config))
    return [outcome for shard in source.shards() for outcome in source.read(shard)]


# The columns and types of img2dataset (ParquetSampleWriter).
SCHEMA = pa.schema(
    [
        ("caption", pa.string()), ("url", pa.string()), ("key", pa.string()),
        ("status", pa.string()), ("error_message", pa.string()), ("width", pa.int32()),
        ("height", pa.int32()), ("original_width", pa.int32()), ("original_height", pa.int32()),
        ("exif", pa.string()), ("sha256", pa.string()), ("license", pa.string()),
        ("jpg", pa.binary()),
    ]
)  # fmt: skip


def row(n, **fields):
    return {
        "caption": f"Katze 🐈 {n}", "url": f"https://example.org/{n}", "key": f"{n:09}",
        "status": "success", "error_message": None, "width": 64, "height": 64,
        "original_width": 64, "original_height": 64, "exif": "{}", "sha256": "00",
        "license": "CC-BY-4.0", "jpg": good(np.random.default_rng(n)), **fields,
    }  # fmt: skip


def raw(record, key=None):
    return RawRecord(
        key or record["key"], (record["caption"], record["jpg"]),
        licence=record["license"] or "", attribution=record["url"],
    )  # fmt: skip


@pytest.mark.parametrize("compression", ["snappy", "zstd", "none"])
@pytest.mark.parametrize("page", ["1.0", "2.0"])
def test_files_of_img2dataset_are_read(page, compression, tmp_path):
    rows = [row(n) for n in range(250)]
    for name, part in (("00001", rows[100:]), ("00000", rows[:100])):
        pq.write_table(
            pa.Table.from_pylist(part, SCHEMA), tmp_path / f"{name}.parquet", row_group_size=40,
            compression=compression, data_page_version=page,
        )  # fmt: skip
    assert read(tmp_path) == [raw(record) for record in rows]


def test_rows_whose_image_was_not_downloaded_are_rejected(tmp_path):
    rows = [
        row(0),
        row(1, status="failed_to_download", error_message="HTTP Error 404", jpg=None),
        row(2, status=None),
    ]
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), tmp_path / "a.parquet")
    assert read(tmp_path) == [
        raw(rows[0]),
        Reject("000000001", "missing_picture", "its status is failed_to_download: HTTP Error 404"),
        raw(rows[2]),
    ]


def test_a_text_and_an_image_column_are_enough(tmp_path):
    pq.write_table(pa.table({"text": ["a cat"], "png": [b"png"]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [RawRecord("a.parquet:1", ("a cat", b"png"))]


def test_the_configuration_names_other_columns(tmp_path):
    columns = {"caption": ["no"], "alt": ["yes"], "jpg": [b"no"], "thumbnail": [b"yes"]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    [record] = read(tmp_path, text="alt", picture="thumbnail")
    assert record.parts == ("yes", b"yes")


def test_paths_of_images_and_several_captions_are_read(tmp_path):
    (tmp_path / "a.png").write_bytes(b"png")
    cells = [{"bytes": None, "path": "a.png"}, {"bytes": b"cell", "path": "none"}]
    pq.write_table(pa.table({"text": [["x", "y"], ["z"]], "image": cells}), tmp_path / "a.parquet")
    names = {"TEXT": ["a", "b"], "file_name": ["a.png", "../a.png"]}
    pq.write_table(pa.table(names), tmp_path / "b.parquet")
    *records, reject = read(tmp_path)
    assert records == [
        RawRecord("a.parquet:1#1", ("x", b"png"), group="a.parquet:1"),
        RawRecord("a.parquet:1#2", ("y", b"png"), group="a.parquet:1"),
        RawRecord("a.parquet:2", ("z", b"cell")),
        RawRecord("b.parquet:1", ("a", b"png")),
    ]
    assert (reject.key, reject.reason) == ("b.parquet:2", "unsafe_name")


def test_a_missing_column_gives_a_reject_that_lists_the_columns(tmp_path):
    pq.write_table(pa.table({"alt": ["a"], "jpg": [b"a"]}), tmp_path / "a.parquet")
    [outcome] = read(tmp_path)
    assert outcome == Reject(
        "a.parquet",
        "unreadable_shard",
        "no column holds the text; the columns are alt, jpg; choose one with --text_field=NAME "
        "(text of the source), or use caption, captions",
    )


def test_a_folder_without_tables_raises_an_error(tmp_path):
    with pytest.raises(UserError, match=r"has no file ending in \.parquet"):
        read(tmp_path)
