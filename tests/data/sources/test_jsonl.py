"""JSON lines: three forms of records, and shards of lines."""

import json
import tracemalloc

import pytest

from leon_jax.config import UserError
from leon_jax.data.sources.open import open_source
from leon_jax.data.sources.raw_record import MAX_TEXT_BYTES, RawRecord, Reject, SourceConfig


def read(path, **config):
    source = open_source(SourceConfig("jsonl", str(path), **config))
    return [outcome for shard in source.shards() for outcome in source.read(shard)]


@pytest.fixture
def folder(tmp_path):
    """A folder with three files in place of images; sources do not decode them."""
    (tmp_path / "more").mkdir()
    for name in ("a.png", "b.png", "more/c.png"):
        (tmp_path / name).write_bytes(f"picture {name}".encode())
    return tmp_path


def write(folder, *records):
    (folder / "cats.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


class TestForms:
    def test_a_caption_comes_before_its_image(self, folder):
        write(folder, {"image": "more/c.png", "text": "a grey cat"})
        assert read(folder) == [RawRecord("cats.jsonl:1", ("a grey cat", b"picture more/c.png"))]

    def test_interleaved_parts_keep_their_order(self, folder):
        parts = [{"text": "one"}, {"image": "a.png"}, {"image": "b.png"}, {"text": "two"}]
        write(folder, {"parts": parts})
        expected = ("one", b"picture a.png", b"picture b.png", "two")
        assert read(folder) == [RawRecord("cats.jsonl:1", expected)]

    def test_an_editing_pair_is_image_instruction_image(self, folder):
        write(folder, {"source": "a.png", "instruction": "make it night", "target": "b.png"})
        expected = (b"picture a.png", "make it night", b"picture b.png")
        assert read(folder) == [RawRecord("cats.jsonl:1", expected)]

    def test_metadata_of_a_record_is_read(self, folder):
        metadata = {
            "key": "cat/1",
            "licence": "CC-BY-4.0",
            "attribution": "A. Person",
            "language": "de",
            "source": "my camera",
            "group": "cats",
        }
        write(folder, {"image": "a.png", "text": "Katze", **metadata})
        metadata["origin"] = metadata.pop("source")
        assert read(folder) == [RawRecord(parts=("Katze", b"picture a.png"), **metadata)]

    @pytest.mark.parametrize(
        ("record", "attribute", "value"),
        [
            ({"key": 17}, "key", "17"),
            ({"key": ""}, "key", "cats.jsonl:1"),
            ({"group": 4}, "group", "4"),
            ({"license": "MIT"}, "licence", "MIT"),
            ({"licence": None, "license": "MIT"}, "licence", "MIT"),
            ({"url": "https://example.org"}, "attribution", "https://example.org"),
            ({"url": "https://example.org", "attribution": "A"}, "attribution", "A"),
            ({"language": None}, "language", ""),
        ],
    )
    def test_metadata_has_alternative_names_and_defaults(self, folder, record, attribute, value):
        write(folder, {"image": "a.png", "text": "a", **record})
        [raw] = read(folder)
        assert getattr(raw, attribute) == value

    def test_the_configured_attribution_takes_precedence_over_a_url(self, folder):
        write(folder, {"image": "a.png", "text": "a", "url": "https://example.org"})
        assert read(folder, attribution="A. Person")[0].attribution == ""

    def test_the_configuration_names_other_fields(self, folder):
        write(folder, {"file_name": "a.png", "title": "a cat"})
        raw = read(folder, text="title", picture="file_name")[0]
        assert raw.parts == ("a cat", b"picture a.png")

    def test_a_reject_has_the_key_of_its_record(self, folder):
        write(folder, {"key": "cat/1", "image": "a.png"})
        [reject] = read(folder)
        assert (reject.key, reject.reason) == ("cat/1", "missing_field")

    def test_the_usual_names_of_fields_are_read(self, folder):
        write(
            folder, {"file_name": "a.png", "caption": "a cat"}, {"path": "a.png", "TEXT": "a cat"},
            {"img": "a.png", "title": "a cat"}, {"image_path": "a.png", "description": "a cat"},
            {"image": "a.png", "file_name": "none.png", "text": "a cat", "caption": "no"},
            {"image": None, "file_name": "a.png", "text": None, "caption": "a cat"},
        )  # fmt: skip
        assert [raw.parts for raw in read(folder)] == [("a cat", b"picture a.png")] * 6

    def test_a_record_without_a_usual_name_names_its_fields_and_the_setting(self, folder):
        write(folder, {"image": "a.png", "label": "a cat"}, {"photo": "a.png", "text": "a cat"})
        first, second = read(folder)
        assert first.detail == (
            "no field holds the text; the fields are image, label; choose one with "
            "--text_field=NAME (text of the source), or use text, caption"
        )
        assert "the fields are photo, text; choose one with --image_field=NAME" in second.detail

    def test_several_captions_of_an_image_form_a_group(self, folder):
        write(
            folder, {"image": "a.png", "captions": ["one", 2, "three"]},
            {"key": "cat", "image": "b.png", "text": ["a", "b"], "group": "cats"},
            {"image": "b.png", "text": ["only"]},
        )  # fmt: skip
        group, image = "cats.jsonl:1", b"picture a.png"
        assert read(folder) == [
            RawRecord("cats.jsonl:1#1", ("one", image), group=group),
            Reject("cats.jsonl:1#2", "unreadable_record", "captions is a int, not a text"),
            RawRecord("cats.jsonl:1#3", ("three", image), group=group),
            RawRecord("cat#1", ("a", b"picture b.png"), group="cats"),
            RawRecord("cat#2", ("b", b"picture b.png"), group="cats"),
            RawRecord("cats.jsonl:3", ("only", b"picture b.png")),
        ]

    def test_the_title_of_a_drawing_is_the_caption_if_nothing_else_gives_one(self, folder):
        drawing = b'<svg xmlns="http://www.w3.org/2000/svg"><title>a drawn cat</title></svg>'
        (folder / "a.svg").write_bytes(drawing)
        write(folder, {"image": "a.svg"}, {"image": "a.svg", "text": "a cat"})
        assert [raw.parts[0] for raw in read(folder)] == ["a drawn cat", "a cat"]


class TestShards:
    # Blank lines, both line endings, multi-byte characters, no newline after the last line.
    LINES = (b'{"parts": [{"text": "\xc3\xa4 %d"}]}\n', b'{"parts": [{"text": "%d"}]}\r\n', b"\n")

    @pytest.mark.parametrize("size", [1, 2, 3, 7, 20, 1000])
    def test_shards_of_any_size_hold_the_same_records(self, size, tmp_path):
        text = b"".join(self.LINES[n % 3].replace(b"%d", b"%d" % n) for n in range(20))
        (tmp_path / "a.jsonl").write_bytes(text + b'{"parts": [{"text": "last"}]}')
        expected = [
            RawRecord(f"a.jsonl:{number}", (json.loads(line)["parts"][0]["text"],))
            for number, line in enumerate(text.decode().splitlines(), start=1)
            if line.strip()
        ]
        expected.append(RawRecord("a.jsonl:21", ("last",)))
        assert read(tmp_path, shard_size=size) == expected
        source = open_source(SourceConfig("jsonl", str(tmp_path), shard_size=size))
        assert len(source.shards()) == -(-21 // size)

    @pytest.mark.parametrize(
        ("lines", "size", "expected"),
        [(256, 10_000, [256]), (600, 10_000, [256, 256, 88]), (600, 300, [256, 256, 88]),
         (40_000, 10_000, [768] * 52 + [64]), (600, 100, [100] * 6)],
    )  # fmt: skip
    def test_a_small_file_has_shards_too(self, lines, size, expected, tmp_path):
        (tmp_path / "a.jsonl").write_text('{"parts": [{"text": "a"}]}\n' * lines)
        source = open_source(SourceConfig("jsonl", str(tmp_path), shard_size=size))
        assert [sum(1 for _ in source.read(shard)) for shard in source.shards()] == expected

    def test_lines_may_cross_the_blocks_that_are_read(self, tmp_path, monkeypatch):
        monkeypatch.setattr("leon_jax.data.sources.jsonl._BLOCK", 7)
        lines = [json.dumps({"parts": [{"text": "x" * n}]}) for n in range(50)]
        (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
        source = open_source(SourceConfig("jsonl", str(tmp_path), shard_size=8))
        read = [[raw.parts[0] for raw in source.read(shard)] for shard in source.shards()]
        assert read == [["x" * n for n in range(at, min(at + 8, 50))] for at in range(0, 50, 8)]

    def test_a_line_that_is_too_long_is_not_read_into_memory(self, tmp_path):
        with open(tmp_path / "a.jsonl", "wb") as file:
            file.write(b'{"parts": [{"text": "a"}]}\n')
            file.truncate(64 * 2**20)
            file.seek(0, 2)
            file.write(b'\n{"parts": [{"text": "b"}]}\n')
        tracemalloc.start()
        outcomes = read(tmp_path)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert [getattr(outcome, "reason", "") for outcome in outcomes] == [
            "", "record_too_large", "",
        ]  # fmt: skip
        assert outcomes[2].key == "a.jsonl:3"
        assert peak < 16 * 2**20

    @pytest.mark.parametrize(("extra", "fits"), [(0, True), (1, False)])
    def test_a_line_of_the_maximum_length_is_read(self, extra, fits, tmp_path):
        line = b'{"parts": [{"text": "a"}]}'
        line += b" " * (MAX_TEXT_BYTES - len(line) + extra)
        (tmp_path / "a.jsonl").write_bytes(line + b"\n" + line)
        assert [isinstance(outcome, RawRecord) for outcome in read(tmp_path)] == [fits, fits]


class TestPaths:
    def test_files_are_read_in_the_order_of_their_names(self, folder):
        for name in ("b.jsonl", "a.jsonl"):
            (folder / name).write_text('{"image": "a.png", "text": "x"}\n')
        (folder / "c.json").write_text("{}")
        assert [raw.key for raw in read(folder)] == ["a.jsonl:1", "b.jsonl:1"]

    @pytest.mark.parametrize("pattern", ["?.jsonl", "*", "{0..2}.jsonl", "{0..1}.jsonl"])
    def test_patterns_match_files(self, pattern, folder):
        for name in range(3):
            (folder / f"{name}.jsonl").write_text('{"image": "a.png", "text": "x"}\n')
        for path in folder.glob("*.png"):
            path.rename(folder / "more" / path.name)
        keys = [outcome.key for outcome in read(folder / pattern)]
        assert keys == [f"{n}.jsonl:1" for n in range(2 if "1}" in pattern else 3)]

    def test_image_paths_are_relative_to_the_file_that_names_them(self, folder):
        (folder / "more" / "x.jsonl").write_text('{"image": "c.png", "text": "x"}\n')
        [raw] = read(folder / "*" / "x.jsonl")
        assert (raw.key, raw.parts[1]) == ("more/x.jsonl:1", b"picture more/c.png")

    @pytest.mark.parametrize(
        ("path", "message"),
        [
            ("nothing", "there is no file or folder .*nothing"),
            ("more", r"the folder .*more has no file ending in .jsonl"),
            ("*.jsonl", r"there is no file .*\*.jsonl"),
            ("{8..9}.jsonl", "there is no file .*8.jsonl"),
            ("{9..8}.jsonl", "the range {9..8} in .* is empty"),
        ],
    )
    def test_missing_files_raise_an_error(self, path, message, folder):
        with pytest.raises(UserError, match=message):
            read(folder / path)

    def test_the_version_changes_with_the_file(self, folder):
        write(folder, {"image": "a.png", "text": "a"})
        source = open_source(SourceConfig("jsonl", str(folder)))
        [shard] = source.shards()
        before = source.version(shard)
        assert source.version(shard) == before
        write(folder, {"image": "a.png", "text": "another"})
        assert source.version(shard) != before
