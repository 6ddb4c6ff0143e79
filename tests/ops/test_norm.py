"""Layer norm and RMS norm equal their formulas in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from leon_jax.ops.norm import normalize


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("is_affine", [True, False])
def test_a_norm_equals_its_formula(kind, is_affine):
    rng = np.random.default_rng(0)
    x, scale, bias = rng.normal(2, 3, (4, 5, 16)), rng.normal(size=16), rng.normal(size=16)
    centred = x - x.mean(-1, keepdims=True) if kind == "layer" else x
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 0.1)
    scale, bias = (scale, bias) if is_affine else (None, None)
    if is_affine:
        expected = expected * scale + bias
        scale, bias = scale.astype(np.float32), bias.astype(np.float32)
    normed = normalize(x.astype(np.float32), kind, scale, bias, epsilon=0.1)
    np.testing.assert_allclose(normed, expected, atol=1e-5)


def test_a_norm_in_bfloat16_is_computed_in_float32():
    """The mean square of 4,096 numbers near 100 would be wrong in bfloat16."""
    x = jnp.asarray(np.random.default_rng(0).normal(100, 1, 4096), jnp.bfloat16)
    exact = np.asarray(x, np.float64)
    exact = (exact - exact.mean()) / exact.std()
    normed = normalize(x)
    assert normed.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(normed, np.float64), exact, rtol=0.01, atol=1e-3)
