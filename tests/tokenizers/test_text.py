"""Byte-level BPE."""

import os
import pickle
import random
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leon_jax.config import UserError
from leon_jax.tokenizers.text import TextTokenizer

COLOURS = ("red", "green", "dark blue", "赤い")
THINGS = ("cat face", "apple", "heart on fire", "🚀 rocket")
TEXTS = [f"{colour} {thing}, {style}" for colour in COLOURS for thing in THINGS for style in "AB"]


@pytest.fixture(scope="module")
def tokenizer():
    return TextTokenizer.train(TEXTS, 300)


@settings(deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_string_round_trips(tokenizer, text):
    ids = tokenizer.encode(text)
    assert all(0 <= token < tokenizer.size for token in ids)
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<break>",
        "</s>",
        "<sentinel:0>",
        "<s><pad></s><unk>",
        "\0",
        "a\0b",
        "  a  b ",
        "\r\n\t\n",
        "👩🏽‍🚀🏳️‍🌈",
        "e\u0301 \u00e9",
        "\ufeff",
        "\ufffd",
        "\U0010ffff",
        "ネコの顔",
        "‏شخص‎",
    ],
)
def test_odd_strings_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_frequent_strings_become_single_tokens(tokenizer):
    assert tokenizer.size == 300
    assert len(tokenizer.encode("red cat face, A")) < len("red cat face, A")


def test_the_byte_alphabet_alone_encodes_any_text():
    tokenizer = TextTokenizer.train([], 256)
    assert tokenizer.size == 256
    assert len(tokenizer.encode("é<break>")) == len("é<break>".encode())


def test_the_size_is_smaller_if_the_texts_have_too_few_merges():
    assert TextTokenizer.train(["ab"], 1000).size == 257


def test_training_does_not_depend_on_the_order_of_the_texts(tokenizer, tmp_path):
    shuffled = random.Random(0).sample(TEXTS, len(TEXTS))
    TextTokenizer.train(shuffled, 300).save(tmp_path / "shuffled")
    tokenizer.save(tmp_path / "trained")
    assert (tmp_path / "shuffled").read_bytes() == (tmp_path / "trained").read_bytes()


def test_training_does_not_depend_on_the_process(tokenizer, tmp_path):
    program = (
        "import sys; from leon_jax.tokenizers.text import TextTokenizer;"
        f"TextTokenizer.train({TEXTS!r}, 300).save(sys.argv[1])"
    )
    environment = {**os.environ, "RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-c", program, str(tmp_path / "other")]
    subprocess.run(command, check=True, env=environment)
    tokenizer.save(tmp_path / "trained")
    assert (tmp_path / "other").read_bytes() == (tmp_path / "trained").read_bytes()


def test_a_saved_or_pickled_tokenizer_gives_the_same_ids(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "text.json")
    loaded = TextTokenizer.load(tmp_path / "text.json")
    copied = pickle.loads(pickle.dumps(tokenizer))
    assert loaded.size == copied.size == tokenizer.size
    for text in TEXTS:
        assert loaded.encode(text) == copied.encode(text) == tokenizer.encode(text)
    assert [entry.name for entry in tmp_path.iterdir()] == ["text.json"]


def test_digits_may_be_tokens_of_their_own(tmp_path):
    texts = ["cat: 2020 2020", "in 2020, 10 cats"] * 9
    tokenizer = TextTokenizer.train(texts, 300, split_digits=True)
    tokenizer.save(tmp_path / "text.json")
    loaded = TextTokenizer.load(tmp_path / "text.json")
    text = "cat: 2020, ½ of ２０"
    pieces = [loaded.decode([token]) for token in loaded.encode(text)]
    assert pieces[:6] == ["cat", ":", " ", "2", "0", "2"]
    assert loaded.decode(loaded.encode(text)) == text
    plain = TextTokenizer.train(texts, 300)
    assert any("2020" in plain.decode([token]) for token in range(plain.size))


def test_ids_that_are_not_utf8_still_decode(tokenizer):
    partial = tokenizer.encode("é")[:1]
    assert tokenizer.decode(partial) == "\ufffd"


@pytest.mark.parametrize("ids", [[300], [-1], [0, 10**9]])
def test_unknown_ids_are_rejected(tokenizer, ids):
    with pytest.raises(UserError, match=r"is not in 0\.\.299"):
        tokenizer.decode(ids)


@pytest.mark.parametrize("size", [255, 56_321])
def test_sizes_out_of_range_are_rejected(size):
    with pytest.raises(UserError, match="256 to 56320 tokens"):
        TextTokenizer.train(TEXTS, size)


def test_a_lone_surrogate_is_rejected(tokenizer):
    with pytest.raises(UserError, match="not valid unicode"):
        tokenizer.encode("a\ud800")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{}", "is not a tokenizer file"),
        (b"\xff\xfe\x00", "cannot read the text tokenizer .*: it is not text"),
        (None, "cannot read the text tokenizer .*: No such file"),
    ],
)
def test_other_files_are_rejected(tmp_path, content, message):
    if content is not None:
        (tmp_path / "text.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        TextTokenizer.load(tmp_path / "text.json")


def test_a_tokenizer_with_special_tokens_is_rejected(tokenizer, tmp_path):
    """Its special tokens would change text to control tokens."""
    import tokenizers

    tokenizer.save(tmp_path / "text.json")
    other = tokenizers.Tokenizer.from_file(str(tmp_path / "text.json"))
    other.add_special_tokens(["<break>"])
    other.save(str(tmp_path / "text.json"))
    with pytest.raises(UserError, match="not a byte-level BPE tokenizer without special tokens"):
        TextTokenizer.load(tmp_path / "text.json")


def test_saving_to_a_missing_folder_is_an_error(tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"cannot write .*No such file"):
        tokenizer.save(tmp_path / "missing" / "text.json")
