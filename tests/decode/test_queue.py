"""Queues of prompts: slots, what comes when, compiled programs, draws, and what is refused."""

import re

import numpy as np
import pytest
from scipy import stats

from leon_jax.config import UserError
from leon_jax.decode import loop
from leon_jax.decode.engine import Engine, Prompt
from leon_jax.decode.grammar import ImageSpan, TextSpan
from leon_jax.decode.guidance import Plain
from leon_jax.decode.sampling import Categorical
from leon_jax.decode.strategy import Strategy
from tests.decode.small import (
    BREAK,
    EOS,
    GUIDED,
    LENGTHS,
    PICTURE,
    TEXT,
    VOCABULARY,
    all_ids,
    log_softmax,
    make,
    oracle,
    prompt,
)


def test_slots_are_refilled_and_no_row_waits_for_another():
    """Texts of many lengths take as many steps as the busiest slot has ids."""
    engine = make(rows=2)
    lengths = [20, 2, 2, 2, 2, 2, 2, 2, 2, 2]
    prompts = [
        prompt(5, (TextSpan(n, (EOS,), EOS, least=n),), Strategy()) for n in lengths
    ]  # fmt: skip
    steps, order = [], []
    advance = loop.advance

    def watched(*arguments, **options):
        state = advance(*arguments, **options)
        steps.append(int(state.step))
        return state

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("leon_jax.decode.engine.advance", watched)
        for answer in engine.run(prompts):
            order.append(answer.prompt)
            assert [len(part.ids) for part in answer.parts] == [lengths[answer.prompt]]
    assert steps[-1] == 20
    assert order[-1] in (0, 9) and sorted(order) == list(range(10))


@pytest.mark.parametrize("strategy", [Strategy(), GUIDED])
def test_the_cache_is_written_where_it_is(engine, strategy):
    """The compiled loop copies no keys and no values."""
    streams = strategy.guidance.streams
    script = (ImageSpan(32),)
    state, _, lower = loop.programs(
        engine.decoder, VOCABULARY, 8, (16,) * streams, script, strategy
    )
    program = lower().compile().as_text()
    shape = ",".join(map(str, state.caches[0].answer_keys[0].values.shape))
    assert f"[{shape}]" in program
    assert not re.search(rf"\[{shape}\]\S* copy\(", program)


@pytest.mark.parametrize(
    ("strategy", "merge"),
    [
        (Strategy(), lambda all_, pictures: all_),
        (
            Strategy(Plain(), Categorical(temperature=0.7, top_k=7)),
            lambda all_, pictures: np.where(all_ >= np.sort(all_)[-7], all_ / 0.7, -np.inf),
        ),
        (GUIDED, lambda all_, pictures: pictures + 2 * (all_ - pictures)),
    ],
)
def test_frequencies_of_drawn_ids_fit_the_full_forward_pass(engine, strategy, merge):
    """The first two ids of many samples of one prompt, seeds 0 to 4,095."""
    count = 4096
    asked = prompt(7, (ImageSpan(2),), strategy, seeds=range(count), streams=2)
    big = Engine(engine.decoder, VOCABULARY, buckets=(8, 16), rows=count)
    drawn = np.stack([all_ids(parts) for parts in big.answer([asked])[0]])
    images = slice(VOCABULARY.image_start, VOCABULARY.image_stop)
    drawn -= images.start

    def expected(*before) -> np.ndarray:
        written = np.array(before, int) + images.start
        rows = [oracle(engine, np.concatenate([s, written]))[-1, images] for s in asked.streams]
        return np.exp(log_softmax(merge(*rows)))

    first = expected()
    likeliest = int(first.argmax())
    second = expected(likeliest)
    after = drawn[drawn[:, 0] == likeliest, 1]
    for ids, probabilities in ((drawn[:, 0], first), (after, second)):
        counts = np.bincount(ids, minlength=24)
        kept = probabilities > 0
        assert counts[~kept].sum() == 0
        assert stats.chisquare(counts[kept], probabilities[kept] * len(ids)).pvalue > 1e-3


def test_what_there_is_comes_every_few_ids(engine):
    asked = prompt(5, (ImageSpan(9),))
    answers = list(engine.run([asked], every=4))
    assert [len(all_ids(answer.parts)) for answer in answers] == [4, 8, 9]
    assert [answer.done for answer in answers] == [False, False, True]
    whole = all_ids(engine.answer([asked])[0][0])
    for answer in answers:
        ids = all_ids(answer.parts)
        np.testing.assert_array_equal(ids, whole[: len(ids)])


def test_what_was_warmed_is_not_compiled_again(engine):
    engine.warm([prompt(3, seeds=(1, 2))])
    before = loop.begin._cache_size(), loop.advance._cache_size()
    for length in (3, 12, 30, 50):
        engine.answer([prompt(length, seeds=(3, 4))])
    assert (loop.begin._cache_size(), loop.advance._cache_size()) == before


def test_scores_are_weighted_log_likelihoods(engine):
    rows = [np.concatenate([prompt(n).streams[0], [BREAK, 5]]) for n in LENGTHS]
    weights = [np.random.default_rng(i).uniform(size=len(row)) for i, row in enumerate(rows)]
    expected_plain, expected_weighted = [], []
    for row, weight in zip(rows, weights, strict=True):
        likelihood = log_softmax(oracle(engine, row))[np.arange(len(row) - 1), row[1:]]
        expected_plain.append(likelihood.sum())
        expected_weighted.append((likelihood * weight[1:]).sum())
    np.testing.assert_allclose(engine.score(rows), expected_plain, rtol=1e-4)
    np.testing.assert_allclose(engine.score(rows, weights), expected_weighted, rtol=1e-4)


def test_no_prompts_no_answers(engine):
    assert engine.answer([]) == []
    assert engine.score([]).shape == (0,)


def test_what_does_not_fit_the_context_is_refused(engine):
    long = np.full(56, TEXT)
    with pytest.raises(UserError, match="context is 64"):
        engine.answer([Prompt((long,), (ImageSpan(9),))])
    assert len(engine.answer([Prompt((long[1:],), (ImageSpan(9),))])[0][0][0].ids) == 9
    with pytest.raises(UserError, match="65 positions"):
        engine.score([np.full(65, TEXT)])


def test_streams_must_fit_the_guidance(engine):
    with pytest.raises(ValueError, match="1 streams; guidance needs 2"):
        engine.answer([prompt(4, streams=1)])
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        engine.answer([Prompt((np.zeros(0, np.int32),), PICTURE)])
