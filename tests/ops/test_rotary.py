"""Rotary positions equal products of complex numbers, computed in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from leon_jax.ops.rotary import grid_rotation, image_cells, rotate, rotation
from leon_jax.vocabulary import Vocabulary

HEAD_DIM, BASE = 8, 10_000.0


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def turn(x, angles, pairs):
    """Multiplies the pairs of x [..., heads, head_dim] by e^(i angle), angles [..., head_dim/2]."""
    half = x.shape[-1] // 2
    parts = {
        "half_split": (slice(0, half), slice(half, None)),
        "interleaved": (slice(0, None, 2), slice(1, None, 2)),
    }[pairs]
    turned = (x[..., parts[0]] + 1j * x[..., parts[1]]) * np.exp(1j * angles)[..., None, :]
    result = np.empty(x.shape)
    result[..., parts[0]], result[..., parts[1]] = turned.real, turned.imag
    return result


@pytest.mark.parametrize("pairs", ["half_split", "interleaved"])
def test_a_rotation_is_a_product_of_complex_numbers(pairs):
    x, positions = normal(2, 5, 3, HEAD_DIM), np.array([[0, 1, 2, 7, 400]] * 2)
    rates = BASE ** -(np.arange(4) / 4)
    expected = turn(x.astype(np.float64), positions[..., None] * rates, pairs)
    by = rotation(jnp.asarray(positions), head_dim=HEAD_DIM, base=BASE)
    np.testing.assert_allclose(rotate(x, by, pairs), expected, atol=1e-4)


@pytest.mark.parametrize("pairs", ["half_split", "interleaved"])
def test_a_score_depends_only_on_the_distance(pairs):
    q, k = normal(1, HEAD_DIM), normal(1, HEAD_DIM, seed=1)

    def score(query_position, key_position):
        by = [
            rotation(jnp.asarray(position), head_dim=HEAD_DIM, base=BASE)
            for position in (query_position, key_position)
        ]
        return float(jnp.vdot(rotate(q, by[0], pairs), rotate(k, by[1], pairs)))

    assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-4)
    assert abs(score(9, 4) - score(9, 5)) > 1e-3


def test_cells_of_a_grid_turn_by_row_and_column():
    """A row of text, an image of 2 x 3 tokens from position 4, and text."""
    cells = np.array([-1] * 4 + [*range(6)] + [-1] * 2)
    positions = np.arange(12)
    rows = np.array([0, 1, 2, 3, 4, 4, 4, 5, 5, 5, 10, 11])
    columns = np.array([0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 10, 11])
    rates = BASE ** -(np.arange(2) / 2)
    angles = np.concatenate([rows[:, None] * rates, columns[:, None] * rates], axis=1)
    x = normal(12, 2, HEAD_DIM)
    by = grid_rotation(jnp.asarray(positions), jnp.asarray(cells), 3, head_dim=HEAD_DIM, base=BASE)
    expected = turn(x.astype(np.float64), angles, "half_split")
    np.testing.assert_allclose(rotate(x, by, "half_split"), expected, atol=1e-5)


def test_tokens_outside_images_become_zeros_as_in_llamagen():
    """LlamaGen's table has zeros for the condition, then the cells of the grid from (0, 0)."""
    cells = jnp.asarray([-1, *range(6)])
    by = grid_rotation(jnp.arange(7), cells, 3, head_dim=HEAD_DIM, base=BASE, outside="zero")
    x = normal(7, 2, HEAD_DIM)
    rates = BASE ** -(np.arange(2) / 2)
    row, column = np.divmod(np.arange(6), 3)
    angles = np.concatenate([row[:, None] * rates, column[:, None] * rates], axis=1)
    turned = rotate(x, by, "interleaved")
    assert not turned[0].any()
    expected = turn(x[1:].astype(np.float64), angles, "interleaved")
    np.testing.assert_allclose(turned[1:], expected, atol=1e-5)


def test_a_rotation_in_bfloat16_is_computed_in_float32():
    x = jnp.asarray(normal(3, 1, HEAD_DIM), jnp.bfloat16)
    by = rotation(jnp.asarray([1000, 2000, 3001]), head_dim=HEAD_DIM, base=BASE)
    turned = rotate(x, by, "half_split")
    assert turned.dtype == jnp.bfloat16 and by.cos.dtype == jnp.float32
    exact = rotate(x.astype(jnp.float32), by, "half_split")
    np.testing.assert_allclose(turned.astype(jnp.float32), exact, rtol=0.01, atol=0.01)


def test_cells_are_counted_within_each_run_of_image_ids():
    vocabulary = Vocabulary.compact(image_codes=10, text_tokens=20)
    start, text = vocabulary.image_start, vocabulary.text_start
    ids = np.array([text, start, start + 3, start, text, text, start + 9, start])
    expected = [-1, 0, 1, 2, -1, -1, 0, 1]
    np.testing.assert_array_equal(vocabulary.cells(ids), expected)
    np.testing.assert_array_equal(vocabulary.cells(ids[1:4]), [0, 1, 2])
    assert not len(vocabulary.cells(ids[:0]))
    rows = np.random.default_rng(0).integers(start, start + 30, (8, 24))
    host = np.stack([vocabulary.cells(row) for row in rows])
    assert host.max() > 2
    device = jax.jit(lambda rows: image_cells(vocabulary.is_image(rows)))(rows)
    np.testing.assert_array_equal(device, host)


def test_gradients_pass_through_a_rotation():
    """A rotation keeps lengths, so the gradient of the squared length is 2 x."""
    x = normal(5, 2, HEAD_DIM)
    by = rotation(jnp.arange(5), head_dim=HEAD_DIM, base=BASE)
    gradient = jax.grad(lambda x: (rotate(x, by, "interleaved") ** 2).sum())(x)
    np.testing.assert_allclose(gradient, 2 * x, atol=1e-5)
