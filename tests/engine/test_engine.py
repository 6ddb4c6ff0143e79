"""The engine agrees with the full forward pass, keeps to the grammar, and is reproducible."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from leon_jax import sharding
from leon_jax.engine import decode_loop
from leon_jax.engine.engine import Engine
from leon_jax.engine.grammar import ImageSpan, TextSpan
from leon_jax.engine.guidance import ClassifierFree, Contrastive, Plain, TwoConditions
from leon_jax.engine.samplers import Categorical, Greedy
from leon_jax.engine.sampling_params import SamplingParams
from leon_jax.engine.scheduler import generate
from tests import simulated_devices
from tests.engine.small import (
    EOS,
    GRAMMARS,
    IMAGE,
    INFILLS,
    LENGTHS,
    STORY,
    TEXT,
    VOCABULARY,
    all_ids,
    assert_full_pass_agrees,
    make,
    oracle,
    prompt,
    replay,
)


@pytest.mark.parametrize("grammar", GRAMMARS)
def test_cached_decoding_equals_the_full_forward_pass_at_every_position(either, grammar):
    prompts = [prompt(length, grammar) for length in LENGTHS]
    assert_full_pass_agrees(either, prompts, grammar)


@pytest.mark.parametrize("grammar", [IMAGE, INFILLS])
@pytest.mark.parametrize("guidance", [ClassifierFree(3.0), TwoConditions(1.5, 3.0)])
def test_greedy_guided_decoding_equals_a_loop_of_full_forward_passes(either, grammar, guidance):
    params = SamplingParams(guidance, Greedy(), Greedy())
    asked = prompt(12, grammar, params)
    ((parts,),) = generate(either, [asked])
    start, stop = VOCABULARY.image_start, VOCABULARY.image_stop
    ids = [replay(grammar, parts, stream) for stream in range(guidance.streams)]
    for place in np.flatnonzero(ids[0][1]):
        token, allowed = ids[0][0][place], ids[0][2][place]
        logits = [
            oracle(either, np.concatenate([stream, seen[:place]]))[-1].astype(np.float64)
            for stream, (seen, _, _) in zip(asked.streams, ids, strict=False)
        ]
        if not allowed[start]:
            assert token == np.argmax(np.where(allowed, logits[0], -np.inf))
            continue
        if guidance.streams == 2:
            merged = logits[1] + 3.0 * (logits[0] - logits[1])
        else:
            merged = logits[2] + 1.5 * (logits[1] - logits[2]) + 3.0 * (logits[0] - logits[1])
        assert token - start == np.argmax(merged[start:stop])


@pytest.mark.slow
def test_guidance_of_one_is_no_guidance(engine):
    plain = generate(engine, [prompt(n, params=SamplingParams(Plain())) for n in LENGTHS])
    for guidance in (ClassifierFree(1.0), TwoConditions(1.0, 1.0)):
        guided = generate(engine, [prompt(n, params=SamplingParams(guidance)) for n in LENGTHS])
        for left, right in zip(guided, plain, strict=True):
            np.testing.assert_array_equal(left[0][0].ids, right[0][0].ids)


def test_guidance_changes_the_answer(engine):
    weak, strong = (
        generate(
            engine, [prompt(n, params=SamplingParams(ClassifierFree(w), Greedy())) for n in LENGTHS]
        )
        for w in (1.0, 8.0)
    )
    assert any((a[0][0].ids != b[0][0].ids).any() for a, b in zip(weak, strong, strict=True))


# Rows of every kind, for one run.
UNLIKE = [
    prompt(3, IMAGE, seeds=(1, 2)),
    prompt(12, STORY, seeds=(3, 4)),
    prompt(
        7, INFILLS, SamplingParams(Contrastive(0.3, 4), Categorical(0.7), Greedy()), seeds=(5, 6)
    ),
    prompt(8, (TextSpan.infill(VOCABULARY, 9),), SamplingParams(), seeds=(7, 8)),
    prompt(9, (ImageSpan(4),), SamplingParams(Plain(), Categorical(top_p=0.5)), seeds=(9, 10)),
    prompt(
        5,
        (ImageSpan(9),),
        SamplingParams(ClassifierFree(5.0), guidance_start=2, guidance_stop=5),
        seeds=(11, 12),
    ),
    prompt(
        6, IMAGE, SamplingParams(TwoConditions(2.0, 4.0), Categorical(2.0, top_k=5)), seeds=(1, 3)
    ),
]


def assert_same(left, right):
    for ours, theirs in zip(left, right, strict=True):
        np.testing.assert_array_equal(ours.ids, theirs.ids)
        np.testing.assert_allclose(ours.log_probabilities, theirs.log_probabilities, atol=1e-4)
        assert ours.ended == theirs.ended


@pytest.fixture(scope="module")
def alone():
    """Every sample of `UNLIKE`, answered by itself."""
    with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1])):
        engine = make(4)
        return [
            [generate(engine, [dataclasses.replace(p, samples=(s,))])[0][0] for s in p.samples]
            for p in UNLIKE
        ]


@pytest.mark.parametrize("slots", [2, 3, 16])
def test_a_row_alone_is_the_same_row_in_any_batch_and_slot(alone, slots):
    together = generate(make(4, slots), UNLIKE)
    backwards = generate(make(4, slots), UNLIKE[::-1])[::-1]
    for answers in (together, backwards):
        for found, wanted in zip(answers, alone, strict=True):
            for left, right in zip(found, wanted, strict=True):
                assert_same(left, right)


@pytest.mark.slow
def test_samples_that_share_a_prompt_are_those_of_separate_prompts(engine):
    shared = prompt(12, INFILLS, seeds=range(6))
    (together,) = generate(engine, [shared])
    separate = generate(
        engine, [dataclasses.replace(shared, samples=(sample,)) for sample in shared.samples]
    )
    for left, (right,) in zip(together, separate, strict=True):
        assert_same(left, right)


@pytest.mark.slow
def test_a_longer_bucket_changes_nothing(engine):
    longer = Engine(engine.decoder, VOCABULARY, buckets=())
    for left, right in zip(generate(engine, UNLIKE), generate(longer, UNLIKE), strict=True):
        for ours, theirs in zip(left, right, strict=True):
            assert_same(ours, theirs)


@pytest.mark.slow
def test_answers_do_not_depend_on_the_mesh():
    program = Path(__file__).with_name("on_eight_devices.py")
    environment = simulated_devices.environment()
    done = subprocess.run(
        [sys.executable, str(program)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("equal") == 4


def test_the_sliced_head_draws_what_the_whole_head_would(engine):
    """An image beside a text is sampled from the whole head, an image alone from its slice."""
    picture = prompt(5, IMAGE)
    text = prompt(6, (TextSpan(9, (EOS,), EOS, min_tokens=9),), SamplingParams())
    (beside,), _ = generate(engine, [picture, text])
    ((alone,),) = generate(engine, [picture])
    assert_same(beside, alone)


def test_the_seed_decides_the_draw(engine):
    (answers,) = generate(engine, [prompt(5, seeds=(3, 4, 3, 5))])
    ids = [tuple(all_ids(parts)) for parts in answers]
    assert ids[0] == ids[2]
    assert len(set(ids)) == 3


def test_outside_its_interval_guidance_is_plain(engine):
    """Greedy images: with guidance nowhere, everywhere, and in the middle."""

    def draw(**interval):
        params = SamplingParams(ClassifierFree(6.0), Greedy(), **interval)
        return all_ids(generate(engine, [prompt(7, params=params)])[0][0])

    plain = all_ids(generate(engine, [prompt(7, params=SamplingParams(Plain(), Greedy()))])[0][0])
    np.testing.assert_array_equal(draw(guidance_stop=0), plain)
    np.testing.assert_array_equal(draw(guidance_stop=9), draw())
    np.testing.assert_array_equal(draw(guidance_start=3)[:3], plain[:3])
    np.testing.assert_array_equal(draw(guidance_stop=4)[:4], draw()[:4])


def test_past_the_interval_the_other_stream_is_not_computed(engine):
    """Its cache stays empty there, while that of stream 0 fills."""
    asked = prompt(7, (ImageSpan(20),), SamplingParams(ClassifierFree(6.0), guidance_stop=5))
    kept = []
    advance = decode_loop.decode

    def watched(*arguments, **options):
        kept.append(advance(*arguments, **options))
        return kept[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("leon_jax.engine.scheduler.decode", watched)
        generate(engine, [asked])
    filled = [
        np.asarray(jnp.abs(cache.output_keys[0].values).sum(axis=(0, 1, 2, 3, 5)) > 0)
        for cache in kept[-1].caches
    ]
    assert filled[0].sum() == 20
    # The id before the last guided one is the last that the other stream reads.
    assert filled[1].sum() == 4


@pytest.mark.parametrize("limit", [1, 5, 16])
def test_an_image_is_exactly_its_number_of_image_ids(engine, limit):
    for ((part,),) in generate(engine, [prompt(n, (ImageSpan(limit),)) for n in LENGTHS]):
        assert len(part.ids) == limit
        assert VOCABULARY.is_image(part.ids).all()
        assert part.ended


def test_text_holds_text_ids_only_and_at_least_one(engine):
    hot = SamplingParams(text=Categorical(temperature=3.0))
    rows = prompt(4, (TextSpan.causal(VOCABULARY, 12),), hot, seeds=range(64))
    (answers,) = generate(Engine(engine.decoder, VOCABULARY, text_size=30), [rows])
    for (part,) in answers:
        assert 1 <= len(part.ids) <= 12
        assert VOCABULARY.is_text(part.ids).all() and part.ids.max() < TEXT + 30
        assert part.ended == (len(part.ids) < 12)
    assert {part.ended for (part,) in answers} == {True, False}


def test_stops_end_where_the_model_is_sure_of_them(engine):
    # Without sampling, the answer is cut at the first stop a full forward pass would choose.
    span = TextSpan.infill(VOCABULARY, 12)
    prompts = [prompt(n, (span,), SamplingParams(text=Greedy())) for n in LENGTHS]
    for asked, ((part,),) in zip(prompts, generate(engine, prompts), strict=True):
        if not part.ended:
            continue
        logits = oracle(engine, np.concatenate([asked.streams[0], part.ids]))[-1]
        others = logits[TEXT:].max()
        assert logits[VOCABULARY.eoss] >= others - 1e-4


def test_a_final_stop_ends_the_row_and_another_the_text(engine):
    hot = SamplingParams(Plain(), text=Categorical(temperature=4.0))
    story = (dataclasses.replace(STORY[0], limit=24), *STORY[1:])
    (answers,) = generate(engine, [prompt(4, story, hot, seeds=range(32))])
    lengths = {len(parts) for parts in answers}
    assert lengths == {1, 4}
    for parts in answers:
        assert len(parts) == 1 or len(parts[1].ids) == 6
