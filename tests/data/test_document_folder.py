"""Tests reading a documents folder: random access, listings and errors."""

import json

import pytest

from leon_jax.config import UserError
from leon_jax.data.document_folder import DocumentFolder
from leon_jax.retrieval.prepared_folder import PreparedFolder
from tests import document_folders, tiny


def test_a_folder_has_its_documents_and_their_listing(tmp_path):
    drawings = document_folders.drawings()
    folder = DocumentFolder(document_folders.write(tmp_path / "a", drawings[2:], exam=drawings[:2]))
    assert folder.splits == {"train": 10, "exam": 2}
    assert list(folder.records("exam")) == drawings[:2]
    assert folder.records("train")[3] == drawings[5]
    lines = list(folder.listing("exam"))
    assert [line["group"] for line in lines] == ["red heart"] * 2
    assert lines[0]["captions"] == ["red heart", "red heart, flat"]
    assert "family" not in lines[0]


def test_a_prepared_folder_is_a_folder_of_documents():
    folder = DocumentFolder(tiny.folders()[1])
    assert folder.splits == {"train": 12, "unseen_design": 4}
    assert folder.records("train")[7].pixels.shape == (tiny.RESOLUTION, tiny.RESOLUTION, 3)


def test_a_later_format_is_read_but_is_no_prepared_folder(tmp_path):
    document_folders.write(tmp_path, document_folders.drawings())
    manifest = json.loads((tmp_path / "manifest.json").read_text()) | {"format": 4}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert len(DocumentFolder(tmp_path).records()) == 12
    with pytest.raises(UserError, match="has documents without codes"):
        PreparedFolder(tmp_path)


def test_mistakes_are_named(tmp_path):
    with pytest.raises(UserError, match=r"is not a documents folder .* make one with leon prepare"):
        DocumentFolder(tmp_path)
    folder = DocumentFolder(document_folders.write(tmp_path / "a", document_folders.drawings()))
    with pytest.raises(UserError, match="has no split 'exam'; its splits are train"):
        folder.records("exam")
    (tmp_path / "a" / "manifest.json").write_text('{"format": 9}')
    with pytest.raises(UserError, match="its format is 9, this one reads 4, 3"):
        DocumentFolder(tmp_path / "a")
