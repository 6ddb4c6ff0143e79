"""Documents as records, and files of records."""

import os
import pickle
import stat

import msgpack
import numpy as np
import pytest
from array_record.python import array_record_module
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from leon_jax.config import UserError
from leon_jax.data import records
from leon_jax.documents import Document, Hole, Image, Provenance, Text

strings = st.text(st.characters(exclude_categories=["Cs"]))
pixels = arrays.arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9), st.just(3)))
codes = arrays.arrays(
    np.int32, st.tuples(st.integers(1, 4), st.integers(1, 4)), elements=st.integers(0, 2**31 - 1)
)
images = st.one_of(
    st.builds(Image, pixels=pixels),
    st.builds(Image, codes=codes),
    st.builds(Image, pixels=pixels, codes=codes),
)
parts = st.one_of(
    st.builds(Text, strings), images, st.builds(Hole, st.sampled_from(["text", "image"]))
)
filled = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
provenances = st.none() | st.builds(
    Provenance, filled, filled, filled, strings, filled, strings, strings, st.lists(filled)
)
documents = st.builds(Document, st.lists(parts, min_size=1, max_size=4), provenances)


def make_documents(count, codes=True):
    rng = np.random.default_rng(0)
    return [
        Document(
            (
                Text(f"document {i}"),
                Image(
                    rng.integers(0, 256, (8, 8, 3), dtype=np.uint8),
                    rng.integers(0, 99, (2, 2)) if codes else None,
                ),
            ),
            Provenance(f"key/{i}", "here", "CC0-1.0", ""),
        )
        for i in range(count)
    ]


@settings(deadline=None)
@given(documents)
def test_a_document_survives_a_round_trip(document):
    assert records.from_bytes(records.to_bytes(document)) == document


def test_pixels_can_be_skipped_if_an_image_has_codes():
    with_codes, without = make_documents(1)[0], make_documents(1, codes=False)[0]
    read = records.from_bytes(records.to_bytes(with_codes), pixels=False)
    assert read.parts[1] == Image(codes=with_codes.parts[1].codes)
    assert records.from_bytes(records.to_bytes(without), pixels=False) == without


def test_a_record_without_captions_has_the_bytes_of_earlier_versions():
    document = Document((Text("a"),), Provenance("k", "s", "CC0-1.0", "", "en", "g"))
    names = ("key", "source", "licence", "attribution", "language", "group")
    earlier = {
        "leon": 1,
        "parts": [["text", "a"]],
        "provenance": dict(zip(names, ("k", "s", "CC0-1.0", "", "en", "g"), strict=True)),
    }
    assert records.to_bytes(document) == msgpack.packb(earlier)
    assert records.from_bytes(msgpack.packb(earlier)) == document


def test_texts_are_read_without_decoding_images(tmp_path, monkeypatch):
    records.write(tmp_path / "a.array_record", make_documents(4, codes=False))
    source = records.RecordSource(tmp_path / "a.array_record")
    source[0]  # the first read of a file checks a whole record
    monkeypatch.setattr(records, "from_png", None)
    assert [source.texts(row) for row in (2, -1)] == [["document 2"], ["document 3"]]
    with pytest.raises(IndexError, match="record 4 of 4"):
        source.texts(4)
    with pytest.raises(UserError, match="it is damaged"):
        records.texts_of(b"no record")


def test_a_file_is_a_random_access_sequence(tmp_path):
    written = make_documents(50)
    assert records.write(tmp_path / "a.array_record", iter(written)) == 50
    source = records.RecordSource(tmp_path / "a.array_record")
    assert len(source) == 50
    assert list(source) == written
    assert source[np.int64(17)] == written[17]
    assert source[-1] == written[-1]
    assert pickle.loads(pickle.dumps(source))[3] == written[3]
    with pytest.raises(IndexError, match="record 50 of 50"):
        source[50]


def test_an_empty_file_is_an_empty_sequence(tmp_path):
    assert records.write(tmp_path / "a", []) == 0
    assert len(records.RecordSource(tmp_path / "a")) == 0


def test_a_failed_write_keeps_the_old_file_and_leaves_no_other(tmp_path):
    path = tmp_path / "a"
    records.write(path, make_documents(2))

    def broken():
        yield from make_documents(1)
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="the source broke"):
        records.write(path, broken())
    assert list(records.RecordSource(path)) == make_documents(2)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_all_users_can_read_a_written_file(tmp_path):
    records.write(tmp_path / "a", make_documents(1))
    assert stat.S_IMODE(os.stat(tmp_path / "a").st_mode) == 0o644


def test_writing_into_a_missing_folder_raises_an_error(tmp_path):
    with pytest.raises(UserError, match=r"cannot write .*missing.*No such file"):
        records.write(tmp_path / "missing" / "a", make_documents(1))


def test_files_with_known_lengths_are_opened_when_they_are_read(tmp_path, monkeypatch):
    written = make_documents(9)
    paths = [tmp_path / f"{number}" for number in range(3)]
    for number, path in enumerate(paths):
        records.write(path, written[3 * number : 3 * number + 3])
    opened = []
    monkeypatch.setattr(
        records, "_reader", lambda path, real=records._reader: opened.append(path) or real(path)
    )
    source = records.RecordSource(paths, lengths=[3, 3, 3])
    assert len(source) == 9 and opened == []
    assert source[7] == written[7] and source[8] == written[8]
    assert opened == [str(paths[2])]
    assert list(pickle.loads(pickle.dumps(source))) == written
    wrong = records.RecordSource(paths, lengths=[3, 4, 3])
    with pytest.raises(
        UserError, match="1 holds 3 documents, but the manifest of its folder records 4"
    ):
        wrong[3]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files in /proc")
def test_the_number_of_open_files_is_limited(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_MAX_OPEN_FILES", 4)
    written = make_documents(40)
    paths = [tmp_path / f"{number}" for number in range(40)]
    for path, document in zip(paths, written, strict=True):
        records.write(path, [document])
    source, before = records.RecordSource(paths), len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        assert list(source) == written
    assert len(os.listdir("/proc/self/fd")) <= before + 4


def test_a_missing_file_raises_an_error(tmp_path):
    with pytest.raises(UserError, match=r"there is no file .*nothing; run: leon prepare"):
        records.RecordSource(tmp_path / "nothing")


@pytest.mark.parametrize("keep", [0, 1000, 70_000, 100_000, 131_071])
def test_a_truncated_file_raises_an_error(tmp_path, keep):
    records.write(tmp_path / "whole", make_documents(50))
    content = (tmp_path / "whole").read_bytes()
    assert len(content) > keep
    (tmp_path / "cut").write_bytes(content[:keep])
    with pytest.raises(UserError, match=r"cut is (too short|not a complete ArrayRecord)"):
        records.RecordSource(tmp_path / "cut")


@pytest.mark.parametrize("content", [b"\x89PNG" + bytes(90_000), b"plain text\n" * 20_000])
def test_a_file_of_another_format_raises_an_error(tmp_path, content):
    (tmp_path / "foreign").write_bytes(content)
    with pytest.raises(UserError, match="not a complete ArrayRecord file of documents"):
        records.RecordSource(tmp_path / "foreign")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (b"some other record", "not a complete ArrayRecord file of documents"),
        (msgpack.packb({"image": 1}), "it is not a leon_jax document"),
        (msgpack.packb({"leon": 2, "parts": []}), "its version is 2, this program reads 1"),
    ],
)
def test_records_of_another_format_raise_an_error(tmp_path, record, message):
    writer = array_record_module.ArrayRecordWriter(str(tmp_path / "a"), "group_size:1")
    writer.write(record)
    writer.close()
    with pytest.raises(UserError, match=message):
        records.RecordSource(tmp_path / "a")


def test_a_damaged_record_raises_an_error_and_others_are_readable(tmp_path):
    written = make_documents(50)
    records.write(tmp_path / "a", written)
    content = bytearray((tmp_path / "a").read_bytes())
    position = content.index(b"key/30")
    content[position] ^= 255
    (tmp_path / "a").write_bytes(bytes(content))
    source = records.RecordSource(tmp_path / "a")
    with pytest.raises(UserError, match=r"record 30 of .* is damaged"):
        source[30]
    assert source[31] == written[31]


def test_truncated_records_raise_an_error():
    data = records.to_bytes(make_documents(1)[0])
    for keep in range(0, len(data), 7):
        with pytest.raises(UserError, match="the record cannot be read"):
            records.from_bytes(data[:keep])
