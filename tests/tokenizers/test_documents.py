"""Documents to ids and back."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from leon_jax.config import UserError
from leon_jax.data.masking import MaskingConfig, mask
from leon_jax.documents import Document, Hole, Image, Text
from leon_jax.tokenizers.documents import DocumentTokenizer
from leon_jax.tokenizers.text import TextTokenizer
from leon_jax.vocabulary import Vocabulary

WORDS = ["a cat in a hat", "a white rabbit", "the mad tea party"]
VOCABULARY = Vocabulary.compact(image_codes=8, text_tokens=280, sentinels=4)
TOKENIZER = DocumentTokenizer(VOCABULARY, TextTokenizer.train(WORDS, 280), (2, 3))
CODES = np.array([[0, 1, 2], [3, 4, 7]])
PICTURE = Image(codes=CODES)
S, B, E = VOCABULARY.eos, VOCABULARY.break_id, VOCABULARY.eoss
IMAGE = [4, 5, 6, 7, 8, 11]

texts = st.builds(Text, st.text(st.characters(exclude_categories=["Cs"])))
images = st.builds(Image, codes=arrays.arrays(np.int32, (2, 3), elements=st.integers(0, 7)))
filled = texts | images
documents = st.lists(filled, min_size=1, max_size=4).map(lambda parts: Document(tuple(parts)))


def text_ids(text):
    return [VOCABULARY.text_start + token for token in TOKENIZER.text.encode(text)]


def sentinel(index):
    return VOCABULARY.sentinel(index)


@st.composite
def with_holes(draw):
    """(document with holes, the filled document): at most four holes, some at the end."""
    whole = draw(st.lists(filled, min_size=1, max_size=4))
    positions = draw(st.sets(st.integers(0, len(whole) - 1), min_size=1))
    parts = [
        Hole("image" if isinstance(part, Image) else "text") if index in positions else part
        for index, part in enumerate(whole)
    ]
    return Document(tuple(parts)), Document(tuple(whole))


class TestLayout:
    """The sequences of the paper, token by token."""

    def test_a_pair(self):
        ids = TOKENIZER.encode(Document((Text("a cat"), PICTURE)))
        assert ids.dtype == np.int32
        assert ids.tolist() == [S, *text_ids("a cat"), B, *IMAGE, S]

    def test_retrieved_documents_come_first_and_are_separated_by_break_alone(self):
        neighbour = Document((Text("hat"), PICTURE))
        query = Document((PICTURE, Text("cat")))
        ids = TOKENIZER.encode([neighbour, neighbour, query])
        once = [*text_ids("hat"), B, *IMAGE, B]
        assert ids.tolist() == [S, *once, *once, *IMAGE, B, *text_ids("cat"), S]

    def test_text_to_image(self):
        document = Document((Text("cat"), Hole("image")))
        assert TOKENIZER.prompt(document).tolist() == [S, *text_ids("cat"), B]
        assert TOKENIZER.answer(document, [PICTURE]).tolist() == [*IMAGE, S]

    def test_captioning(self):
        document = Document((Hole("text"), PICTURE))
        prompt = [S, sentinel(0), B, *IMAGE, S, sentinel(0)]
        assert TOKENIZER.prompt(document).tolist() == prompt
        assert TOKENIZER.encode(document).tolist() == prompt[:-1]
        assert TOKENIZER.answer(document, [Text("cat")]).tolist() == [*text_ids("cat"), E]

    def test_unconditional_pictures(self):
        document = Document((Hole("text"), Hole("image")))
        assert TOKENIZER.prompt(document).tolist() == [S, sentinel(0), B]
        assert TOKENIZER.answer(document, [PICTURE]).tolist() == [*IMAGE, S]

    def test_a_document_that_is_a_hole(self):
        assert TOKENIZER.prompt(Document((Hole("image"),))).tolist() == [S]

    def test_holes_of_the_query_behind_retrieved_documents(self):
        neighbour = Document((Text("hat"), PICTURE))
        ids = TOKENIZER.prompt([neighbour, Document((Hole("text"), PICTURE))])
        front = [S, *text_ids("hat"), B, *IMAGE, B]
        assert ids.tolist() == [*front, sentinel(0), B, *IMAGE, S, sentinel(0)]

    def test_several_holes_are_answered_in_order(self):
        document = Document((Hole("text"), PICTURE, Hole("image"), Text("hat")))
        prompt = [S, sentinel(0), B, *IMAGE, B, sentinel(1), B, *text_ids("hat"), S, sentinel(0)]
        assert TOKENIZER.prompt(document).tolist() == prompt
        answer = [*text_ids("cat"), E, sentinel(1), *IMAGE, E]
        assert TOKENIZER.answer(document, [Text("cat"), PICTURE]).tolist() == answer

    def test_pixels_are_not_needed(self):
        pixels = np.zeros((4, 6, 3), np.uint8)
        both = Document((Image(pixels, CODES),))
        assert TOKENIZER.encode(both).tolist() == TOKENIZER.encode(Document((PICTURE,))).tolist()


@settings(deadline=None)
@given(documents)
def test_documents_round_trip(document):
    assert TOKENIZER.decode(TOKENIZER.encode(document)) == document


@settings(deadline=None)
@given(st.lists(documents, min_size=1, max_size=3))
def test_retrieved_documents_come_back_as_parts_of_one(several):
    parts = tuple(part for document in several for part in document.parts)
    assert TOKENIZER.decode(TOKENIZER.encode(several)) == Document(parts)


@settings(deadline=None)
@given(with_holes(), documents)
def test_a_perfect_answer_fills_the_holes(holed, neighbour):
    document, whole = holed
    trailing = isinstance(document.parts[-1], Hole)
    answered = document.holes[-1:] if trailing else document.holes
    answer = TOKENIZER.answer([neighbour, document], [whole.parts[i] for i in answered])
    expected = document
    for position in answered:
        expected = expected.replace(position, whole.parts[position])
    assert TOKENIZER.fill([neighbour, document], answer) == expected
    padded = np.append(answer, [VOCABULARY.pad] * 3)
    assert TOKENIZER.fill(document, padded) == expected
    if not expected.holes:
        example = np.concatenate([TOKENIZER.prompt(document), answer])
        assert TOKENIZER.decode(example) == whole


@settings(deadline=None)
@given(documents, st.integers(0, 2**32 - 1))
def test_masked_training_examples_decode_to_the_document(document, seed):
    """The layout agrees with the one that CM3 masking makes, wherever the spans fall."""
    ids = TOKENIZER.encode(document)
    config = MaskingConfig(rate=2.0)
    masked = mask(ids, VOCABULARY, config, np.random.default_rng(seed))
    assert TOKENIZER.decode(masked.ids) == document


@settings(deadline=None)
@given(st.sampled_from(["<break>", "</s>", "<sentinel:0>", "<eoss>", "<s>", "<pad>", "<image:3>"]))
def test_text_that_spells_a_control_token_stays_text(text):
    ids = TOKENIZER.encode(Document((Text(text),)))
    assert VOCABULARY.is_text(ids[1:-1]).all()
    assert TOKENIZER.decode(ids) == Document((Text(text),))


@settings(deadline=None)
@given(st.lists(st.integers(-2, VOCABULARY.size + 2), max_size=12))
def test_any_sequence_decodes_or_is_refused_clearly(ids):
    try:
        document = TOKENIZER.decode(np.array([S, *ids, S]))
    except UserError:
        return
    assert not document.holes


class TestAnswers:
    """What a model may write, and what it may not."""

    caption = Document((Hole("text"), PICTURE))
    picture = Document((Text("cat"), Hole("image")))

    @pytest.mark.parametrize("stop", [[], [S], [B], [B, *text_ids("more"), S]])
    def test_a_causal_answer_stops_at_the_end_of_its_part(self, stop):
        assert TOKENIZER.fill(self.picture, [*IMAGE, *stop]).parts[1] == PICTURE

    def test_an_infill_may_be_cut_by_the_length_limit(self):
        assert TOKENIZER.fill(self.caption, text_ids("cat")).parts[0] == Text("cat")

    def test_an_infill_may_be_empty(self):
        assert TOKENIZER.fill(self.caption, [E]).parts[0] == Text("")
        assert TOKENIZER.fill(self.caption, []).parts[0] == Text("")

    def test_holes_that_were_not_reached_stay(self):
        document = Document((Hole("text"), Hole("text"), PICTURE))
        filled = TOKENIZER.fill(document, [*text_ids("cat"), E])
        assert filled.parts == (Text("cat"), Hole("text"), PICTURE)

    def test_provenance_is_kept(self):
        from leon_jax.documents import Provenance

        provenance = Provenance("k", "s", "CC0-1.0", "")
        document = Document(self.caption.parts, provenance)
        assert TOKENIZER.fill(document, [E]).provenance == provenance

    @pytest.mark.parametrize(
        ("document", "ids", "message"),
        [
            (picture, IMAGE[:5], "a picture has 6 ids, not 5"),
            (picture, [*IMAGE, 4], "a picture has 6 ids, not 7"),
            (picture, [*IMAGE[:5], VOCABULARY.text_start], "<text:0> stands inside a part that is"),
            (caption, [IMAGE[0], E], "<image:0> stands inside a part that is text"),
            (caption, [S], "</s> stands inside a part that is text"),
            (caption, [E, sentinel(0), E], "<sentinel:0> stands where <sentinel:1> was expected"),
            (caption, [E, sentinel(1), E], "2 infills were written for 1 holes"),
            (caption, [E, E], "<eoss> stands where a sentinel was expected"),
            (Document((PICTURE,)), [E], "the document has no hole"),
            (caption, np.zeros(3), "ids must be one row of integers, not float64"),
        ],
    )
    def test_malformed_answers_are_refused(self, document, ids, message):
        with pytest.raises(UserError, match=message):
            TOKENIZER.fill(document, ids)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "starts with </s>, not with nothing"),
        ([VOCABULARY.pad, S, S], "starts with </s>, not with <pad>"),
        ([S, *IMAGE], "no </s> at its end"),
        ([S, S, S], "more than one document"),
        ([S, *IMAGE[:3], S], "a picture has 6 ids, not 3"),
        ([S, *IMAGE, *IMAGE, S], "a picture has 6 ids, not 12"),
        ([S, *text_ids("a"), *IMAGE, S], "<text:.*> stands inside a part that is image"),
        ([S, VOCABULARY.pad, S], "<pad> stands inside a part that is text"),
        ([S, VOCABULARY.size, S], "<outside:.*> stands inside a part that is text"),
        ([S, sentinel(0), S], "0 infills are written for 1 sentinels"),
        ([S, sentinel(1), S, sentinel(0), E], "<sentinel:1> stands where <sentinel:0>"),
        ([S, sentinel(0), S, sentinel(0)], "the last infill has no <eoss>"),
        ([S, S, E], "an <eoss> stands where a sentinel was expected"),
    ],
)
def test_malformed_sequences_are_refused(ids, message):
    with pytest.raises(UserError, match=message):
        TOKENIZER.decode(np.array(ids, np.int32))


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (Document((Image(np.zeros((4, 6, 3), np.uint8)),)), "no codes yet"),
        (Document((Image(codes=np.zeros((3, 2), np.int32)),)), r"has \[3, 2\] codes; .* \[2, 3\]"),
        (Document((Image(codes=np.full((2, 3), 8)),)), "has code 8; the vocabulary has 8"),
        (Document((*[Hole("text")] * 5, PICTURE)), "more than 4 holes"),
        ([Document((Hole("text"),)), Document((PICTURE,))], "retrieved document 0 has a hole"),
        ([], "the list is empty"),
    ],
)
def test_documents_that_cannot_be_encoded_are_refused(document, message):
    with pytest.raises(UserError, match=message):
        TOKENIZER.encode(document)


def test_a_prompt_needs_a_hole():
    with pytest.raises(UserError, match="no hole to fill"):
        TOKENIZER.prompt(Document((PICTURE,)))


def test_answers_must_fit_the_holes():
    document = Document((Hole("text"), PICTURE))
    with pytest.raises(UserError, match="2 parts were given for 1 holes"):
        TOKENIZER.answer(document, [Text("a"), Text("b")])
    with pytest.raises(UserError, match="part 0 is Image; hole 0 takes text"):
        TOKENIZER.answer(document, [PICTURE])


def test_the_text_tokenizer_must_fit_the_vocabulary():
    small = Vocabulary.compact(image_codes=8, text_tokens=200)
    with pytest.raises(UserError, match="has 280 tokens, but the vocabulary has room for 200"):
        DocumentTokenizer(small, TOKENIZER.text, (2, 3))
    with pytest.raises(UserError, match="image_shape"):
        DocumentTokenizer(VOCABULARY, TOKENIZER.text, (0, 3))
