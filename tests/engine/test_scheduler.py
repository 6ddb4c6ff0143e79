"""Queues of prompts: slots, what comes when, compiled programs, draws, and what is refused."""

import dataclasses
import re

import numpy as np
import pytest
from scipy import stats

from leon_jax.config import UserError
from leon_jax.engine import decode_loop, lowering
from leon_jax.engine.compiled_shapes import group_size
from leon_jax.engine.engine import Engine, TokenRequest
from leon_jax.engine.grammar import Forced, ImageSpan, TextSpan
from leon_jax.engine.guidance import ClassifierFree, Contrastive, Plain, TwoConditions
from leon_jax.engine.likelihood import log_likelihoods
from leon_jax.engine.samplers import Categorical, Greedy
from leon_jax.engine.sampling_params import SamplingParams, distinct_variants
from leon_jax.engine.scheduler import Done, Scheduler, Tokens, generate, run
from tests.engine.small import (
    BREAK,
    EOS,
    GUIDED,
    IMAGE,
    LENGTHS,
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
    engine = make(slots=2)
    lengths = [20, 2, 2, 2, 2, 2, 2, 2, 2, 2]
    prompts = [
        prompt(5, (TextSpan(n, (EOS,), EOS, min_tokens=n),), SamplingParams()) for n in lengths
    ]  # fmt: skip
    steps, order = [], []
    advance = decode_loop.decode

    def watched(*arguments, **options):
        state = advance(*arguments, **options)
        steps.append(int(state.step))
        return state

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("leon_jax.engine.scheduler.decode", watched)
        for event in run(engine, prompts):
            if isinstance(event, Done):
                order.append(event.request)
                assert [len(each.ids) for each in event.outputs] == [lengths[event.request]]
    assert steps[-1] == 20
    assert order[-1] in (0, 9) and sorted(order) == list(range(10))


@pytest.mark.parametrize("params", [SamplingParams(), GUIDED])
def test_the_cache_is_written_where_it_is(engine, params):
    """The compiled loop copies no keys and no values."""
    streams = params.guidance.streams
    grammar = (ImageSpan(32),)
    state, _, lower = lowering.lower_programs(
        engine.decoder, VOCABULARY, 8, (16,) * streams, grammar, params
    )
    program = lower().compile().as_text()
    shape = ",".join(map(str, state.caches[0].output_keys[0].values.shape))
    assert f"[{shape}]" in program
    assert not re.search(rf"\[{shape}\]\S* copy\(", program)


@pytest.mark.parametrize(
    ("params", "merge"),
    [
        (SamplingParams(), lambda all_, pictures: all_),
        (
            SamplingParams(Plain(), Categorical(temperature=0.7, top_k=7)),
            lambda all_, pictures: np.where(all_ >= np.sort(all_)[-7], all_ / 0.7, -np.inf),
        ),
        (GUIDED, lambda all_, pictures: pictures + 2 * (all_ - pictures)),
    ],
)
def test_frequencies_of_drawn_ids_fit_the_full_forward_pass(engine, params, merge):
    """The first two ids of many samples of one prompt, seeds 0 to 4,095."""
    count = 4096
    asked = prompt(7, (ImageSpan(2),), params, seeds=range(count), streams=2)
    big = Engine(engine.decoder, VOCABULARY, buckets=(8, 16), slots=count)
    drawn = np.stack([all_ids(parts) for parts in generate(big, [asked])[0]])
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
    events = [e for e in run(engine, [asked], every=4) if isinstance(e, Tokens | Done)]
    assert [len(all_ids(event.outputs)) for event in events] == [4, 8, 9]
    assert [type(event) for event in events] == [Tokens, Tokens, Done]
    whole = all_ids(generate(engine, [asked])[0][0])
    for event in events:
        ids = all_ids(event.outputs)
        np.testing.assert_array_equal(ids, whole[: len(ids)])


def test_what_was_warmed_is_not_compiled_again(engine):
    Scheduler(engine).warm([prompt(3, seeds=(1, 2))])
    before = decode_loop.prefill._cache_size(), decode_loop.decode._cache_size()
    for length in (3, 12, 30, 50):
        generate(engine, [prompt(length, seeds=(3, 4))])
    assert (decode_loop.prefill._cache_size(), decode_loop.decode._cache_size()) == before


def test_scores_are_weighted_log_likelihoods(engine):
    rows = [np.concatenate([prompt(n).streams[0], [BREAK, 5]]) for n in LENGTHS]
    weights = [np.random.default_rng(i).uniform(size=len(row)) for i, row in enumerate(rows)]
    expected_plain, expected_weighted = [], []
    for row, weight in zip(rows, weights, strict=True):
        likelihood = log_softmax(oracle(engine, row))[np.arange(len(row) - 1), row[1:]]
        expected_plain.append(likelihood.sum())
        expected_weighted.append((likelihood * weight[1:]).sum())
    np.testing.assert_allclose(log_likelihoods(engine, rows), expected_plain, rtol=1e-4)
    np.testing.assert_allclose(log_likelihoods(engine, rows, weights), expected_weighted, rtol=1e-4)


def test_no_prompts_no_answers(engine):
    assert generate(engine, []) == []
    assert log_likelihoods(engine, []).shape == (0,)


def test_what_does_not_fit_the_context_is_refused(engine):
    long = np.full(56, TEXT)
    with pytest.raises(UserError, match="context is 64"):
        generate(engine, [TokenRequest((long,), (ImageSpan(9),))])
    assert len(generate(engine, [TokenRequest((long[1:],), (ImageSpan(9),))])[0][0][0].ids) == 9
    with pytest.raises(UserError, match="65 positions"):
        log_likelihoods(engine, [np.full(65, TEXT)])


def test_a_prompt_that_cannot_be_answered_is_named(engine):
    good, text = prompt(4), (TextSpan(4, (EOS,), EOS),)
    for wrong, message in (
        (prompt(4, streams=1), "1 streams; guidance needs 2"),
        (TokenRequest((np.zeros(0, np.int32),), IMAGE), "a stream is empty"),
        (TokenRequest((np.full(60, TEXT),), IMAGE), "context is 64"),
        (TokenRequest(good.streams, ()), "nothing to generate"),
        (TokenRequest(good.streams, IMAGE, ()), "nothing to generate"),
        (prompt(4, seeds=(2**32,)), "seed is 4294967296"),
        (prompt(4, seeds=(-1,)), "seed is -1"),
        (prompt(4, (TextSpan(4, (TEXT,), EOS),)), "ended by text ids"),
        (prompt(4, (TextSpan(4, (EOS,), TEXT),)), "ended by text ids"),
        (prompt(4, text, SamplingParams(text=Categorical(0.0))), "temperature is 0.0"),
        (prompt(4, params=SamplingParams(image=Categorical(top_k=0))), "top_k is 0"),
        (prompt(4, params=SamplingParams(Contrastive(2.0))), "alpha is 2.0"),
        (prompt(4, params=SamplingParams(Contrastive(k=0))), "k is 0"),
        (prompt(4, params=SamplingParams(TwoConditions(-1.0))), "image_guidance is -1"),
        (
            prompt(4, params=SamplingParams(guidance_start=4, guidance_stop=3)),
            "guidance_start is 4",
        ),
    ):
        with pytest.raises((UserError, ValueError), match=f"request 1: .*{message}"):
            generate(engine, [good, wrong])
    with pytest.raises(ValueError, match="sequence is empty"):
        log_likelihoods(engine, [np.zeros(0, np.int32)])
    with pytest.raises(UserError, match="context is 64"):
        Scheduler(engine).warm([prompt(4, (ImageSpan(70),))])


def test_one_span_may_stand_at_several_places():
    """Positions after each `<break>` are rounded up wherever it stands."""
    engine, mark = make(part_step=4), Forced((BREAK,))
    shared = (mark, ImageSpan(5)) * 3 + (mark,)
    apart = tuple(dataclasses.replace(span) for span in shared)
    for before in range(30, 64):
        asked = [TokenRequest((np.full(before, TEXT),), grammar) for grammar in (shared, apart)]
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
    assert group_size(samples, rows) == size


def test_prompts_with_unlike_numbers_of_samples_share_a_queue(engine):
    counts, read = (3, 1, 5, 2), []
    prompts = [prompt(n, seeds=range(count)) for n, count in zip(LENGTHS, counts, strict=True)]
    with pytest.MonkeyPatch.context() as patch:
        begin = decode_loop.prefill
        patch.setattr(
            "leon_jax.engine.scheduler.prefill",
            lambda *a: read.append((a[2] >= 0).sum()) or begin(*a),
        )
        together = generate(engine, prompts)
    assert [len(samples) for samples in together] == list(counts)
    assert sum(read) < sum(counts)
    for asked, samples in zip(prompts, together, strict=True):
        for sample, parts in zip(asked.samples, samples, strict=True):
            alone = dataclasses.replace(asked, samples=(sample,))
            np.testing.assert_array_equal(all_ids(generate(engine, [alone])[0][0]), all_ids(parts))


def test_makes_of_strategies_have_one_order():
    ways = [
        SamplingParams(),
        SamplingParams(Contrastive()),
        SamplingParams(ClassifierFree(), Greedy()),
    ]
    assert distinct_variants(ways) == distinct_variants(ways[::-1])
