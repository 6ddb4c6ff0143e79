"""Completing documents: whatever the holes, each result is a document, and nobody waits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from leon_jax.config import UserError
from leon_jax.documents import Document, Hole, Image, Text
from leon_jax.engine import decode_loop
from leon_jax.engine.engine import Engine, Sample
from leon_jax.engine.guidance import ClassifierFree, Contrastive, TwoConditions
from leon_jax.engine.samplers import Categorical, Greedy
from leon_jax.engine.sampling_params import SamplingParams
from leon_jax.engine.scheduler import Scheduler
from leon_jax.generate.completion import complete
from leon_jax.generate.prompt_builder import Request
from leon_jax.tokenizers.documents import DocumentTokenizer
from leon_jax.tokenizers.text import TextTokenizer
from leon_jax.vocabulary import Vocabulary
from tests.tiny import random_decoder

SHAPE = (2, 3)
WORDS = TextTokenizer.train(["red green blue heart star cat"], 270)
VOCABULARY = Vocabulary.compact(image_codes=24, text_tokens=WORDS.size, sentinels=8, multiple=8)
TOKENIZER = DocumentTokenizer(VOCABULARY, WORDS, SHAPE)
PARAMS = [
    SamplingParams(),
    SamplingParams(ClassifierFree(3.0)),
    SamplingParams(ClassifierFree(1.5), Categorical(0.7), guidance_stop=3),
    SamplingParams(Contrastive(0.5, 4), Categorical(top_p=0.8), Greedy()),
    SamplingParams(TwoConditions(1.5, 3.0), text=Categorical(3.0)),
]


def engine(slots: int = 16) -> Engine:
    decoder = random_decoder(VOCABULARY.size, max_length=160, part_step=4)
    return Engine(decoder, VOCABULARY, slots=slots, text_size=WORDS.size)


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
            samples=(sample(number, PARAMS[rng.integers(len(PARAMS))], max_tokens=4),),
        )
        for number in range(count)
    ]


def sample(seed: int = 0, params: SamplingParams = PARAMS[0], max_tokens: int = 64) -> Sample:
    return Sample(seed, dataclasses.replace(params, max_tokens=max_tokens))


def filled(engine: Engine, requests: list[Request]) -> list[Document]:
    """The document of the first sample of each request."""
    documents: list = [None] * len(requests)
    for done in complete(engine, TOKENIZER, requests):
        assert done.error is None, done.error
        documents[done.index] = done.documents[0]
    return documents


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


@pytest.mark.slow
def test_many_documents_with_any_holes_are_filled_and_no_row_waits():
    """Every row that has something to write writes one id in every step."""
    requests = random_requests(250)
    advance, before = decode_loop.decode, {}

    def watched(decoder, heads, state, busy, steps, **options):
        before.update(step=int(state.step), counts=np.asarray(state.counts))
        busy = np.asarray(busy)
        after = advance(decoder, heads, state, busy, steps, **options)
        made = int(after.step) - before["step"]
        assert (np.asarray(after.counts) - before["counts"])[busy].tolist() == [[made]] * busy.sum()
        return after

    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("leon_jax.engine.scheduler.decode", watched)
        for done in complete(engine(), TOKENIZER, iter(requests), window=40):
            assert done.index not in found and done.error is None
            (found[done.index],) = done.documents
    assert len(found) == 250
    for number, result in found.items():
        assert_filled(requests[number].document, result)


@pytest.mark.slow
def test_a_request_alone_is_the_same_among_others():
    requests = random_requests(24)
    together = filled(engine(slots=5), requests)
    for request, expected in list(zip(requests, together, strict=True))[::4]:
        assert filled(engine(slots=5), [request]) == [expected]


def submitted(monkeypatch) -> list:
    """What is given to the scheduler from now on."""
    requests, submit = [], Scheduler.submit
    monkeypatch.setattr(
        Scheduler, "submit", lambda self, asked: requests.append(asked) or submit(self, asked)
    )
    return requests


def test_the_samples_of_a_request_share_its_prompt(monkeypatch):
    document = Document((Text("red heart"), Hole("image")))
    samples = [Sample(seed, PARAMS[1 + 2 * (seed % 2)]) for seed in range(6)]
    token_requests = submitted(monkeypatch)
    (together,) = complete(engine(), TOKENIZER, [Request(document, samples=tuple(samples))])
    assert [len(each.samples) for each in token_requests] == [6]
    for one, expected in zip(samples, together.documents, strict=True):
        assert filled(engine(), [Request(document, samples=(one,))]) == [expected]


def test_samples_whose_guidance_reads_other_streams_need_other_prompts():
    class TextOnly(ClassifierFree):
        conditions = ("all", "nothing")

    document = Document((Text("red heart"), Hole("image")))
    samples = Sample(0, PARAMS[4]), Sample(1, SamplingParams(TextOnly(2.0)))
    (done,) = complete(engine(), TOKENIZER, [Request(document, samples=samples)])
    assert "separate prompts" in str(done.error)
    different = (sample(max_tokens=3), sample(max_tokens=4))
    (done,) = complete(engine(), TOKENIZER, [Request(document, samples=different)])
    assert "max_tokens is [3, 4]" in str(done.error)


def test_holes_are_infilled_from_left_to_right_each_seeing_the_ones_before():
    """Greedy images are the likeliest ids of one forward pass over the whole sequence.

    Their ids read back as they were written, which those of a text need not.
    """
    greedy = SamplingParams(image=Greedy())
    parts = (Hole("image"), Text("red heart"), Hole("image"), Hole("image"), Text("cat"))
    document, holes = Document(parts), (0, 2, 3)
    (done,) = filled(engine(), [Request(document, samples=(Sample(0, greedy),))])
    prompt = TOKENIZER.prompt(document)
    answer = TOKENIZER.completion(document, [done.parts[place] for place in holes])
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
def test_the_streams_of_guidance_are_of_one_form(monkeypatch, parts, told, others):
    prompts = submitted(monkeypatch)
    (done,) = filled(engine(), [Request(Document(parts), samples=(Sample(0, PARAMS[1]),))])
    assert_filled(Document(parts), done)
    (prompt,) = prompts
    assert [stream.tolist() for stream in prompt.streams] == [
        ids("</s>", *told),
        ids("</s>", *others),
    ]


def test_images_that_a_stream_does_not_read_are_holes_too(monkeypatch):
    codes = np.ones(SHAPE, np.int32)
    parts = (Hole("image"), Image(codes=codes), Text("cat"))
    prompts = submitted(monkeypatch)
    filled(engine(), [Request(Document(parts), samples=(Sample(0, PARAMS[4]),))])
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
        (done,) = filled(engine(), [Request(begun, samples=(sample(0, PARAMS[1], max_tokens=3),))])
        assert_filled(begun, done)
        for place, codes in rows.items():
            np.testing.assert_array_equal(done.parts[place].codes[:1], codes)


def test_retrieved_documents_have_no_holes():
    holed = Document((Text("cat"), Hole("image")))
    request = Request(holed, (Document((Text("red"),)), holed))
    (done,) = complete(engine(), TOKENIZER, [request])
    assert "retrieved document 1 has a hole" in str(done.error)


def test_a_request_that_cannot_be_answered_is_named_and_the_others_finish():
    good = Request(Document((Text("cat"), Hole("image"))))
    long = Request(Document((Text("cat " * 200), Hole("image"))))
    bare = Request(Document((Image(pixels=np.zeros((4, 4, 3), np.uint8)), Hole("text"))))
    none = Request(good.document, samples=(sample(max_tokens=0),))
    done = {
        each.index: each
        for each in complete(engine(), TOKENIZER, [long, good, bare, none, UserError("lost")])
    }
    assert "the model's context is 160" in str(done[0].error)
    assert isinstance(done[2].error, UserError) and str(done[4].error) == "lost"
    assert "max_tokens is 0" in str(done[3].error)
    assert_filled(good.document, done[1].documents[0])


def test_a_document_without_holes_stays_as_it_is():
    whole = Document((Text("cat"), Image(codes=np.ones(SHAPE, np.int32))))
    holed = dataclasses.replace(whole, parts=(*whole.parts, Hole("text")))
    results = filled(engine(), [Request(whole), Request(holed)])
    assert results[0] == whole and not results[1].holes
    assert filled(engine(), []) == []
