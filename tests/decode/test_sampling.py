"""Samplers draw what their closed form says, and reject settings that mean nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from leon_jax.config import UserError
from leon_jax.decode.sampling import Categorical, Greedy, make_sampler

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
    shaped = Categorical(top_p=0.7).shape(jnp.asarray(LOGITS)[None])[0]
    shuffled = Categorical(top_p=0.7).shape(jnp.asarray(LOGITS)[None, order])[0]
    np.testing.assert_array_equal(shaped[order], shuffled)


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
