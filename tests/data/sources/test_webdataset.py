"""WebDataset: tar files of samples, compared with the `webdataset` library."""

import io
import json
import tarfile
import tracemalloc

import numpy as np
import pytest

from leon_jax.config import UserError
from leon_jax.data.sources.open import open_source
from leon_jax.data.sources.raw_record import MAX_IMAGE_BYTES, RawRecord, SourceConfig
from tests.data.hostile_images import good
from tests.data.hostile_tar import member

END = bytes(1024)


def read(path, **config):
    source = open_source(SourceConfig("webdataset", str(path), **config))
    return [outcome for shard in source.shards() for outcome in source.read(shard)]


def archive(path, **files):
    """Writes a tar file of members by name; `__` in a name stands for a dot."""
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name.replace("__", "."))
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


class TestLibrary:
    @pytest.mark.parametrize("ending", ["tar", "tar.gz"])
    @pytest.mark.parametrize("form", ["USTAR_FORMAT", "GNU_FORMAT", "PAX_FORMAT"])
    def test_files_of_its_writer_are_read(self, form, ending, tmp_path):
        import webdataset

        rng = np.random.default_rng(0)
        samples = [
            {
                "__key__": f"{n:09}" if n % 2 else "long/" * 15 + f"{n}",
                "jpg": good(rng),
                "txt": f"Café, Katze 🐈 {n}",
                "json": {"caption": "not this", "key": f"key {n}", "license": "CC-BY-4.0"},
            }
            for n in range(20)
        ]
        path = tmp_path / f"00000.{ending}"
        with webdataset.TarWriter(str(path), format=form, encoder=True) as writer:
            for sample in samples:
                writer.write({**sample, "jpg": sample["jpg"]})
        assert read(tmp_path) == [
            RawRecord(f"key {n}", (sample["txt"], sample["jpg"]), licence="CC-BY-4.0")
            for n, sample in enumerate(samples)
        ]

    def test_its_reader_groups_the_same_members(self, tmp_path):
        """The members include hidden files, dots in names, folders and capitals."""
        from webdataset.tariterators import group_by_keys, tar_file_expander

        names = ["a/1.jpg", "a/1.txt", "b/1.JPG", "b/1.x.y", "b/1.txt", "1.jpg", "1.txt", "1.cls"]
        names += [".2.jpg", "README", "3.x.jpg", "4.jpg", "4.txt"]
        path = archive(tmp_path / "a.tar", **{name: name.encode() for name in names})
        with open(path, "rb") as file:
            peers = list(group_by_keys(tar_file_expander([{"url": "a", "stream": file}])))
        expected = [
            (f"a/{sample['__key__']}", (sample["txt"].decode(), sample["jpg"]))
            for sample in peers
            if {"txt", "jpg"} <= set(sample)
        ]
        assert len(expected) == 4
        raws = [outcome for outcome in read(tmp_path) if isinstance(outcome, RawRecord)]
        assert [(raw.key, raw.parts) for raw in raws] == expected


class TestSamples:
    def test_metadata_of_img2dataset_is_read(self, tmp_path):
        fields = {
            "caption": "a cat", "url": "https://example.org/cat.jpg", "key": "000010005",
            "status": "success", "error_message": None, "width": 96, "height": 96,
            "exif": "{}", "similarity": float("nan"), "LICENSE": "CC0-1.0", "sha256": "00",
        }  # fmt: skip
        archive(
            tmp_path / "00001.tar",
            **{"000010005.jpg": b"jpg", "000010005.json": json.dumps(fields).encode()},
        )
        assert read(tmp_path) == [
            RawRecord(
                "000010005", ("a cat", b"jpg"), licence="CC0-1.0",
                attribution="https://example.org/cat.jpg",
            )
        ]  # fmt: skip

    def test_keys_of_samples_include_the_name_of_the_archive(self, tmp_path):
        for name in ("b.tar", "a.tar"):
            archive(tmp_path / name, a__jpg=b"jpg", a__txt=b"a cat\n")
        assert [(raw.key, raw.parts[0]) for raw in read(tmp_path)] == [
            ("a/a", "a cat"),
            ("b/a", "a cat"),
        ]

    @pytest.mark.parametrize(
        ("config", "parts"),
        [
            ({}, ("short", b"jpg")),
            ({"picture": "png"}, ("short", b"png")),
            ({"picture": "small.png"}, ("short", b"small")),
            ({"text": "long"}, ("a long text", b"jpg")),
            ({"text": "title"}, ("a title", b"jpg")),
        ],
    )
    def test_the_configuration_names_other_extensions_and_fields(self, config, parts, tmp_path):
        path = archive(
            tmp_path / "a.tar", a__jpg=b"jpg", a__png=b"png", a__small__png=b"small",
            a__txt=b"short", a__long=b"a long text", a__json=b'{"title": "a title"}',
        )  # fmt: skip
        assert [raw.parts for raw in read(path, **config)] == [parts]

    def test_a_range_of_archives_is_read(self, tmp_path):
        for number in range(8, 12):
            archive(tmp_path / f"{number:03}.tar", a__jpg=b"jpg", a__txt=b"a")
        keys = [raw.key for raw in read(tmp_path / "{009..011}.tar")]
        assert keys == ["009/a", "010/a", "011/a"]
        with pytest.raises(UserError, match=r"there is no file .*012\.tar"):
            read(tmp_path / "{009..012}.tar")


class TestLimits:
    def test_memory_does_not_grow_with_an_archive(self, tmp_path):
        with open(tmp_path / "a.tar", "wb") as file:
            for n in range(3_000):
                file.write(member(f"{n}.jpg", b"x" * 10_000, pax_headers={f"k{n}": "v" * 500}))
                file.write(member(f"{n}.txt", b"a cat"))
            file.write(END)
        source = open_source(SourceConfig("webdataset", str(tmp_path)))
        tracemalloc.start()
        count = sum(isinstance(outcome, RawRecord) for outcome in source.read("a.tar"))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert count == 3_000
        assert peak < 2**20

    def test_images_of_one_sample_share_a_limit(self, tmp_path):
        half = MAX_IMAGE_BYTES // 2
        with open(tmp_path / "a.tar", "wb") as file:
            for name, size in (("a.jpg", half), ("a.png", half), ("a.gif", 1)):
                file.write(member(name, b"x" * size))
            file.write(member("a.txt", b"a cat") + member("b.jpg", b"jpg") + member("b.txt", b"b"))
            file.write(END)
        first, second = read(tmp_path)
        assert (first.key, first.reason) == ("a/a", "record_too_large")
        assert second == RawRecord("a/b", ("b", b"jpg"))

    def test_a_sample_that_is_cut_off_is_left_out(self, tmp_path):
        """The archive ends within the sample, so its metadata is unknown."""
        whole = member("a.jpg", b"jpg") + member("a.txt", b"a")
        (tmp_path / "a.tar").write_bytes(whole + member("a.json", b'{"license": "CC0-1.0"}')[:600])
        [outcome] = read(tmp_path)
        assert (outcome.key, outcome.reason) == ("a.tar", "unreadable_shard")
