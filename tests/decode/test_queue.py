"""Queues of prompts: slots, what comes when, compiled programs, draws, and what is refused."""

import dataclasses
import re

import numpy as np
import pytest
from scipy import stats

from leon_jax.config import UserError
from leon_jax.decode import loop
from leon_jax.decode.engine import Engine, Prompt
from leon_jax.decode.grammar import Forced, ImageSpan, TextSpan
from leon_jax.decode.guidance import ClassifierFree, Contrastive, Plain, TwoConditions
from leon_jax.decode.queue import _group
from leon_jax.decode.sampling import Categorical, Greedy
from leon_jax.decode.strategy import Strategy, distinct
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
        patch.setattr("leon_jax.decode.queue.advance", watched)
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


def test_a_prompt_that_cannot_be_answered_is_named(engine):
    good, text = prompt(4), (TextSpan(4, (EOS,), EOS),)
    for wrong, message in (
        (prompt(4, streams=1), "1 streams; guidance needs 2"),
        (Prompt((np.zeros(0, np.int32),), PICTURE), "a stream is empty"),
        (Prompt((np.full(60, TEXT),), PICTURE), "context is 64"),
        (Prompt(good.streams, ()), "nothing to write"),
        (Prompt(good.streams, PICTURE, ()), "nothing to write"),
        (prompt(4, seeds=(2**32,)), "seed is 4294967296"),
        (prompt(4, seeds=(-1,)), "seed is -1"),
        (prompt(4, (TextSpan(4, (TEXT,), EOS),)), "ended by ids of texts"),
        (prompt(4, (TextSpan(4, (EOS,), TEXT),)), "ended by ids of texts"),
        (prompt(4, text, Strategy(text=Categorical(0.0))), "temperature is 0.0"),
        (prompt(4, strategy=Strategy(image=Categorical(top_k=0))), "top_k is 0"),
        (prompt(4, strategy=Strategy(Contrastive(2.0))), "alpha is 2.0"),
        (prompt(4, strategy=Strategy(Contrastive(k=0))), "k is 0"),
        (prompt(4, strategy=Strategy(TwoConditions(-1.0))), "image_guidance is -1"),
        (prompt(4, strategy=Strategy(start=4, stop=3)), "from id 4 to 3"),
    ):
        with pytest.raises((UserError, ValueError), match=f"prompt 1: .*{message}"):
            engine.answer([good, wrong])
    with pytest.raises(ValueError, match="sequence is empty"):
        engine.score([np.zeros(0, np.int32)])
    with pytest.raises(UserError, match="context is 64"):
        engine.warm([prompt(4, (ImageSpan(70),))])


def test_one_span_may_stand_at_several_places():
    """Positions after each `<break>` are rounded up wherever it stands."""
    engine, mark = make(part_step=4), Forced((BREAK,))
    shared = (mark, ImageSpan(5)) * 3 + (mark,)
    apart = tuple(dataclasses.replace(span) for span in shared)
    for before in range(30, 64):
        asked = [Prompt((np.full(before, TEXT),), script) for script in (shared, apart)]
        refused = []
        for each in asked:
            try:
                engine.check(each)
            except UserError:
                refused.append(each)
        assert len(refused) in (0, 2)


@pytest.mark.parametrize(
    ("samples", "rows", "size"),
    [([8, 8, 8, 1], 16, 8), ([8, 7], 16, 8), ([17], 16, 9), ([16], 16, 16), ([1] * 9, 16, 1),
     ([9, 9], 16, 9), ([2, 4], 16, 4), ([40], 16, 14), ([3], 1, 1)],
)  # fmt: skip
def test_samples_share_prompts_without_more_rounds(samples, rows, size):
    assert _group(samples, rows) == size


def test_prompts_with_unlike_numbers_of_samples_share_a_queue(engine):
    counts, read = (3, 1, 5, 2), []
    prompts = [prompt(n, seeds=range(count)) for n, count in zip(LENGTHS, counts, strict=True)]
    with pytest.MonkeyPatch.context() as patch:
        begin = loop.begin
        patch.setattr(
            "leon_jax.decode.queue.begin", lambda *a: read.append((a[2] >= 0).sum()) or begin(*a)
        )
        together = engine.answer(prompts)
    assert [len(samples) for samples in together] == list(counts)
    assert sum(read) < sum(counts)
    for asked, samples in zip(prompts, together, strict=True):
        for sample, parts in zip(asked.samples, samples, strict=True):
            alone = dataclasses.replace(asked, samples=(sample,))
            np.testing.assert_array_equal(all_ids(engine.answer([alone])[0][0]), all_ids(parts))


def test_makes_of_strategies_have_one_order():
    ways = [Strategy(), Strategy(Contrastive()), Strategy(ClassifierFree(), Greedy())]
    assert distinct(ways) == distinct(ways[::-1])
