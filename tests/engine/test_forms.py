"""The engine agrees with the full forward pass for decoders of other forms than CM3Leon's."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from leon_jax.engine.engine import Engine, Sample, TokenRequest
from leon_jax.engine.grammar import ImageSpan
from leon_jax.engine.guidance import ClassifierFree
from leon_jax.engine.likelihood import log_likelihoods
from leon_jax.engine.samplers import Greedy
from leon_jax.engine.sampling_params import SamplingParams
from leon_jax.engine.scheduler import generate
from leon_jax.models.weight_conversion import convert_weights, unstack
from tests import simulated_devices
from tests.engine.small import (
    BREAK,
    EOS,
    GRAMMARS,
    LENGTHS,
    VOCABULARY,
    assert_full_pass_agrees,
    log_softmax,
    make,
    oracle,
    prompt,
)
from tests.models.forms import FORMS

# A head without rows for text can only generate images.
NAMES = [name for name in FORMS if name not in ("cm3leon", "image_head")]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("grammar", [GRAMMARS[3], GRAMMARS[4]], ids=["story", "infills"])
def test_cached_decoding_equals_the_full_forward_pass(name, grammar):
    engine = make(**FORMS[name])
    assert_full_pass_agrees(
        engine, [prompt(length, grammar, seeds=(0, 1)) for length in LENGTHS], grammar
    )


@pytest.mark.parametrize("name", ["grid", "llamagen", "image_head"])
@pytest.mark.parametrize("part_step", [1, 4])
def test_an_image_that_the_prompt_begins_is_continued_in_its_grid(name, part_step):
    engine = make(part_step, **FORMS[name])
    image = VOCABULARY.image_start + np.arange(4)
    ids = np.array([EOS, VOCABULARY.text_start, BREAK, *image])
    grammar = (ImageSpan(5),)
    requests = [TokenRequest((ids,), grammar, (Sample(seed=3),)), prompt(8, grammar, streams=1)]
    requests = [dataclasses.replace(each, samples=(Sample(seed=3),)) for each in requests]
    assert_full_pass_agrees(engine, requests, grammar)


@pytest.mark.parametrize("name", ["llama", "chameleon", "grid", "image_head"])
def test_greedy_guided_decoding_equals_a_loop_of_full_forward_passes(name):
    made = make(**FORMS[name])
    engine = Engine(unstack(made.decoder), VOCABULARY, buckets=(8, 16))
    request = prompt(12, (ImageSpan(9),), SamplingParams(ClassifierFree(3.0), Greedy(), Greedy()))
    (((part,),),) = generate(engine, [request])
    codes = slice(VOCABULARY.image_start, VOCABULARY.image_stop)
    for place, token in enumerate(part.ids):
        conditional, unconditional = (
            oracle(engine, np.concatenate([stream, part.ids[:place]]))[-1, codes].astype(np.float64)
            for stream in request.streams[:2]
        )
        images = unconditional + 3.0 * (conditional - unconditional)
        assert images[token - VOCABULARY.image_start] == pytest.approx(images.max(), abs=1e-4)


@pytest.mark.parametrize("name", ["llama_biases", "chameleon_post", "grid", "image_head"])
def test_weights_in_eight_bits_decode_as_they_run_uncached(name):
    made = make(**FORMS[name])
    engine = Engine(convert_weights(made.decoder, "int8"), VOCABULARY, buckets=(8, 16))
    grammar = (ImageSpan(9),)
    assert_full_pass_agrees(
        engine, [prompt(length, grammar) for length in LENGTHS], grammar, atol=1e-3
    )


@pytest.mark.parametrize("name", ["llama", "grid"])
def test_a_cache_in_eight_bits_nearly_agrees(name):
    made, grammar = make(**FORMS[name]), (ImageSpan(9),)
    engine = Engine(made.decoder, VOCABULARY, buckets=(8, 16), cache_dtype="int8")
    assert_full_pass_agrees(
        engine, [prompt(length, grammar) for length in LENGTHS], grammar, atol=0.2
    )


def test_ids_that_the_head_has_no_row_for_are_not_scored():
    engine = make(**FORMS["image_head"])
    ids = np.concatenate([prompt(8).streams[0], VOCABULARY.image_start + np.arange(9), [EOS]])
    is_scored = VOCABULARY.is_image(ids[1:])
    logs = log_softmax(oracle(engine, ids)[:-1])[is_scored]
    scores = np.take_along_axis(logs, ids[1:][is_scored, None], axis=1)
    assert log_likelihoods(engine, [ids])[0] == pytest.approx(scores.sum(), abs=1e-3)


@pytest.mark.parametrize("name", ["llama", "grid"])
def test_likelihoods_equal_those_of_the_full_forward_pass(name):
    engine = make(**FORMS[name])
    ids = np.concatenate([prompt(8).streams[0], VOCABULARY.image_start + np.arange(9), [EOS]])
    scores = np.take_along_axis(log_softmax(oracle(engine, ids)[:-1]), ids[1:, None], axis=1)
    assert log_likelihoods(engine, [ids])[0] == pytest.approx(scores.sum(), abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "grid", "image_head"])
def test_answers_do_not_depend_on_the_mesh(name):
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("on_eight_devices.py")), name],
        env=simulated_devices.environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("equal") == 2
