"""Folders of images with captions beside them."""

import json
import pickle

import pytest

from leon_jax.config import UserError
from leon_jax.data.sources.image_folder import words_of
from leon_jax.data.sources.open import open_source
from leon_jax.data.sources.raw_record import RawRecord, Reject, SourceConfig

DRAWING = b"<svg><title>a drawing</title></svg>"


def read(path, **config):
    source = open_source(SourceConfig("folder", str(path), **config))
    return [outcome for shard in source.shards() for outcome in source.read(shard)]


def write(folder, **files):
    """Writes files by name; `__` in a name stands for a dot, and `_of_` for a slash."""
    for name, content in files.items():
        path = folder / name.replace("_of_", "/").replace("__", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


class TestCaptions:
    def test_a_text_file_of_the_same_name_is_the_caption(self, tmp_path):
        write(
            tmp_path, a__jpg=b"1", a__txt="\ufeffa cat\n", more_of_b__PNG=b"2", more_of_b__txt="Ä",
            c__jpg=b"3", c__jpg__txt="c", d__webp=b"4", d__caption="d", README__txt="no",
        )  # fmt: skip
        assert read(tmp_path) == [
            RawRecord("a.jpg", ("a cat", b"1")),
            RawRecord("c.jpg", ("c", b"3")),
            RawRecord("d.webp", ("d", b"4")),
            RawRecord("more/b.PNG", ("Ä", b"2")),
        ]

    def test_metadata_jsonl_describes_images_below_its_folder(self, tmp_path):
        rows = lines(
            {"file_name": "a.jpg", "text": "a", "license": "MIT", "key": "first"},
            {"file_name": "./b/c.jpg", "caption": ["c", "d"]},
            {"file_name": "e.jpg", "width": 3},
        )
        write(
            tmp_path, train_of_metadata__jsonl=rows, train_of_a__jpg=b"1", train_of_a__txt="no",
            train_of_b_of_c__jpg=b"2", train_of_e__jpg=b"3", train_of_e__txt="e",
        )  # fmt: skip
        assert read(tmp_path) == [
            RawRecord("first", ("a", b"1"), licence="MIT"),
            RawRecord("train/b/c.jpg#1", ("c", b"2"), group="train/b/c.jpg"),
            RawRecord("train/b/c.jpg#2", ("d", b"2"), group="train/b/c.jpg"),
            RawRecord("train/e.jpg", ("e", b"3")),
        ]

    def test_metadata_csv_may_have_a_row_for_each_caption(self, tmp_path):
        rows = (
            '\ufefffile_name,caption,licence\r\na.jpg,"one, ""quoted""\nline",MIT\r\na.jpg,two,\r\n'
        )
        write(tmp_path, metadata__csv=rows, a__jpg=b"1")
        assert read(tmp_path) == [
            RawRecord("a.jpg#1", ('one, "quoted"\nline', b"1"), licence="MIT", group="a.jpg"),
            RawRecord("a.jpg#2", ("two", b"1"), group="a.jpg"),
        ]

    def test_the_title_of_a_drawing_is_its_caption(self, tmp_path):
        write(tmp_path, a__svg=DRAWING, b__svg=DRAWING, b__txt="b")
        assert [raw.parts[0] for raw in read(tmp_path, caption_from_name=True)] == [
            "a drawing", "b",
        ]  # fmt: skip

    def test_the_name_is_the_caption_if_it_is_asked_for(self, tmp_path):
        write(tmp_path, **{"grey-cat_012__jpg": b"1", "dog__jpg": b"2", "dog__txt": "a dog",
                           "0123__jpg": b"3"})  # fmt: skip
        number, dog, cat = read(tmp_path, caption_from_name=True)
        assert (dog.parts[0], cat.parts[0]) == ("a dog", "grey cat")
        assert number == Reject(
            "0123.jpg", "missing_field", "it has no caption, and its name '0123' has no words"
        )

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("cats/grey-cat_012.jpg", "grey cat"), ("IMG_1234.jpg", "IMG"), ("17.png", ""),
            ("two  cats (3).jpg", "two cats"), ("Ärger_über-Katzen.jpg", "Ärger über Katzen"),
            ("a.b.jpg", "a.b"), ("boeing_747-400.jpg", "boeing 747"), ("x2.jpg", "x2"),
        ],
    )  # fmt: skip
    def test_words_of_a_name(self, name, words):
        assert words_of(name) == words

    def test_an_image_without_a_caption_is_rejected_with_what_would_be_right(self, tmp_path):
        write(
            tmp_path, a__jpg=b"1", b_of_metadata__csv="file_name,label\nb.jpg,3\n",
            b_of_b__jpg=b"2", c__jpg=b"3", c__txt=" \n",
        )  # fmt: skip
        first, described, empty = read(tmp_path)
        assert first.reason == "missing_field"
        assert "put it into a.txt beside the image or into metadata.jsonl" in first.detail
        assert "(--caption_from_name)" in first.detail
        assert "in b/metadata.csv no field holds the text; the fields are file_name, label" in (
            described.detail
        )
        assert empty.reason == "missing_field"


class TestTree:
    def test_names_in_unicode_hidden_files_and_other_files(self, tmp_path):
        names = ["Ä ñ.jpg", "cafe\u0301.png", "猫.webp", "$(rm -rf) ;'.gif", "line\nbreak.jpg"]
        for name in (*names, ".hidden.jpg", ".git/a.jpg", "__MACOSX/a.jpg", "notes.md", "a.tar"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(b"x")
        rows = ({"file_name": "Ä ñ.jpg", "text": "Ä"}, {"file_name": "caf\u00e9.png", "text": "é"})
        (tmp_path / "metadata.jsonl").write_text(lines(*rows))
        outcomes = read(tmp_path)
        assert [outcome.key for outcome in outcomes] == sorted(names)
        texts = {raw.parts[0] for raw in outcomes if isinstance(raw, RawRecord)}
        assert texts == {"Ä", "é"}

    def test_links_do_not_loop_and_lead_nowhere_else(self, tmp_path):
        inside = write(tmp_path / "in", a__jpg=b"1", a__txt="a")
        write(tmp_path / "out", b__jpg=b"2", b__txt="b")
        (inside / "loop").symlink_to("..")
        (inside / "self").symlink_to(inside)
        (inside / "b.jpg").symlink_to("../out/b.jpg")
        (inside / "c.jpg").symlink_to("c.jpg")
        (inside / "d.jpg").symlink_to("a.jpg")
        (inside / "d.txt").symlink_to("../out/b.txt")
        outcomes = read(inside)
        assert outcomes[0] == RawRecord("a.jpg", ("a", b"1"))
        assert {outcome.key: outcome.reason for outcome in outcomes[1:]} == {
            "b.jpg": "unsafe_name", "c.jpg": "missing_picture", "d.jpg": "unsafe_name",
            "loop": "unsafe_name", "self": "unsafe_name",
        }  # fmt: skip

    def test_rows_that_name_no_image_below_the_folder_are_counted(self, tmp_path):
        rows = lines(
            {"file_name": "none.jpg", "text": "a"}, {"file_name": "../a.jpg", "text": "a"},
            {"file_name": "/etc/hostname", "text": "a"}, {"text": "a"}, {"file_name": 3},
            {"file_name": "\udfff.jpg", "text": "a"}, {"file_name": "x\0.jpg", "text": "a"},
        )  # fmt: skip
        write(tmp_path, metadata__jsonl=rows + "{\n" + "x" * 2**20 + "\n", a__jpg=b"1", a__txt="a")
        outcomes = read(tmp_path)
        reasons = {o.key: o.reason for o in outcomes if isinstance(o, Reject)}
        assert reasons == {
            "none.jpg": "missing_picture", "../a.jpg": "unsafe_name",
            "/etc/hostname": "unsafe_name", "metadata.jsonl:4": "missing_field",
            "metadata.jsonl:5": "missing_field", "\\udfff.jpg": "not_utf8",
            "x\0.jpg": "unsafe_name", "metadata.jsonl:8": "unreadable_record",
            "metadata.jsonl:9": "unreadable_record",
        }  # fmt: skip
        assert len(outcomes) == 10

    def test_missing_and_empty_folders_raise_an_error(self, tmp_path):
        with pytest.raises(UserError, match=r"there is no folder .*nothing"):
            read(tmp_path / "nothing")
        with pytest.raises(UserError, match=r"the folder .* has no image \(png, jpg"):
            read(tmp_path)
        write(tmp_path, a__jpg=b"1", b_of_metadata__csv="name;text\na;b\n")
        with pytest.raises(UserError, match=r"a\.jpg is a file; folder:PATH takes a folder"):
            read(tmp_path / "a.jpg")
        with pytest.raises(
            UserError, match=r"metadata\.csv has no column file_name; its .*name;te"
        ):
            read(tmp_path)
        write(tmp_path, b_of_metadata__csv=b"file_name,text\na.jpg,\xff\n")
        with pytest.raises(UserError, match=r"metadata\.csv is not a CSV file in UTF-8"):
            read(tmp_path)


class TestShards:
    def test_shards_of_any_size_and_a_pickled_source_have_the_same_records(self, tmp_path):
        for number in range(20):
            write(tmp_path, **{f"{number:02}__jpg": b"x", f"{number:02}__txt": str(number)})
        whole = read(tmp_path)
        assert [raw.key for raw in whole] == [f"{n:02}.jpg" for n in range(20)]
        assert read(tmp_path, shard_size=3) == whole
        source = open_source(SourceConfig("folder", str(tmp_path), shard_size=7))
        assert source.shards() == ["images:1", "images:8", "images:15"]
        again = pickle.loads(pickle.dumps(source))
        assert list(again.read("images:8")) == list(source.read("images:8")) == whole[7:14]

    def test_the_version_changes_with_images_captions_and_metadata(self, tmp_path):
        write(tmp_path, a__jpg=b"1", a__txt="a", b__jpg=b"2", b__txt="b")

        def versions():
            source = open_source(SourceConfig("folder", str(tmp_path), shard_size=1))
            return [source.version(shard) for shard in source.shards()]

        first = versions()
        assert versions() == first
        write(tmp_path, a__txt="another")
        second = versions()
        assert second[0] != first[0] and second[1] == first[1]
        write(tmp_path, metadata__jsonl=lines({"file_name": "b.jpg", "text": "b"}))
        assert versions()[1] != second[1]
