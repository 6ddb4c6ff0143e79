"""Preparing from and to a bucket gives the folder that preparing on a disk gives."""

import io
import json
import os
import pathlib
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from leon_jax import storage
from leon_jax.config import UserError
from leon_jax.data.document_folder import DocumentFolder
from leon_jax.data.records import to_png
from leon_jax.data.sources.raw_record import SourceConfig
from leon_jax.prepare import prepare as preparing
from leon_jax.prepare.beam_runner import on_beam
from leon_jax.prepare.config import PrepareConfig
from leon_jax.prepare.encode import EncodeConfig, encode
from leon_jax.retrieval.prepared_folder import PreparedFolder
from tests import tiny
from tests.prepare.folders import files_of, make


def names_of(folder: pathlib.Path) -> list[str]:
    return sorted(storage._objects(str(folder)))


@pytest.mark.parametrize("run", [None, on_beam("DirectRunner")], ids=["here", "beam"])
def test_a_folder_in_a_bucket_has_the_bytes_of_one_on_a_disk(bucket, tmp_path, run):
    model = tiny.folders()[0]
    make(model, tmp_path / "disk")
    manifest = make(model, bucket / "prepared", run=run)
    copy = storage.local(bucket / "prepared")
    assert files_of(copy) == files_of(tmp_path / "disk")
    assert [path.name for path in bucket.iterdir()] == ["prepared"]
    assert not list((tmp_path / "cache" / "preparing").glob("*/.prepared.preparing"))
    assert make(model, bucket / "prepared", run=fail) == manifest
    prepared = PreparedFolder(bucket / "prepared")
    assert len(prepared.records("train")) == len(prepared.vector_index())


def fail(*arguments):
    raise AssertionError("the folder is up to date")


def test_a_run_that_was_killed_continues_on_another_machine(bucket, tmp_path, monkeypatch):
    model, done = tiny.folders()[0], []

    def interrupted(config, sources, folder, shards):
        worker = preparing.Worker(config, sources, folder)
        for shard in shards[:2]:
            worker(shard)
            done.append(shard.name)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(model, bucket / "prepared", run=interrupted)
    assert not (bucket / "prepared").exists()
    monkeypatch.setenv("LEON_CACHE", str(tmp_path / "other_machine"))

    def remaining(config, sources, folder, shards):
        assert set(done).isdisjoint(shard.name for shard in shards)
        preparing.in_process(False)(config, sources, folder, shards)

    make(model, bucket / "prepared", run=remaining)
    make(model, tmp_path / "disk")
    assert files_of(storage.local(bucket / "prepared")) == files_of(tmp_path / "disk")


def test_documents_in_a_bucket_are_encoded_there(bucket, tmp_path):
    model = tiny.folders()[0]
    settings = EncodeConfig(
        tokenizer=str(model / "tokenizer.safetensors"),
        encoder=str(model / "encoder.safetensors"),
        text=str(model / "text.json"),
    )
    folders = []
    for parent in (tmp_path / "disk", bucket):
        documents = parent / "documents"
        config, sources = tiny.preparation(
            model, {"train": tiny.documents()}, tokenizer="", encoder="", text=""
        )
        preparing.prepare(config, documents, sources=sources, progress=False)
        folder, _ = encode(documents, settings, progress=False)
        folders.append(folder)
    assert os.fspath(folders[1]).startswith(f"{bucket}/documents/encoded/")
    disk, copy = (PreparedFolder(storage.path(folder.parents[1])) for folder in folders)
    assert copy.address == folders[1]
    for row in range(len(disk.records("train"))):
        one, other = disk.records("train")[row], copy.records("train")[row]
        assert one.text == other.text and one.provenance == other.provenance
        (image,) = one.images if hasattr(one, "images") else [one.parts[1]]
        (same,) = other.images if hasattr(other, "images") else [other.parts[1]]
        assert (image.codes == same.codes).all() and (image.pixels == same.pixels).all()
    assert len(DocumentFolder(bucket / "documents").records("train")) == len(disk.records("train"))


def write_sources(folder: pathlib.Path) -> None:
    """Writes the same pictures as WebDataset, Parquet, JSON lines and an image folder."""
    for name in ("tars", "tables", "lines/pictures", "pictures"):
        (folder / name).mkdir(parents=True)
    rows, lines = [], []
    for number, document in enumerate(tiny.documents()[:4]):
        caption, image = document.parts
        png = to_png(image.pixels)
        rows.append({"caption": caption.text, "jpg": png, "key": str(number)})
        (folder / "lines/pictures" / f"{number}.png").write_bytes(png)
        lines.append({"image": f"pictures/{number}.png", "caption": caption.text})
        (folder / "pictures" / f"{number}.png").write_bytes(png)
        (folder / "pictures" / f"{number}.txt").write_text(caption.text)
        with tarfile.open(folder / "tars" / f"{number // 2:03}.tar", "a") as archive:
            for ending, data in (("png", png), ("txt", caption.text.encode())):
                member = tarfile.TarInfo(f"{number}.{ending}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    for part in (0, 1):
        table = pa.Table.from_pylist(rows[2 * part : 2 * part + 2])
        pq.write_table(table, folder / "tables" / f"{part}.parquet")
    (folder / "lines" / "all.jsonl").write_text("\n".join(map(json.dumps, lines)))


def texts_of(folder: pathlib.Path) -> list[str]:
    records = DocumentFolder(folder).records("train")
    return [records[row].text for row in range(len(records))]


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("webdataset", "tars"),
        ("webdataset", "tars/{000..001}.tar"),
        ("parquet", "tables/*.parquet"),
        ("jsonl", "lines/all.jsonl"),
        ("folder", "pictures"),
    ],
)
def test_sources_are_read_from_a_bucket(bucket, tmp_path, kind, name):
    write_sources(tmp_path / "source")
    storage.upload(tmp_path / "source", bucket / "source", last="lines/all.jsonl")
    texts = []
    for place, run in ((tmp_path, None), (bucket, None), (bucket, on_beam("DirectRunner"))):
        source = SourceConfig(kind, f"{place}/source/{name}", licence="CC0-1.0")
        config = PrepareConfig(sources=(source,), min_side=1, licences=("CC0-1.0",))
        out = tmp_path / f"out{len(texts)}"
        preparing.prepare(config, out, run=run, progress=False)
        texts.append(texts_of(out))
    assert len(texts[0]) == 4
    assert texts[1] == texts[0] and texts[2] == texts[0]


def test_missing_sources_are_named(bucket):
    for kind, name in (("webdataset", "none"), ("parquet", "none/*.parquet"), ("folder", "none")):
        source = SourceConfig(kind, f"{bucket}/{name}", licence="CC0-1.0")
        config = PrepareConfig(sources=(source,))
        with pytest.raises(UserError, match=str(bucket)):
            preparing.prepare(config, bucket / "out", progress=False)
