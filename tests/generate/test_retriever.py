"""Which prepared folder a model retrieves from."""

import dataclasses

import pytest

from leon_jax.config import UserError
from leon_jax.documents import Document, Text
from leon_jax.generate import retriever
from leon_jax.leon import Leon
from leon_jax.model_description import IndexAddress, ModelDescription
from leon_jax.model_folder import ModelFolder
from tests import tiny

# A model whose index has the emoji documents.
DEMO = ModelDescription("demo", index=IndexAddress(prepare="demo"))


def test_a_folder_in_the_cache_serves_whatever_its_name_is(monkeypatch, tmp_path):
    """An older version named it after the digests of the files' bytes."""
    checkpoint, prepared = tiny.folders()
    monkeypatch.setattr(retriever, "DEFAULT_FOLDER", tmp_path / "nowhere")
    monkeypatch.setattr(retriever, "cache_folder", lambda: tmp_path)
    (tmp_path / "emoji-0123456789ab").symlink_to(prepared)
    (tmp_path / "emoji-0000").mkdir()
    folder = dataclasses.replace(ModelFolder.open(checkpoint), description=DEMO)
    assert retriever.find_index(folder) == tmp_path / "emoji-0123456789ab"


def test_a_word_is_lower_case_only_where_captions_spell_it_so(tmp_path, monkeypatch):
    """What captions spell with capitals, or do not have at all, stays as it is."""
    monkeypatch.setenv("LEON_CACHE", str(tmp_path))
    index = retriever.Retriever(tiny.folders()[1], encoder=None)
    for text, expected in (
        ("Cat Face, Twemoji style", "cat face, Twemoji style"),
        ("RED HEART", "red heart"),
        ("cat face, OpenMoji style", "cat face, OpenMoji style"),
        ("Namibia, Twemoji Style", "Namibia, Twemoji style"),
        ("", ""),
    ):
        assert index.spell(text) == expected
    # The counts are kept, and read again.
    (path,) = (tmp_path / "words").iterdir()
    path.write_text('{"Cat": 1}')
    assert retriever.Retriever(tiny.folders()[1], encoder=None).spell("Cat Face") == "Cat Face"
    path.write_text("not JSON")
    assert retriever.Retriever(tiny.folders()[1], encoder=None).spell("Cat") == "cat"


def test_a_word_of_one_caption_alone_is_no_spelling():
    """It may be of another language."""
    index = retriever.Retriever(tiny.folders()[1], encoder=None)
    index.word_counts = {"são": 1, "cat": 2}
    assert index.spell("São Cat") == "São cat"


def test_prompts_that_differ_in_case_alone_retrieve_the_same_documents():
    leon = Leon.load(*tiny.folders())
    texts = "cat face, Twemoji style", "CAT Face, Twemoji style"
    documents = [Document((Text(text),)) for text in texts]
    first, second = (leon.retrieve(document, 2) for document in documents)
    assert first == second


@pytest.mark.parametrize(
    ("content", "message"), [(b"{", "is not JSON"), (b"\xff\xfe{}", "is not UTF-8")]
)
def test_a_damaged_selection_file_is_named(tmp_path, content, message):
    (tmp_path / "selection.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"selection\.json {message}"):
        retriever.selection(tmp_path)
