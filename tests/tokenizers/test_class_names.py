"""Numbers and names of classes, and the prompt templates of published models."""

import numpy as np
import pytest

from leon_jax.config import UserError
from leon_jax.convert.published_model import class_names
from leon_jax.documents import Document, Hole, Image, Text
from leon_jax.tokenizers.class_names import ClassNames, load_text
from leon_jax.tokenizers.template import PromptTemplate, TemplateTokenizer
from leon_jax.tokenizers.text import TextTokenizer
from leon_jax.vocabulary import Vocabulary

NAMES = ClassNames(["tench, Tinca tinca", "crane", "missile", "projectile, missile", "crane", ""])


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("tench", 0), ("TINCA  tinca", 0), ("tench, Tinca tinca", 0), ("tinca_tinca", 0),
        ("missile", 2), ("projectile", 3), ("projectile, missile", 3), ("5", 5), (" 1 ", 1),
    ],
)  # fmt: skip
def test_names_and_numbers(text, number):
    assert NAMES.encode(text) == [number]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("crane", r"several classes are called 'crane'; give a number, 1 \(crane\) or 4 \(crane\)"),
        ("tensh", r"no class is called 'tensh'; the closest are tench \(0\)"),
        ("tinca", r"the closest are tinca tinca \(0\)"),
        ("6", "there is no class 6; the model has the classes 0 to 5"),
        ("-1", "give the name of a class, or a number from 0 to 5"),
        ("", "no class is called ''"),
    ],
)
def test_unknown_names_are_refused_with_the_closest(text, message):
    with pytest.raises(UserError, match=message):
        NAMES.encode(text)


def test_decoding_gives_all_names_or_the_number():
    assert [NAMES.decode([number]) for number in (0, 5)] == ["tench, Tinca tinca", "5"]
    assert NAMES.decode([]) == ""
    for ids in ([6], [-1], [0, 1]):
        with pytest.raises(UserError, match="is not one class"):
            NAMES.decode(ids)


def test_files_of_both_kinds_are_read(tmp_path):
    NAMES.save(tmp_path / "text.json")
    assert load_text(tmp_path / "text.json").names == NAMES.names
    words = TextTokenizer.train(["a cat"], 260)
    words.save(tmp_path / "text.json")
    assert load_text(tmp_path / "text.json").encode("a cat") == words.encode("a cat")
    (tmp_path / "text.json").write_text('{"kind": "class_names", "names": [1]}')
    with pytest.raises(UserError, match="has no class names"):
        load_text(tmp_path / "text.json")
    with pytest.raises(UserError, match="cannot read the text tokenizer"):
        load_text(tmp_path / "no.json")


def test_the_names_of_imagenet():
    """The classes that the published script draws, as their names are known."""
    names = class_names(1000)
    assert names.size == 1000
    known = {
        207: "golden retriever", 360: "otter", 387: "lesser panda", 974: "geyser", 88: "macaw",
        979: "valley", 417: "balloon", 279: "Arctic fox", 425: "barn", 0: "tench",
        999: "toilet tissue",
    }  # fmt: skip
    for number, name in known.items():
        assert names.encode(name) == [number]
    assert class_names(10).decode([3]) == "3"


def test_a_template_frames_text_and_image():
    """Ids before and after the text, and a text of several tokens, as other families have."""
    vocabulary = Vocabulary.compact(8, 300, sentinels=0)
    words = TextTokenizer.train(["a cat"], 260)
    template = PromptTemplate("Family", (1, 1), (0,), (vocabulary.break_id,))
    tokenizer = TemplateTokenizer(vocabulary, words, (1, 2), template)
    text = [vocabulary.text_start + token for token in words.encode("cat")]
    image = Image(codes=np.array([[3, 5]], np.int32))
    document = Document((Text("cat"), image))
    ids = [0, *text, vocabulary.break_id, 7, 9]
    assert tokenizer.encode(document).tolist() == ids
    assert tokenizer.prompt(Document((Text("cat"), Hole("image")))).tolist() == ids[:-2]
    unconditional = Document((Hole("text"), Hole("image")))
    assert tokenizer.prompt(unconditional).tolist() == [0, 1, 1, vocabulary.break_id]
    prompt = Document((Text("cat"), Hole("image")))
    completion = tokenizer.completion(prompt, [image])
    assert completion.tolist() == [7, 9]
    np.testing.assert_array_equal(tokenizer.fill(prompt, completion).codes, image.codes)
    assert tokenizer.decode(np.array(ids)).text == "cat"
    assert len(tokenizer.decode(np.array([0, 1, 1, vocabulary.break_id, 7, 9])).parts) == 1
    with pytest.raises(UserError, match="has another layout"):
        tokenizer.decode(np.array([2, *ids[1:]]))
    with pytest.raises(UserError, match="needs ids from 0 to"):
        TemplateTokenizer(vocabulary, words, (1, 2), PromptTemplate("Family", (vocabulary.size,)))
