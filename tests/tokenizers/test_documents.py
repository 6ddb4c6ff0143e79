"""Encoding documents to ids, and decoding them."""

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
IMAGE = Image(codes=CODES)
S, B, E = VOCABULARY.eos, VOCABULARY.break_id, VOCABULARY.eoss
IMAGE_IDS = [4, 5, 6, 7, 8, 11]

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
    """A document with at most four holes, some at the end, and the filled document."""
    whole = draw(st.lists(filled, min_size=1, max_size=4))
    positions = draw(st.sets(st.integers(0, len(whole) - 1), min_size=1))
    parts = [
        Hole("image" if isinstance(part, Image) else "text") if index in positions else part
        for index, part in enumerate(whole)
    ]
    return Document(tuple(parts)), Document(tuple(whole))


class TestLayout:
    """The sequences of the paper."""

    def test_a_pair(self):
        ids = TOKENIZER.encode(Document((Text("a cat"), IMAGE)))
        assert ids.dtype == np.int32
        assert ids.tolist() == [S, *text_ids("a cat"), B, *IMAGE_IDS, S]

    def test_retrieved_documents_come_first_and_are_separated_by_break_alone(self):
        neighbour = Document((Text("hat"), IMAGE))
        query = Document((IMAGE, Text("cat")))
        ids = TOKENIZER.encode([neighbour, neighbour, query])
        neighbour_ids = [*text_ids("hat"), B, *IMAGE_IDS, B]
        expected = [S, *neighbour_ids, *neighbour_ids, *IMAGE_IDS, B, *text_ids("cat"), S]
        assert ids.tolist() == expected

    def test_text_to_image(self):
        document = Document((Text("cat"), Hole("image")))
        assert TOKENIZER.prompt(document).tolist() == [S, *text_ids("cat"), B]
        assert TOKENIZER.completion(document, [IMAGE]).tolist() == [*IMAGE_IDS, S]

    def test_captioning(self):
        document = Document((Hole("text"), IMAGE))
        prompt = [S, sentinel(0), B, *IMAGE_IDS, S, sentinel(0)]
        assert TOKENIZER.prompt(document).tolist() == prompt
        assert TOKENIZER.encode(document).tolist() == prompt[:-1]
        assert TOKENIZER.completion(document, [Text("cat")]).tolist() == [*text_ids("cat"), E]

    def test_unconditional_images(self):
        document = Document((Hole("text"), Hole("image")))
        assert TOKENIZER.prompt(document).tolist() == [S, sentinel(0), B]
        assert TOKENIZER.completion(document, [IMAGE]).tolist() == [*IMAGE_IDS, S]

    def test_a_document_that_is_a_hole(self):
        assert TOKENIZER.prompt(Document((Hole("image"),))).tolist() == [S]

    def test_holes_of_the_query_behind_retrieved_documents(self):
        neighbour = Document((Text("hat"), IMAGE))
        ids = TOKENIZER.prompt([neighbour, Document((Hole("text"), IMAGE))])
        front = [S, *text_ids("hat"), B, *IMAGE_IDS, B]
        assert ids.tolist() == [*front, sentinel(0), B, *IMAGE_IDS, S, sentinel(0)]

    def test_several_holes_are_completed_in_order(self):
        document = Document((Hole("text"), IMAGE, Hole("image"), Text("hat")))
        hat = text_ids("hat")
        prompt = [S, sentinel(0), B, *IMAGE_IDS, B, sentinel(1), B, *hat, S, sentinel(0)]
        assert TOKENIZER.prompt(document).tolist() == prompt
        completion = [*text_ids("cat"), E, sentinel(1), *IMAGE_IDS, E]
        assert TOKENIZER.completion(document, [Text("cat"), IMAGE]).tolist() == completion

    def test_pixels_are_not_needed(self):
        pixels = np.zeros((4, 6, 3), np.uint8)
        both = Document((Image(pixels, CODES),))
        assert TOKENIZER.encode(both).tolist() == TOKENIZER.encode(Document((IMAGE,))).tolist()


@settings(deadline=None)
@given(documents)
def test_documents_round_trip(document):
    assert TOKENIZER.decode(TOKENIZER.encode(document)) == document


@settings(deadline=None)
@given(st.lists(documents, min_size=1, max_size=3))
def test_retrieved_documents_are_decoded_as_parts_of_one(several):
    parts = tuple(part for document in several for part in document.parts)
    assert TOKENIZER.decode(TOKENIZER.encode(several)) == Document(parts)


@settings(deadline=None)
@given(with_holes(), documents)
def test_the_correct_completion_fills_the_holes(holed, neighbour):
    document, whole = holed
    trailing = isinstance(document.parts[-1], Hole)
    positions = document.holes[-1:] if trailing else document.holes
    contents = [whole.parts[position] for position in positions]
    completion = TOKENIZER.completion([neighbour, document], contents)
    expected = document
    for position in positions:
        expected = expected.replace(position, whole.parts[position])
    assert TOKENIZER.fill([neighbour, document], completion) == expected
    padded = np.append(completion, [VOCABULARY.pad] * 3)
    assert TOKENIZER.fill(document, padded) == expected
    if not expected.holes:
        example = np.concatenate([TOKENIZER.prompt(document), completion])
        assert TOKENIZER.decode(example) == whole


@settings(deadline=None)
@given(documents, st.integers(0, 2**32 - 1))
def test_masked_training_examples_decode_to_the_document(document, seed):
    """The layout agrees with that of CM3 masking, for any spans."""
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
def test_any_sequence_is_decoded_or_rejected_with_a_user_error(ids):
    try:
        document = TOKENIZER.decode(np.array([S, *ids, S]))
    except UserError:
        return
    assert not document.holes


class TestCompletions:
    """Completions that a model may generate, and malformed ones."""

    caption = Document((Hole("text"), IMAGE))
    image = Document((Text("cat"), Hole("image")))

    @pytest.mark.parametrize("stop", [[], [S], [B], [B, *text_ids("more"), S]])
    def test_a_causal_completion_stops_at_the_end_of_its_part(self, stop):
        assert TOKENIZER.fill(self.image, [*IMAGE_IDS, *stop]).parts[1] == IMAGE

    def test_an_infill_may_end_at_the_length_limit(self):
        assert TOKENIZER.fill(self.caption, text_ids("cat")).parts[0] == Text("cat")

    def test_an_infill_may_be_empty(self):
        assert TOKENIZER.fill(self.caption, [E]).parts[0] == Text("")
        assert TOKENIZER.fill(self.caption, []).parts[0] == Text("")

    def test_holes_without_content_stay(self):
        document = Document((Hole("text"), Hole("text"), IMAGE))
        filled = TOKENIZER.fill(document, [*text_ids("cat"), E])
        assert filled.parts == (Text("cat"), Hole("text"), IMAGE)

    def test_provenance_is_kept(self):
        from leon_jax.documents import Provenance

        provenance = Provenance("k", "s", "CC0-1.0", "")
        document = Document(self.caption.parts, provenance)
        assert TOKENIZER.fill(document, [E]).provenance == provenance

    @pytest.mark.parametrize(
        ("document", "ids", "message"),
        [
            (image, IMAGE_IDS[:5], "an image has 6 ids, not 5"),
            (image, [*IMAGE_IDS, 4], "an image has 6 ids, not 7"),
            (image, [*IMAGE_IDS[:5], VOCABULARY.text_start], "<text:0> is inside a part that is"),
            (caption, [IMAGE_IDS[0], E], "<image:0> is inside a part that is text"),
            (caption, [S], "</s> is inside a part that is text"),
            (caption, [E, sentinel(0), E], "<sentinel:0> is where <sentinel:1> was expected"),
            (caption, [E, sentinel(1), E], "there are 2 infills for 1 holes"),
            (caption, [E, E], "<eoss> is where a sentinel was expected"),
            (Document((IMAGE,)), [E], "the document has no hole"),
            (caption, np.zeros(3), "ids must be one row of integers, not float64"),
        ],
    )
    def test_malformed_completions_are_rejected(self, document, ids, message):
        with pytest.raises(UserError, match=message):
            TOKENIZER.fill(document, ids)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "starts with </s>, not with nothing"),
        ([VOCABULARY.pad, S, S], "starts with </s>, not with <pad>"),
        ([S, *IMAGE_IDS], "no </s> at its end"),
        ([S, S, S], "more than one document"),
        ([S, *IMAGE_IDS[:3], S], "an image has 6 ids, not 3"),
        ([S, *IMAGE_IDS, *IMAGE_IDS, S], "an image has 6 ids, not 12"),
        ([S, *text_ids("a"), *IMAGE_IDS, S], "<text:.*> is inside a part that is image"),
        ([S, VOCABULARY.pad, S], "<pad> is inside a part that is text"),
        ([S, VOCABULARY.size, S], "<outside:.*> is inside a part that is text"),
        ([S, sentinel(0), S], "there are 0 infills for 1 sentinels"),
        ([S, sentinel(1), S, sentinel(0), E], "<sentinel:1> is where <sentinel:0>"),
        ([S, sentinel(0), S, sentinel(0)], "the last infill has no <eoss>"),
        ([S, S, E], "an <eoss> is where a sentinel was expected"),
    ],
)
def test_malformed_sequences_are_rejected(ids, message):
    with pytest.raises(UserError, match=message):
        TOKENIZER.decode(np.array(ids, np.int32))


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (Document((Image(np.zeros((4, 6, 3), np.uint8)),)), "no codes yet"),
        (Document((Image(codes=np.zeros((3, 2), np.int32)),)), r"has \[3, 2\] codes; .* \[2, 3\]"),
        (Document((Image(codes=np.full((2, 3), 8)),)), "has code 8; the vocabulary has 8"),
        (Document((*[Hole("text")] * 5, IMAGE)), "more than 4 holes"),
        ([Document((Hole("text"),)), Document((IMAGE,))], "retrieved document 0 has a hole"),
        ([], "the list is empty"),
    ],
)
def test_documents_that_cannot_be_encoded_are_rejected(document, message):
    with pytest.raises(UserError, match=message):
        TOKENIZER.encode(document)


def test_a_prompt_needs_a_hole():
    with pytest.raises(UserError, match="no hole to fill"):
        TOKENIZER.prompt(Document((IMAGE,)))


def test_completions_must_fit_the_holes():
    document = Document((Hole("text"), IMAGE))
    with pytest.raises(UserError, match="there are 2 parts for 1 holes"):
        TOKENIZER.completion(document, [Text("a"), Text("b")])
    with pytest.raises(UserError, match="part 0 is Image; hole 0 takes text"):
        TOKENIZER.completion(document, [IMAGE])


def test_the_text_tokenizer_must_fit_the_vocabulary():
    small = Vocabulary.compact(image_codes=8, text_tokens=200)
    with pytest.raises(UserError, match="has 280 tokens, but the vocabulary has room for 200"):
        DocumentTokenizer(small, TOKENIZER.text, (2, 3))
    with pytest.raises(UserError, match="image_shape"):
        DocumentTokenizer(VOCABULARY, TOKENIZER.text, (0, 3))
