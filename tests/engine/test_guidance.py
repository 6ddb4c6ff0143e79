"""Guidance follows its formulas, computed here again in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from leon_jax.config import UserError
from leon_jax.engine.guidance import (
    ClassifierFree,
    Contrastive,
    Plain,
    TwoConditions,
    make_guidance,
)
from leon_jax.engine.samplers import Greedy
from leon_jax.engine.sampling_params import SamplingParams


@pytest.fixture
def logits() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2, 3, 11)).astype(np.float32)


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def test_plain_reads_the_first_stream(logits):
    np.testing.assert_array_equal(Plain()(jnp.asarray(logits)), logits[0])


@pytest.mark.parametrize("weight", [0.0, 0.5, 3.0, 7.5])
def test_classifier_free_extrapolates_from_the_unconditional_stream(logits, weight):
    expected = logits[1] + weight * (logits[0].astype(np.float64) - logits[1])
    got = ClassifierFree(weight)(jnp.asarray(logits))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_weight_one_is_the_conditional_stream_to_the_last_bit(logits):
    np.testing.assert_array_equal(ClassifierFree(1.0)(jnp.asarray(logits)), logits[0])


@pytest.mark.parametrize(("image", "text"), [(1.5, 7.5), (1.0, 1.0), (0.0, 2.0), (3.0, 1.0)])
def test_two_conditions_each_have_a_weight(image, text):
    logits = np.random.default_rng(1).normal(size=(3, 4, 11)).astype(np.float32)
    everything, pictures, nothing = logits.astype(np.float64)
    expected = nothing + image * (pictures - nothing) + text * (everything - pictures)
    got = TwoConditions(image, text)(jnp.asarray(logits))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    if image == text == 1:
        np.testing.assert_array_equal(got, logits[0])


def test_contrastive_with_k_of_one_is_contrastive_decoding(logits):
    """Li et al. 2022, equation 2: at least alpha times as likely as the likeliest."""
    expert, amateur = np.exp(log_softmax(logits))
    head = expert >= 0.2 * expert.max(axis=-1, keepdims=True)
    expected = np.where(head, np.log(expert) - np.log(amateur), -np.inf)
    np.testing.assert_allclose(Contrastive(0.2, 1)(jnp.asarray(logits)), expected, atol=1e-5)


@pytest.mark.parametrize(("alpha", "k"), [(0.5, 1), (0.5, 3), (1.0, 4), (0.1, 100)])
def test_contrastive_scores_the_plausible_set_only(logits, alpha, k):
    expert, amateur = log_softmax(logits)
    kth = np.sort(np.exp(expert), axis=-1)[:, ::-1][:, min(k, 11) - 1]
    plausible = np.exp(expert) >= alpha * kth[:, None] * (1 - 1e-6)
    got = np.asarray(Contrastive(alpha, k)(jnp.asarray(logits)))
    np.testing.assert_array_equal(np.isfinite(got), plausible)
    np.testing.assert_allclose(got[plausible], (expert - amateur)[plausible], atol=1e-5)


def test_contrastive_keeps_at_least_k_ids(logits):
    kept = np.isfinite(np.asarray(Contrastive(1.0, 4)(jnp.asarray(logits)))).sum(axis=-1)
    assert (kept == 4).all()


def test_weight_one_needs_one_stream():
    assert make_guidance(1.0) == Plain()
    assert make_guidance(3) == ClassifierFree(3.0)


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf")])
def test_impossible_weights_are_refused(weight):
    with pytest.raises(UserError, match="guidance"):
        make_guidance(weight)


def test_replace_changes_the_given_values_and_no_others():
    params = SamplingParams.of(guidance=2.0, temperature=0.5, top_p=0.7, max_tokens=5)
    assert params.replace() == params
    changed = params.replace(guidance=1.0, top_k=3)
    assert changed == SamplingParams.of(temperature=0.5, top_p=0.7, top_k=3, max_tokens=5)
    assert params.replace(temperature=0.0).image == Greedy()
    # Another sampler has no temperature to keep, so it stays greedy.
    assert SamplingParams.of(temperature=0.0).replace(top_p=0.9).image == Greedy()
    with pytest.raises(UserError, match="top_p is 2"):
        params.replace(top_p=2.0)
