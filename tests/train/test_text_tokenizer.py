"""Tests the training of a text tokenizer on documents folders."""

import pytest

from leon_jax.config import UserError
from leon_jax.data.config import FolderComponent, FoldersConfig
from leon_jax.documents import Document, Text
from leon_jax.train import text_tokenizer
from leon_jax.train.text_tokenizer import TextConfig
from tests import document_folders


def documents(*texts: str) -> list[Document]:
    return [Document((Text(text),)) for text in texts]


def test_the_same_data_gives_the_same_file(tmp_path):
    folder = document_folders.write(tmp_path / "a", document_folders.drawings())
    config = TextConfig(FoldersConfig(folder), 300)
    first = text_tokenizer.run(config, tmp_path / "first")
    text_tokenizer.run(config, tmp_path / "second")
    files = [tmp_path / name / "export" / "text.json" for name in ("first", "second")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert first.size == 300 and text_tokenizer.summary(first, config) == "300 entries"


def test_pairs_are_counted_in_proportion_to_the_weights(tmp_path):
    many = document_folders.write(tmp_path / "many", documents(*["aba"] * 6))
    few = document_folders.write(tmp_path / "few", documents("xyx", "xyx"))

    def first_merge(weight: float) -> str:
        mixture = (FolderComponent(many), FolderComponent(few, weight=weight))
        config = TextConfig(FoldersConfig(mixture=mixture), 257)
        return text_tokenizer.run(config, tmp_path / "run").decode([256])

    assert first_merge(0.1) == "ab" and first_merge(3.0) == "xy"


def test_further_texts_and_single_digits(tmp_path):
    folder = document_folders.write(tmp_path / "a", documents("aba", "aba"))
    texts = ("what is left of 77?",) * 9
    plain, more = (
        text_tokenizer.run(TextConfig(FoldersConfig(folder), 280, **further), tmp_path / "run")
        for further in ({}, {"texts": texts, "split_digits": True})
    )
    assert "what" not in [plain.decode([token]) for token in range(256, plain.size)]
    pieces = [more.decode([token]) for token in range(256, more.size)]
    assert "what" in pieces and not any("7" in piece for piece in pieces)


def test_documents_without_words_are_refused_and_nothing_is_written(tmp_path):
    folder = document_folders.write(tmp_path / "a", documents("a", "b"))
    with pytest.raises(UserError, match=r"documents of .*a \(train\) have no word of two bytes"):
        text_tokenizer.run(TextConfig(FoldersConfig(folder), 300), tmp_path / "run")
    assert not (tmp_path / "run").exists()
