"""CLIP's text tokenizer against the one of transformers."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from leon_jax.config import UserError
from leon_jax.tokenizers.clip_text import END, START, CLIPTextTokenizer
from tests import peers
from tests.retrieval import clip_folder

LENGTH = 77
SPELLS_CONTROL = [text for text in clip_folder.HARD if "<|" in text]


@pytest.fixture
def folder(tmp_path):
    """A folder with vocab.json and merges.txt."""
    clip_folder.write_vocabulary(tmp_path)
    return tmp_path


@pytest.mark.peers
def test_ids_from_either_kind_of_file_equal_transformers(folder, tmp_path):
    out = tmp_path / "saved"
    task = {
        "do": "tokenize", "folder": str(folder), "texts": clip_folder.HARD, "length": LENGTH,
        "out": str(out),
    }  # fmt: skip
    script = Path(__file__).parents[1] / "retrieval" / "clip_in_torch.py"
    expected = peers.run_peer(script, {"task": np.frombuffer(json.dumps(task).encode(), np.uint8)})
    assert not (folder / "tokenizer.json").exists() and (out / "tokenizer.json").exists()
    assert not (out / "vocab.json").exists()
    for tokenizer in (CLIPTextTokenizer.load(folder), CLIPTextTokenizer.load(out)):
        for number, text in enumerate(clip_folder.HARD):
            ids = [tokenizer.start, *tokenizer.encode(text)[: LENGTH - 2], tokenizer.end]
            assert ids == expected[str(number)].tolist(), text


def test_decoded_text_has_the_same_ids(folder):
    tokenizer = CLIPTextTokenizer.load(folder)
    texts = [text for text in clip_folder.HARD if text not in SPELLS_CONTROL]
    assert sum(len(tokenizer.encode(text)) for text in texts) > 500
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.encode(tokenizer.decode(ids)) == ids, text
    assert tokenizer.decode(tokenizer.encode("  The RED\theart's")) == "the red heart 's"


def test_half_a_character_becomes_the_replacement_character(folder):
    tokenizer = CLIPTextTokenizer.load(folder)
    ids = tokenizer.encode("a ☃")
    assert len(ids) == 4  # the snowman has three bytes, and no training text has it
    assert tokenizer.decode(ids[:-1]) == "a \ufffd"


def test_a_text_is_not_truncated_even_if_the_file_says_so(folder):
    """A tokenizer.json stores the truncation and the padding of its last use."""
    long = "word " * 100
    whole = tokenizers.Tokenizer.from_str(CLIPTextTokenizer.load(folder)._tokenizer.to_str())
    whole.enable_truncation(7)
    whole.enable_padding(length=9, pad_token=END)
    whole.save(str(folder / "tokenizer.json"))
    (folder / "vocab.json").unlink()
    tokenizer = CLIPTextTokenizer.load(folder)
    assert tokenizer.encode("a") == tokenizer.encode("A") and len(tokenizer.encode("a")) == 1
    assert len(tokenizer.encode(long)) >= 100


def test_start_and_end_are_the_last_two_ids_and_are_not_added(folder):
    tokenizer = CLIPTextTokenizer.load(folder)
    vocabulary = json.loads((folder / "vocab.json").read_text())
    assert tokenizer.size == len(vocabulary)
    assert (tokenizer.start, tokenizer.end) == (vocabulary[START], vocabulary[END])
    assert tokenizer.encode("") == []


def test_texts_and_ids_that_are_not_valid_are_rejected(folder):
    tokenizer = CLIPTextTokenizer.load(folder)
    with pytest.raises(UserError, match="not valid unicode"):
        tokenizer.encode("a\ud800b")
    with pytest.raises(UserError, match=rf"text id {tokenizer.size} is not in 0\.\."):
        tokenizer.decode([tokenizer.size])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda folder: (folder / "merges.txt").unlink(),
            r"it needs tokenizer\.json, or vocab\.json",
        ),
        (lambda folder: (folder / "vocab.json").write_text("{"), "is damaged"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "is damaged"),
        (
            lambda folder: (folder / "vocab.json").write_text(
                (folder / "vocab.json").read_text().replace("startoftext", "start")
            ),
            r"it has no token <\|startoftext\|>",
        ),
        (
            lambda folder: tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, "a")).save(
                str(folder / "tokenizer.json")
            ),
            r"tokenizer\.json is not CLIP's tokenizer: a BPE",
        ),
    ],
    ids=["no merges", "no json", "no tokenizer", "no start", "words"],
)
def test_files_of_another_tokenizer_are_rejected(folder, change, message):
    change(folder)
    with pytest.raises(UserError, match=message):
        CLIPTextTokenizer.load(folder)
