"""Samplers draw what their closed form says, and reject settings that mean nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from leon_jax.config import UserError
from leon_jax.engine.samplers import (
    Categorical,
    Greedy,
    inverse_transform,
    make_sampler,
    nucleus,
)

LOGITS = np.log(np.array([0.40, 0.25, 0.15, 0.10, 0.06, 0.04]))
DRAWS = 20_000


def draw(sampler, logits=LOGITS, draws=DRAWS) -> np.ndarray:
    keys = jax.vmap(jax.random.key)(jnp.arange(draws))
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (draws, len(logits)))
    return np.asarray(jax.jit(sampler)(rows, keys))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.40, 0.25, 0.15, 0.10, 0.06, 0.04]),
        # p^(1/T) renormalised.
        ({"temperature": 0.5}, [0.16, 0.0625, 0.0225, 0.01, 0.0036, 0.0016]),
        ({"temperature": 2.0}, np.sqrt([0.40, 0.25, 0.15, 0.10, 0.06, 0.04])),
        ({"top_k": 3}, [0.40, 0.25, 0.15, 0, 0, 0]),
        # 0.40 + 0.25 has not reached 0.7, so the third id crosses it and stays.
        ({"top_p": 0.7}, [0.40, 0.25, 0.15, 0, 0, 0]),
        ({"top_p": 0.01}, [1, 0, 0, 0, 0, 0]),
        # Top-k first; among three ids 0.40/0.80 has not reached 0.6, so the second id crosses.
        ({"top_k": 3, "top_p": 0.6}, [0.40, 0.25, 0, 0, 0, 0]),
        ({"top_k": 100, "top_p": 1.0}, [0.40, 0.25, 0.15, 0.10, 0.06, 0.04]),
    ],
)
def test_frequencies_fit_the_closed_form(settings, expected):
    expected = np.asarray(expected, float) / np.sum(expected)
    counts = np.bincount(draw(make_sampler(**settings)), minlength=len(expected))
    kept = expected > 0
    assert counts[~kept].sum() == 0
    if kept.sum() > 1:
        assert stats.chisquare(counts[kept], expected[kept] * DRAWS).pvalue > 1e-3


def test_greedy_is_temperature_zero_and_the_limit_of_cold_sampling():
    assert make_sampler(temperature=0) == Greedy()
    assert (draw(Greedy(), draws=10) == 0).all()
    assert (draw(Categorical(temperature=1e-3), draws=100) == 0).all()


def test_forbidden_ids_are_never_drawn():
    logits = LOGITS.copy()
    logits[[0, 2]] = -np.inf
    for sampler in (Categorical(), Categorical(top_p=0.999), Categorical(top_k=5)):
        assert not np.isin(draw(sampler, logits, 2_000), [0, 2]).any()


def test_the_order_of_the_ids_does_not_matter():
    order = np.array([3, 5, 0, 2, 4, 1])
    shaped = Categorical(top_p=0.7).process_logits(jnp.asarray(LOGITS)[None])[0]
    shuffled = Categorical(top_p=0.7).process_logits(jnp.asarray(LOGITS)[None, order])[0]
    np.testing.assert_array_equal(shaped[order], shuffled)


def test_the_nucleus_is_that_of_sorted_probabilities():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(40, 300)) * rng.uniform(0.01, 8, (40, 1))
    logits[:20] = logits[:20].round(1)  # with equals
    logits[5, 7:] = -np.inf
    for top_p in (1e-6, 0.1, 0.5, 0.9, 0.999):
        kept = np.isfinite(nucleus(jnp.asarray(logits, jnp.float32), top_p))
        for row, inside in zip(logits, kept, strict=True):
            likely = np.exp(row - row.max())
            likely /= likely.sum()
            ordered = np.sort(likely)[::-1]
            crossing = np.searchsorted(np.cumsum(ordered), top_p)
            np.testing.assert_array_equal(inside, likely >= ordered[crossing])


def test_the_nucleus_of_everything_is_everything_that_can_be():
    logits = jnp.array([[0.0, 1.0, -jnp.inf, -8.0]])
    assert np.isfinite(nucleus(logits, 1.0)).tolist() == [[True, True, False, True]]


@pytest.mark.parametrize("vocab", [1, 2, 17, 1000])
def test_an_id_is_drawn_where_the_running_sum_passes(vocab):
    rng = np.random.default_rng(vocab)
    weights = rng.integers(0, 4, (50, vocab)).astype(np.float32)  # sums without rounding
    weights[:, rng.integers(vocab)] += 1
    sums = weights.cumsum(axis=1)
    for u in (0.0, 0.25, 0.5, 0.96875):
        expected = (sums <= u * sums[:, -1:]).sum(axis=1)
        drawn = inverse_transform(jnp.asarray(weights), jnp.full(50, u))
        np.testing.assert_array_equal(drawn, expected)


def test_rounding_never_draws_what_has_no_weight():
    rng = np.random.default_rng(0)
    weights = rng.uniform(size=(2000, 97)).astype(np.float32) ** 20
    weights[rng.uniform(size=weights.shape) < 0.7] = 0
    weights[:, 40] = 1e-30
    for u in (0.0, 1e-7, 0.5, np.nextafter(np.float32(1), np.float32(0))):
        drawn = np.asarray(inverse_transform(jnp.asarray(weights), jnp.full(2000, u)))
        assert (weights[np.arange(2000), drawn] > 0).all()


def test_a_row_draws_from_its_own_key():
    logits = jnp.broadcast_to(jnp.asarray(LOGITS, jnp.float32), (4, 6))
    keys = jax.vmap(jax.random.key)(jnp.array([5, 6, 7, 5]))
    together = Categorical()(logits, keys)
    alone = [int(Categorical()(logits[:1], keys[i : i + 1])[0]) for i in range(4)]
    assert together.tolist() == alone


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"top_p": 1.5},
        {"top_k": -1},
    ],
)
def test_settings_without_meaning_are_refused(settings):
    name = next(iter(settings))
    with pytest.raises(UserError, match=name):
        make_sampler(**settings)
