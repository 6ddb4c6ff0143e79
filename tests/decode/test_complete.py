"""Completing documents: whatever the holes, each result is a document, and nobody waits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from leon_jax.config import UserError
from leon_jax.decode import loop
from leon_jax.decode.complete import Request, complete, completions
from leon_jax.decode.engine import Engine
from leon_jax.decode.guidance import ClassifierFree, Contrastive, TwoConditions
from leon_jax.decode.sampling import Categorical, Greedy
from leon_jax.decode.strategy import Strategy
from leon_jax.documents import Document, Hole, Image, Text
from leon_jax.tokenizers.documents import DocumentTokenizer
from leon_jax.tokenizers.text import TextTokenizer
from leon_jax.vocabulary import Vocabulary
from tests.tiny import random_decoder

SHAPE = (2, 3)
WORDS = TextTokenizer.train(["red green blue heart star cat"], 270)
VOCABULARY = Vocabulary.compact(image_codes=24, text_tokens=WORDS.size, sentinels=8, multiple=8)
TOKENIZER = DocumentTokenizer(VOCABULARY, WORDS, SHAPE)
STRATEGIES = [
    Strategy(),
    Strategy(ClassifierFree(3.0)),
    Strategy(ClassifierFree(1.5), Categorical(0.7), stop=3),
    Strategy(Contrastive(0.5, 4), Categorical(top_p=0.8), Greedy()),
    Strategy(TwoConditions(1.5, 3.0), text=Categorical(3.0)),
]


def engine(rows: int = 16) -> Engine:
    decoder = random_decoder(VOCABULARY.size, max_length=160, part_step=4)
    return Engine(decoder, VOCABULARY, rows=rows, text_tokens=WORDS.size)


def random_document(rng: np.random.Generator, holes: bool = True) -> Document:
    """One to six parts, some of them holes."""
    makers = [
        lambda: Text(" ".join(rng.choice(["red", "heart", "cat"], rng.integers(1, 4)))),
        lambda: Image(codes=rng.integers(0, 24, SHAPE).astype(np.int32)),
    ]
    if holes:
        makers += [lambda: Hole("text"), lambda: Hole("image")]
    return Document(tuple(makers[rng.integers(len(makers))]() for _ in range(rng.integers(1, 7))))


def random_requests(count: int) -> list[Request]:
    rng = np.random.default_rng(0)
    return [
        Request(
            random_document(rng),
            tuple(random_document(rng, holes=False) for _ in range(rng.integers(2))),
            seed=number,
            strategy=STRATEGIES[rng.integers(len(STRATEGIES))],
            text_limit=4,
        )
        for number in range(count)
    ]


def assert_filled(document: Document, result: Document) -> None:
    assert len(result.parts) == len(document.parts) and not result.holes
    for before, after in zip(document.parts, result.parts, strict=True):
        if not isinstance(before, Hole):
            assert before == after
        elif before.modality == "image":
            assert isinstance(after, Image) and after.codes.shape == SHAPE
        else:
            assert isinstance(after, Text)
    # What was written reads back from its ids.
    assert TOKENIZER.encode(result)[-1] == VOCABULARY.eos


def test_a_thousand_documents_with_any_holes_are_filled_and_no_row_waits():
    """Every row that has something to write writes one id in every step."""
    requests = random_requests(1000)
    advance, before = loop.advance, {}

    def watched(decoder, heads, state, busy, steps, **options):
        before.update(step=int(state.step), counts=np.asarray(state.counts))
        busy = np.asarray(busy)
        after = advance(decoder, heads, state, busy, steps, **options)
        made = int(after.step) - before["step"]
        assert (np.asarray(after.counts) - before["counts"])[busy].tolist() == [[made]] * busy.sum()
        return after

    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("leon_jax.decode.queue.advance", watched)
        for number, result in completions(engine(), TOKENIZER, requests):
            assert number not in found
            found[number] = result
    assert len(found) == 1000
    for number, result in found.items():
        assert_filled(requests[number].document, result)


def test_a_request_alone_is_the_same_among_others():
    requests = random_requests(24)
    together = complete(engine(rows=5), TOKENIZER, requests)
    for request, expected in list(zip(requests, together, strict=True))[::4]:
        assert complete(engine(rows=5), TOKENIZER, [request]) == [expected]


def test_requests_that_ask_the_same_share_their_prompt():
    document = Document((Text("red heart"), Hole("image")))
    mixed = [
        Request(document, seed=seed, strategy=STRATEGIES[1 + 2 * (seed % 2)]) for seed in range(6)
    ]
    prompts = []
    one = engine()
    run = one.run
    one.run = lambda asked: prompts.extend(asked) or run(asked)
    together = complete(one, TOKENIZER, mixed)
    assert [len(prompt.samples) for prompt in prompts] == [6]
    for request, expected in zip(mixed, together, strict=True):
        assert complete(engine(), TOKENIZER, [request]) == [expected]


def test_holes_are_infilled_from_left_to_right_each_seeing_the_ones_before():
    """Greedy pictures are the likeliest ids of one forward pass over the whole sequence.

    Their ids read back as they were written, which those of a text need not.
    """
    greedy = Strategy(image=Greedy())
    parts = (Hole("image"), Text("red heart"), Hole("image"), Hole("image"), Text("cat"))
    document, holes = Document(parts), (0, 2, 3)
    (done,) = complete(engine(), TOKENIZER, [Request(document, strategy=greedy)])
    prompt = TOKENIZER.prompt(document)
    answer = TOKENIZER.answer(document, [done.parts[place] for place in holes])
    ids = np.concatenate([prompt, answer])
    positions = jnp.asarray(VOCABULARY.positions(ids, 4))[None]
    model = engine().decoder
    forward = jax.jit(lambda model, ids, positions: model.logits(model(ids, positions)))
    logits = np.asarray(forward(model, jnp.asarray(ids)[None], positions))[0]
    image = slice(VOCABULARY.image_start, VOCABULARY.image_stop)
    drawn = len(prompt) + np.flatnonzero(VOCABULARY.is_image(answer))
    assert len(drawn) == len(holes) * 6
    likeliest = logits[drawn - 1, image].argmax(axis=-1)
    np.testing.assert_array_equal(ids[drawn] - VOCABULARY.image_start, likeliest)


def ids(*names: str | int) -> list[int]:
    """Ids of these names; a number is a sentinel."""
    marks = {"</s>": VOCABULARY.eos, "|": VOCABULARY.break_id}
    return [
        id_
        for name in names
        for id_ in (
            [VOCABULARY.sentinel(name)]
            if isinstance(name, int)
            else [marks[name]]
            if name in marks
            else [VOCABULARY.text_start + token for token in WORDS.encode(name)]
        )
    ]


@pytest.mark.parametrize(
    ("parts", "told", "others"),
    [
        # The last text is hidden, and stays a hole before the end.
        ((Hole("image"), Text("cat")), (0, "|", "cat", "</s>", 0), (0, "|", 1, "</s>", 0)),
        (
            (Text("red"), Hole("image"), Text("cat")),
            ("red", "|", 0, "|", "cat", "</s>", 0),
            (0, "|", 1, "|", 2, "</s>", 1),
        ),
        ((Text("red"), Hole("image")), ("red", "|"), (0, "|")),
        ((Hole("text"), Text("cat"), Hole("image")), (0, "|", "cat", "|"), (0, "|", 1, "|")),
    ],
)
def test_the_streams_of_guidance_are_of_one_form(parts, told, others):
    prompts = []
    one = engine()
    run = one.run
    one.run = lambda asked: prompts.extend(asked) or run(asked)
    (done,) = complete(one, TOKENIZER, [Request(Document(parts), strategy=STRATEGIES[1])])
    assert_filled(Document(parts), done)
    (prompt,) = prompts
    assert [stream.tolist() for stream in prompt.streams] == [
        ids("</s>", *told),
        ids("</s>", *others),
    ]


def test_pictures_that_are_not_told_are_holes_too():
    codes = np.ones(SHAPE, np.int32)
    parts = (Hole("image"), Image(codes=codes), Text("cat"))
    prompts = []
    one = engine()
    run = one.run
    one.run = lambda asked: prompts.extend(asked) or run(asked)
    complete(one, TOKENIZER, [Request(Document(parts), strategy=STRATEGIES[4])])
    picture = (VOCABULARY.image_start + codes.ravel()).tolist()
    assert [stream.tolist() for stream in prompts[0].streams] == [
        [*ids("</s>", 0, "|"), *picture, *ids("|", "cat", "</s>", 0)],
        [*ids("</s>", 0, "|"), *picture, *ids("|", 1, "</s>", 0)],
        ids("</s>", 0, "|", 1, "|", 2, "</s>", 0),
    ]


def test_any_picture_hole_may_be_begun():
    """Holes before the end, after other holes, and at the end."""
    rng = np.random.default_rng(0)
    for parts in (
        (Hole("image"), Text("cat")),
        (Hole("text"), Hole("image"), Text("cat"), Hole("image"), Text("red")),
        (Text("cat"), Hole("image")),
        (Hole("image"), Hole("text"), Hole("image")),
    ):
        rows = {
            place: rng.integers(0, 24, (1, SHAPE[1]))
            for place, part in enumerate(parts)
            if part == Hole("image")
        }
        begun = Document(
            tuple(Hole("image", rows[n]) if n in rows else p for n, p in enumerate(parts))
        )
        (done,) = complete(
            engine(), TOKENIZER, [Request(begun, strategy=STRATEGIES[1], text_limit=3)]
        )
        assert_filled(begun, done)
        for place, codes in rows.items():
            np.testing.assert_array_equal(done.parts[place].codes[:1], codes)


def test_retrieved_documents_have_no_holes():
    holed = Document((Text("cat"), Hole("image")))
    with pytest.raises(UserError, match="retrieved document 1 has a hole"):
        complete(engine(), TOKENIZER, [Request(holed, (Document((Text("red"),)), holed))])


def test_a_request_that_cannot_be_answered_is_named_and_the_others_finish():
    good = Request(Document((Text("cat"), Hole("image"))))
    long = Request(Document((Text("cat " * 200), Hole("image"))))
    bare = Request(Document((Image(pixels=np.zeros((4, 4, 3), np.uint8)), Hole("text"))))
    results = dict(completions(engine(), TOKENIZER, [long, good, bare]))
    assert "the model's context is 160" in str(results[0])
    assert isinstance(results[0], UserError) and isinstance(results[2], UserError)
    assert_filled(good.document, results[1])
    with pytest.raises(UserError, match=r"request 1: the prompt of .* context is 160"):
        complete(engine(), TOKENIZER, [good, long])
    none = dataclasses.replace(good, text_limit=0)
    results = dict(completions(engine(), TOKENIZER, [none, good]))
    assert "max_tokens is 0" in str(results[0])
    assert_filled(good.document, results[1])


def test_a_document_without_holes_stays_as_it_is():
    whole = Document((Text("cat"), Image(codes=np.ones(SHAPE, np.int32))))
    holed = dataclasses.replace(whole, parts=(*whole.parts, Hole("text")))
    results = complete(engine(), TOKENIZER, [Request(whole), Request(holed)])
    assert results[0] == whole and not results[1].holes
    assert complete(engine(), TOKENIZER, []) == []
