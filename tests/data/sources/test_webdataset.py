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

    def test_a_list_of_captions_and_other_names_in_the_json_are_read(self, tmp_path):
        archive(
            tmp_path / "a.tar", a__jpg=b"jpg", a__json=b'{"captions": ["one", "two"]}',
            b__jpg=b"jpg", b__json=b'{"title": "three"}', c__jpg=b"jpg", c__json=b'{"label": "x"}',
            d__svg=b"<svg><title>four</title></svg>",
        )  # fmt: skip
        one, two, three, reject, four = read(tmp_path)
        assert (one.key, one.group, one.parts) == ("a/a#1", "a/a", ("one", b"jpg"))
        assert (two.key, two.parts[0]) == ("a/a#2", "two")
        assert (three.key, three.parts[0], four.parts[0]) == ("a/b", "three", "four")
        assert "the fields are label; choose one with --text_field=NAME" in reject.detail

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


class TestDots:
    """Names with dots: WebDataset cuts at the first dot, people mean the last."""

    def test_members_with_dots_form_samples_by_the_last_dot(self, tmp_path):
        names = {}
        for key in ("22__01", "22__02", "22__03", "v1__2__3"):
            names |= {f"{key}__png": b"png", f"{key}__txt": key.encode()}
            names[f"{key}__json"] = b'{"license": "CC0-1.0"}'
        outcomes = read(archive(tmp_path / "a.tar", **names))
        assert [(raw.key, raw.parts[0]) for raw in outcomes] == [
            ("a/22.01", "22__01"), ("a/22.02", "22__02"), ("a/22.03", "22__03"),
            ("a/v1.2.3", "v1__2__3"),
        ]  # fmt: skip
        assert {raw.licence for raw in outcomes} == {"CC0-1.0"}

    def test_every_incomplete_sample_with_dots_is_counted(self, tmp_path):
        path = archive(
            tmp_path / "a.tar", **{"22__01__png": b"a", "22__02__png": b"b", "22__02__txt": b"cat",
                                   "22__03__txt": b"c", "23__cls": b"1"},
        )  # fmt: skip
        outcomes = read(path)
        assert sorted(outcome.key for outcome in outcomes) == [
            "a/22.01", "a/22.02", "a/22.03", "a/23",
        ]  # fmt: skip
        details = {o.key: o.detail for o in outcomes if not isinstance(o, RawRecord)}
        assert "(its files end in .png)" in details["a/22.01"]
        assert details["a/22.03"].endswith("(its files end in .txt)")
        assert details["a/23"].endswith("(its files end in .cls)")

    def test_further_files_of_a_sample_are_no_samples(self, tmp_path):
        path = archive(
            tmp_path / "a.tar", a__jpg=b"jpg", a__seg__png=b"mask", a__txt=b"a cat", a__x__y=b"",
            b__big__jpg=b"big", b__big__txt=b"b", b__jpg=b"small", b__txt=b"a dog",
        )  # fmt: skip
        assert [(raw.key, raw.parts) for raw in read(path)] == [
            ("a/a", ("a cat", b"jpg")), ("a/b.big", ("b", b"big")), ("a/b", ("a dog", b"small")),
        ]  # fmt: skip

    def test_two_files_of_one_name_are_told_apart_or_rejected(self, tmp_path):
        members = [("1.a.jpg", b"x"), ("1.a.jpg", b"y"), ("1.a.txt", b"t")]
        with open(tmp_path / "a.tar", "wb") as file:
            file.write(b"".join(member(name, data) for name, data in members) + END)
        [reject] = read(tmp_path)
        assert (reject.key, reject.detail) == ("a/1.a", "it has two files ending in .jpg")

    def test_rejects_that_wait_for_the_end_of_a_group_are_bounded(self, tmp_path, monkeypatch):
        monkeypatch.setattr("leon_jax.data.sources.tar_samples._MAX_HELD", 5)
        path = archive(tmp_path / "a.tar", **{f"v1__{n:02}__jpg": b"x" for n in range(12)})
        assert [reject.key for reject in read(path)] == [f"a/v1.{n:02}" for n in range(12)]


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
