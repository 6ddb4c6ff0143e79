"""The engine agrees with the full forward pass, keeps to the grammar, and is reproducible."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from leon_jax import sharding
from leon_jax.config import UserError
from leon_jax.decode.engine import Engine, Prompt
from leon_jax.decode.grammar import ImageSpan, TextSpan
from leon_jax.decode.guidance import ClassifierFree, Contrastive, Plain
from leon_jax.decode.sampling import Categorical, Greedy
from leon_jax.vocabulary import Vocabulary
from tests.tiny import random_decoder

VOCABULARY = Vocabulary.compact(image_codes=24, text_tokens=40, sentinels=4, multiple=8)
TEXT = VOCABULARY.text_start
UNCONDITIONAL = np.array([VOCABULARY.eos, VOCABULARY.sentinel(0), VOCABULARY.break_id])


@pytest.fixture(params=[1, 4])
def engine(request) -> Engine:
    """With parts that start anywhere, and with parts that start at every fourth position."""
    decoder = random_decoder(VOCABULARY.size, max_length=48, part_step=request.param)
    return Engine(decoder, VOCABULARY, buckets=(8, 16))


def prompt(length: int, seed: int = 0, streams: int = 2) -> Prompt:
    ids = TEXT + np.random.default_rng(length).integers(0, 40, length)
    ids[[length // 2, -1]] = VOCABULARY.break_id
    return Prompt((ids, UNCONDITIONAL)[:streams], seed)


PROMPTS = [prompt(3, 1), prompt(12, 2), prompt(7, 3), prompt(8, 4)]
SPANS = [ImageSpan(9), TextSpan.infill(VOCABULARY, 9), TextSpan.causal(VOCABULARY, 9)]


def oracle(engine: Engine, ids: np.ndarray) -> np.ndarray:
    """Logits of every position by one full forward pass, float32[n, vocab]."""
    padded = np.pad(ids, (0, engine.context - len(ids)))
    positions = VOCABULARY.positions(padded, engine.decoder.config.part_step)
    positions = jnp.asarray(positions.clip(max=engine.context - 1))[None]
    return np.asarray(forward(engine.decoder, jnp.asarray(padded)[None], positions))[0, : len(ids)]


@jax.jit
def forward(decoder, ids, positions):
    return decoder.logits(decoder(ids, positions))


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("span", SPANS)
def test_cached_decoding_equals_the_full_forward_pass_at_every_position(engine, span):
    answers = engine.fill(PROMPTS, span, ClassifierFree(2.0))
    for row, answer in zip(PROMPTS, answers, strict=True):
        whole = np.concatenate([row.streams[0], answer.ids])
        logits = oracle(engine, whole)[len(row.streams[0]) - 1 : -1]
        allowed = np.zeros(VOCABULARY.size, bool)
        if isinstance(span, ImageSpan):
            allowed[VOCABULARY.image_start : VOCABULARY.image_stop] = True
            logits = np.where(allowed, logits, -np.inf)
        else:
            allowed[TEXT:] = True
            stops = np.zeros_like(allowed)
            stops[list(span.stops)] = True
            steps = np.arange(len(answer.ids))[:, None]
            logits = np.where(allowed | (stops & (steps >= span.least)), logits, -np.inf)
        expected = np.take_along_axis(log_softmax(logits), answer.ids[:, None], axis=1)[:, 0]
        np.testing.assert_allclose(answer.log_probabilities, expected, atol=1e-4)


def test_greedy_guided_decoding_equals_a_loop_of_full_forward_passes(engine):
    guidance, start, stop = ClassifierFree(3.0), VOCABULARY.image_start, VOCABULARY.image_stop
    (answer,) = engine.fill(PROMPTS[1:2], ImageSpan(6), guidance, Greedy())
    streams = [list(stream) for stream in PROMPTS[1].streams]
    for token in answer.ids:
        cond, uncond = (oracle(engine, np.array(ids))[-1, start:stop] for ids in streams)
        assert token - start == np.argmax(uncond + 3.0 * (cond - uncond))
        for ids in streams:
            ids.append(token)


def test_guidance_of_one_is_no_guidance(engine):
    guided = engine.fill(PROMPTS, ImageSpan(9), ClassifierFree(1.0))
    plain = engine.fill([Prompt(p.streams[:1], p.seed) for p in PROMPTS], ImageSpan(9), Plain())
    for left, right in zip(guided, plain, strict=True):
        np.testing.assert_array_equal(left.ids, right.ids)


def test_guidance_changes_the_answer(engine):
    weak, strong = (
        engine.fill(PROMPTS, ImageSpan(9), ClassifierFree(w), Greedy()) for w in (1.0, 8.0)
    )
    assert any((a.ids != b.ids).any() for a, b in zip(weak, strong, strict=True))


@pytest.mark.parametrize("span", SPANS[:2])
@pytest.mark.parametrize("guidance", [ClassifierFree(2.0), Contrastive(0.3, 4)])
def test_a_row_alone_is_the_same_row_in_a_batch(engine, span, guidance):
    together = engine.fill(PROMPTS, span, guidance)
    for row, expected in zip(PROMPTS, together, strict=True):
        (alone,) = engine.fill([row], span, guidance)
        np.testing.assert_array_equal(alone.ids, expected.ids)
        np.testing.assert_allclose(alone.log_probabilities, expected.log_probabilities, atol=1e-4)


def test_the_seed_decides_the_draw(engine):
    seeds = [3, 4, 3, 5]
    answers = engine.fill([prompt(5, seed) for seed in seeds], ImageSpan(9), ClassifierFree(2.0))
    ids = [tuple(answer.ids) for answer in answers]
    assert ids[0] == ids[2]
    assert len(set(ids)) == 3


@pytest.mark.parametrize("limit", [1, 5, 16])
def test_an_image_is_exactly_its_number_of_image_ids(engine, limit):
    for answer in engine.fill(PROMPTS, ImageSpan(limit), ClassifierFree(2.0)):
        assert len(answer.ids) == limit
        assert VOCABULARY.is_image(answer.ids).all()
        assert answer.ended


def test_text_holds_text_ids_only_and_at_least_one(engine):
    rows = [prompt(4, seed, streams=1) for seed in range(64)]
    span = TextSpan.causal(VOCABULARY, 12)
    answers = engine.fill(rows, span, sampler=Categorical(temperature=3.0))
    for answer in answers:
        assert 1 <= len(answer.ids) <= 12
        assert VOCABULARY.is_text(answer.ids).all()
        assert answer.ended or len(answer.ids) == 12
    assert {answer.ended for answer in answers} == {True, False}


def test_stops_end_where_the_model_is_sure_of_them(engine):
    # Without sampling, the answer is cut at the first stop a full forward pass would choose.
    span = TextSpan.infill(VOCABULARY, 12)
    answers = engine.fill([Prompt(p.streams[:1]) for p in PROMPTS], span, sampler=Greedy())
    for row, answer in zip(PROMPTS, answers, strict=True):
        if not answer.ended:
            continue
        logits = oracle(engine, np.concatenate([row.streams[0], answer.ids]))[-1]
        others = logits[TEXT:].max()
        assert logits[VOCABULARY.eoss] >= others - 1e-4


def test_scores_are_weighted_log_likelihoods(engine):
    rows = [np.concatenate([p.streams[0], [VOCABULARY.break_id, 5]]) for p in PROMPTS]
    weights = [np.random.default_rng(i).uniform(size=len(row)) for i, row in enumerate(rows)]
    expected_plain, expected_weighted = [], []
    for row, weight in zip(rows, weights, strict=True):
        likelihood = log_softmax(oracle(engine, row))[np.arange(len(row) - 1), row[1:]]
        expected_plain.append(likelihood.sum())
        expected_weighted.append((likelihood * weight[1:]).sum())
    np.testing.assert_allclose(engine.score(rows), expected_plain, rtol=1e-4)
    np.testing.assert_allclose(engine.score(rows, weights), expected_weighted, rtol=1e-4)


def test_no_prompts_no_answers(engine):
    assert engine.fill([], ImageSpan(3)) == []
    assert engine.score([]).shape == (0,)


def test_what_does_not_fit_the_context_is_refused(engine):
    with pytest.raises(UserError, match="context is 48"):
        engine.fill([Prompt((np.full(40, TEXT),))], ImageSpan(9))
    assert len(engine.fill([Prompt((np.full(39, TEXT),))], ImageSpan(9))[0].ids) == 9
    with pytest.raises(UserError, match="49 positions"):
        engine.score([np.full(49, TEXT)])


def test_streams_must_fit_the_guidance(engine):
    with pytest.raises(ValueError, match="1 streams; guidance needs 2"):
        engine.fill([prompt(4, streams=1)], ImageSpan(3), ClassifierFree(2.0))


def test_answers_do_not_depend_on_the_mesh(engine):
    devices = jax.devices()
    if len(devices) < 8:
        devices = devices[:1]
    expected = engine.fill(PROMPTS, ImageSpan(9), ClassifierFree(2.0))
    shape = (2, 2, 1, 2) if len(devices) >= 8 else (1, 1, 1, 1)
    with jax.set_mesh(sharding.make_mesh(shape, devices[:8])):
        step = engine.decoder.config.part_step
        decoder = random_decoder(VOCABULARY.size, max_length=48, part_step=step)
        sharded = Engine(decoder, VOCABULARY, buckets=(8, 16))
        answers = sharded.fill(PROMPTS, ImageSpan(9), ClassifierFree(2.0))
    for left, right in zip(answers, expected, strict=True):
        np.testing.assert_array_equal(left.ids, right.ids)
