"""Quantisation to 8 bits: the largest error, and products with quantized weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leon_jax.ops import int8


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([(0,), (1,), (0, 2), (-1,)]))
def test_the_error_of_every_number_is_at_most_half_a_step(seed, axes):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(3, 4, 5)) * 10.0 ** rng.integers(-5, 5, (3, 1, 1))
    x[0] = 0
    values, scale = int8.quantize(jnp.asarray(x, jnp.float32), axes)
    assert values.dtype == jnp.int8 and values.shape == x.shape
    assert scale.shape == np.abs(x).max(axis=axes, keepdims=True).shape
    error = np.abs(np.asarray(values) * np.asarray(scale, np.float64) - x)
    assert (error <= np.asarray(scale) / 2 * (1 + 1e-4)).all()
    largest = np.abs(x).max(axis=axes, keepdims=True)
    np.testing.assert_allclose(np.asarray(scale) * 127, largest, rtol=1e-6)


@pytest.mark.parametrize(
    ("subscripts", "shape", "summed"),
    [
        ("...d,dhk->...hk", (6, 2, 3), (0,)),
        ("...hk,hkd->...d", (2, 3, 6), (0, 1)),
        ("...d,df->...f", (6, 7), (0,)),
    ],
)
def test_a_product_equals_that_of_the_dequantized_weights(subscripts, shape, summed):
    rng = np.random.default_rng(0)
    weight = rng.normal(size=shape).astype(np.float32) * rng.uniform(0.1, 3, shape[-1])
    lead = [shape[axis] for axis in summed]
    x = rng.normal(size=(4, 5, *lead)).astype(np.float32)
    values, scale = int8.quantize(jnp.asarray(weight, jnp.float32), summed)
    expected = np.einsum(subscripts, x.astype(np.float64), np.asarray(values) * np.asarray(scale))
    sharding = jax.P(*[None] * expected.ndim)
    product = int8.einsum(subscripts, jnp.asarray(x), values, scale, sharding)
    np.testing.assert_allclose(product, expected, rtol=1e-5, atol=1e-5)
    half = int8.einsum(subscripts, jnp.asarray(x, jnp.bfloat16), values, scale, sharding)
    assert half.dtype == jnp.bfloat16
    # The result is rounded once, at the end.
    rounded = np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)
    expected = np.einsum(subscripts, rounded, np.asarray(values) * np.asarray(scale))
    np.testing.assert_allclose(np.asarray(half, np.float64), expected, rtol=2**-8, atol=1e-5)
