"""Chunked cross-entropy equals that of optax with all logits, in value and gradient."""

import functools

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


def optax_losses(hidden, table, targets, weights):
    logits = jnp.einsum("btd,vd->btv", hidden, table)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets) * weights


@pytest.mark.parametrize("chunk", [1, 4, 7, 21, 1000])
def test_losses_equal_optax(chunk):
    hidden, table, targets, weights = inputs()
    total, losses = chunked_cross_entropy(hidden, table, targets, weights, chunk=chunk)
    np.testing.assert_allclose(total, losses.sum(), rtol=1e-6)
    assert losses.shape == (3, 7) and losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, optax_losses(hidden, table, targets, weights), atol=1e-5)


@pytest.mark.parametrize("chunk", [4, 1000])
def test_gradients_equal_optax(chunk):
    hidden, table, targets, weights = inputs()
    expected = jax.grad(lambda h, t: optax_losses(h, t, targets, weights).sum(), (0, 1))(
        hidden, table
    )
    gradients = jax.grad(
        lambda h, t: chunked_cross_entropy(h, t, targets, weights, chunk=chunk)[0], (0, 1)
    )(hidden, table)
    for one, other in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_bfloat16_hidden_states_give_float32_losses_and_float32_table_gradients():
    hidden, table, targets, weights = inputs(jnp.bfloat16)
    loss = lambda t: chunked_cross_entropy(hidden, t, targets, weights, chunk=4)  # noqa: E731
    total, losses = loss(table)
    assert total.dtype == losses.dtype == jnp.float32
    assert jax.grad(lambda t: loss(t)[0])(table).dtype == jnp.float32
    reference = optax_losses(hidden.astype(jnp.float32), table, targets, weights)
    np.testing.assert_allclose(losses, reference, atol=0.1)


def test_an_exchange_in_bfloat16_rounds_the_gradient_of_the_table():
    hidden, table, targets, weights = inputs()

    def gradient(exchange):
        loss = lambda t: chunked_cross_entropy(  # noqa: E731
            hidden, t, targets, weights, chunk=4, exchange=exchange
        )[0]
        return jax.grad(loss)(table)

    exact, rounded = gradient(None), gradient("bfloat16")
    assert rounded.dtype == jnp.float32
    np.testing.assert_array_equal(rounded, rounded.astype(jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_allclose(rounded, exact, rtol=2e-2, atol=2e-3 * np.abs(exact).max())
    assert np.any(rounded != exact)


def test_no_intermediate_array_has_all_logits():
    """The largest array of the compiled gradient has the logits of a chunk, not of all tokens."""
    hidden, table, targets, weights = inputs()

    def loss(hidden):
        return chunked_cross_entropy(hidden, table, targets, weights, chunk=3)[0]

    text = jax.jit(jax.grad(loss)).lower(hidden).compile().as_text()
    assert "f32[21,20]" not in text and "f32[3,7,20]" not in text
    assert "f32[3,20]" in text


def test_memory_is_a_fraction_of_that_with_all_logits():
    """The compiler's estimate for value and gradient with 4,096 tokens and 65,536 ids."""
    arguments = (
        jax.ShapeDtypeStruct((1, 4096, 128), jnp.bfloat16),
        jax.ShapeDtypeStruct((65536, 128), jnp.float32),
        jax.ShapeDtypeStruct((1, 4096), jnp.int32),
        jax.ShapeDtypeStruct((1, 4096), jnp.float32),
    )

    def bytes_of(losses):
        differentiate = jax.value_and_grad(losses, (0, 1))
        compiled = jax.jit(differentiate).lower(*arguments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    full = bytes_of(lambda *x: optax_losses(*x).sum())
    assert full > 4096 * 65536 * 4
    assert bytes_of(lambda *x: chunked_cross_entropy(*x)[0]) <= full / 4


def test_huge_logits_do_not_overflow():
    hidden, table, targets, weights = inputs()
    _, losses = chunked_cross_entropy(hidden * 1e3, table, targets, weights, chunk=5)
    np.testing.assert_allclose(
        losses, optax_losses(hidden * 1e3, table, targets, weights), rtol=1e-5
    )


def test_z_loss_adds_the_squared_log_of_the_partition_function():
    hidden, table, targets, weights = inputs()
    logits = jnp.einsum("btd,vd->btv", hidden, table)
    extra = 0.01 * jax.nn.logsumexp(logits, axis=-1) ** 2 * weights
    run = functools.partial(chunked_cross_entropy, chunk=5, z_loss=0.01)
    _, losses = run(hidden, table, targets, weights)
    np.testing.assert_allclose(
        losses, optax_losses(hidden, table, targets, weights) + extra, atol=1e-5
    )

    def plain(hidden, table):
        logits = jnp.einsum("btd,vd->btv", hidden, table)
        extra = 0.01 * jax.nn.logsumexp(logits, axis=-1) ** 2 * weights
        return (optax_losses(hidden, table, targets, weights) + extra).sum()

    gradients = jax.grad(lambda h, t: run(h, t, targets, weights)[0], (0, 1))(hidden, table)
    expected = jax.grad(plain, (0, 1))(hidden, table)
    for one, other in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
