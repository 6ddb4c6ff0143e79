"""Chunked cross-entropy equals optax's on whole logits, in value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from leon_jax.ops.cross_entropy import chunked_cross_entropy


def inputs(dtype=np.float32):
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(3, 7, 8)).astype(np.float32)
    table = rng.normal(size=(20, 8)).astype(np.float32)
    targets = rng.integers(0, 20, (3, 7)).astype(np.int32)
    weights = rng.choice([0, 0.5, 1], (3, 7)).astype(np.float32)
    return jnp.asarray(hidden, dtype), jnp.asarray(table), targets, weights


def whole(hidden, table, targets, weights):
    logits = jnp.einsum("btd,vd->btv", hidden, table)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets) * weights


@pytest.mark.parametrize("chunk", [1, 4, 7, 21, 1000])
def test_equals_optax(chunk):
    hidden, table, targets, weights = inputs()
    found = chunked_cross_entropy(hidden, table, targets, weights, chunk=chunk)
    assert found.shape == (3, 7) and found.dtype == jnp.float32
    np.testing.assert_allclose(found, whole(hidden, table, targets, weights), atol=1e-5)


@pytest.mark.parametrize("chunk", [4, 1000])
def test_gradients_equal_optax(chunk):
    hidden, table, targets, weights = inputs()
    expected = jax.grad(lambda h, t: whole(h, t, targets, weights).sum(), (0, 1))(hidden, table)
    found = jax.grad(
        lambda h, t: chunked_cross_entropy(h, t, targets, weights, chunk=chunk).sum(), (0, 1)
    )(hidden, table)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_bfloat16_hidden_states_give_float32_losses_and_float32_table_gradients():
    hidden, table, targets, weights = inputs(jnp.bfloat16)
    loss = lambda t: chunked_cross_entropy(hidden, t, targets, weights, chunk=4)  # noqa: E731
    assert loss(table).dtype == jnp.float32
    assert jax.grad(lambda t: loss(t).sum())(table).dtype == jnp.float32
    reference = whole(hidden.astype(jnp.float32), table, targets, weights)
    np.testing.assert_allclose(loss(table), reference, atol=0.1)


def test_no_intermediate_holds_all_logits():
    """The largest array of the compiled gradient is a chunk's logits, not the row's."""
    hidden, table, targets, weights = inputs()

    def loss(hidden):
        return chunked_cross_entropy(hidden, table, targets, weights, chunk=3).sum()

    text = jax.jit(jax.grad(loss)).lower(hidden).compile().as_text()
    assert "f32[21,20]" not in text and "f32[3,7,20]" not in text
    assert "f32[3,20]" in text


def test_huge_logits_do_not_overflow():
    hidden, table, targets, weights = inputs()
    found = chunked_cross_entropy(hidden * 1e3, table, targets, weights, chunk=5)
    np.testing.assert_allclose(found, whole(hidden * 1e3, table, targets, weights), rtol=1e-5)


def test_z_loss_adds_the_squared_log_of_the_partition_function():
    hidden, table, targets, weights = inputs()
    logits = jnp.einsum("btd,vd->btv", hidden, table)
    extra = 0.01 * jax.nn.logsumexp(logits, axis=-1) ** 2 * weights
    found = chunked_cross_entropy(hidden, table, targets, weights, chunk=5, z_loss=0.01)
    np.testing.assert_allclose(found, whole(hidden, table, targets, weights) + extra, atol=1e-5)
