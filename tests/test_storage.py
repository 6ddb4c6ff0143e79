"""Tests paths on disks and in buckets, on servers of both protocols."""

import os
import pathlib

import pytest

from leon_jax import storage
from leon_jax.config import UserError


@pytest.fixture(params=["disk", "gs", "s3"])
def folder(request, tmp_path) -> pathlib.Path:
    """An empty folder of each kind."""
    if request.param == "disk":
        return tmp_path
    return storage.path(request.getfixturevalue(f"{request.param}_folder"))


def test_what_is_written_is_read_and_listed(folder):
    storage.write(folder / "a.txt", "ä")
    storage.write(folder / "a.txt", "öü")
    with storage.writing(folder / "b.bin") as temporary:
        temporary.write_bytes(b"12")
    assert (folder / "a.txt").read_text(encoding="utf-8") == "öü"
    assert (folder / "b.bin").read_bytes() == b"12"
    assert sorted(path.name for path in folder.iterdir()) == ["a.txt", "b.bin"]
    assert (folder / "a.txt").is_file() and folder.is_dir() and not (folder / "c").exists()


def test_a_failed_write_leaves_the_old_file_and_no_other(folder):
    storage.write(folder / "a.txt", "old")
    with pytest.raises(RuntimeError), storage.writing(folder / "a.txt") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert (folder / "a.txt").read_text() == "old"
    assert [path.name for path in folder.iterdir()] == ["a.txt"]


def test_a_folder_is_moved_over_another_and_removed(folder):
    for name in ("one/a", "one/b/c", "two/d", "one_more/e"):
        storage.make_folder((folder / name).parent)
        storage.write(folder / name, name)
    storage.move(folder / "one", folder / "two")
    assert not (folder / "one").exists() and not (folder / "two/d").exists()
    assert (folder / "two/b/c").read_text() == "one/b/c"
    storage.remove(folder / "two")
    storage.remove(folder / "nothing")
    assert [path.name for path in folder.iterdir()] == ["one_more"]


def test_a_folder_is_copied_to_the_disk_and_only_changes_are_copied_again(bucket, monkeypatch):
    for name in ("a", "b/c"):
        storage.write(bucket / name, name)
    copy = storage.local(bucket)
    assert copy.name == bucket.name
    assert {str(p.relative_to(copy)): p.read_text() for p in copy.rglob("*") if p.is_file()} == {
        "a": "a",
        "b/c": "b/c",
    }
    inode = (copy / "b/c").stat().st_ino
    storage.write(bucket / "a", "A")
    storage.write(bucket / "d", "d")
    assert storage.local(str(bucket)) == copy
    assert (copy / "a").read_text() == "A" and (copy / "d").read_text() == "d"
    assert (copy / "b/c").stat().st_ino == inode
    storage.remove(bucket / "d")
    assert not (storage.local(bucket) / "d").exists()


def test_one_file_is_copied_to_the_disk(bucket):
    storage.write(bucket / "model.bin", b"1" * 1000)
    storage.write(bucket / "model.bin.other", b"2")
    assert storage.local(bucket / "model.bin").read_bytes() == b"1" * 1000
    assert storage.local(bucket / "model.bin").name == "model.bin"


def test_what_does_not_exist_is_named(bucket):
    with pytest.raises(UserError, match=f"there is nothing at {bucket}/none"):
        storage.local(bucket / "none")


def test_a_path_on_the_disk_is_its_own_copy(tmp_path):
    assert storage.local(tmp_path) == tmp_path
    assert storage.local("a/b") == pathlib.Path("a/b")


def test_a_folder_without_its_last_file_was_not_uploaded_completely(bucket, tmp_path, monkeypatch):
    source = tmp_path / "source"
    (source / "b").mkdir(parents=True)
    for name in ("a", "b/c", "manifest"):
        (source / name).write_text(name)
    storage.write(bucket / "former", "")
    storage.write(bucket / "manifest", "former")
    order: list[str] = []
    with monkeypatch.context() as patch:
        files = storage.file_system(bucket)
        patch.setattr(files, "put_file", lambda file, to: order.append(file[-1]))
        storage.upload(source, bucket, last="manifest")
    assert order[-1] == "t" and sorted(order) == ["a", "c", "t"]
    assert not (bucket / "manifest").exists()
    storage.upload(source, bucket, last="manifest")
    assert (bucket / "manifest").read_text() == "manifest"
    assert sorted(path.name for path in bucket.iterdir()) == ["a", "b", "manifest"]


def test_addresses_of_other_kinds_and_missing_packages_are_refused(monkeypatch):
    with pytest.raises(UserError, match="http://x is not a path; addresses begin with gs:// or s3"):
        storage.path("http://x")
    monkeypatch.setattr(storage.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package gcsfs; install it with: pip install"):
        storage.path("gs://bucket/x")


def test_names_are_joined(tmp_path):
    assert storage.join(tmp_path, "a") == tmp_path / "a"
    assert os.fspath(storage.join(tmp_path, "gs://b/c")) == "gs://b/c"
    assert os.fspath(storage.absolute("gs://b/c")) == "gs://b/c"
    assert storage.absolute("c") == pathlib.Path("c").absolute()
