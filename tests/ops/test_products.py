"""Products with rounded operands equal float64 products of the rounded arrays, forward and back."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from leon_jax.ops import products
from leon_jax.ops.attention import attention
from leon_jax.ops.cross_entropy import chunked_cross_entropy
from leon_jax.ops.products import einsum, operand_dtype, transpose
from tests.ops.test_cross_entropy import inputs, optax_losses

# Subscripts, and the shapes of both operands.
CASES = {
    "weight": ("...d,df->...f", (2, 6, 32), (32, 8)),
    "heads": ("...d,dhk->...hk", (2, 6, 32), (32, 4, 8)),
    "output": ("...hk,hkd->...d", (2, 6, 4, 8), (4, 8, 16)),
    "scores": ("bhtk,bhsk->bhts", (2, 3, 6, 8), (2, 3, 10, 8)),
    "an odd summed axis": ("bhts,bhsk->bhtk", (2, 3, 5, 7), (2, 3, 7, 8)),
    "one row": ("nd,dv->nv", (1, 16), (16, 4)),
}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def rounded(x):
    """Rounds to bfloat16, in float64."""
    return np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)


@pytest.mark.parametrize("name", CASES)
def test_a_product_and_its_gradients_are_those_of_rounded_operands(name):
    subscripts, *shapes = CASES[name]
    x, y = normal(*shapes[0]), normal(*shapes[1], seed=1)
    result, backward = jax.vjp(lambda x, y: einsum(subscripts, x, y, jnp.bfloat16), x, y)
    assert result.dtype == jnp.float32
    expected = np.einsum(subscripts, rounded(x), rounded(y))
    # Products of two bfloat16 numbers are exact in float32, so only sums have errors.
    np.testing.assert_allclose(result, expected, atol=2e-6 * np.abs(expected).max())
    gradient = normal(*result.shape, seed=2)
    operands, of_result = subscripts.replace("...", "BT").split("->")
    of_x, of_y = operands.split(",")
    expected = (
        np.einsum(f"{of_result},{of_y}->{of_x}", rounded(gradient), rounded(y)),
        np.einsum(f"{of_x},{of_result}->{of_y}", rounded(x), rounded(gradient)),
    )
    for one, other in zip(backward(gradient), expected, strict=True):
        assert one.dtype == jnp.float32
        np.testing.assert_allclose(one, other, atol=2e-6 * np.abs(other).max())


def test_sums_are_in_float32():
    """4,096 + 1: a sum in bfloat16 would stay at 256."""
    x = np.ones((1, 1, 4097), np.float32)
    assert einsum("...d,df->...f", x, np.ones((4097, 1), np.float32), "bfloat16").item() == 4097


def test_operands_of_the_own_dtype_change_nothing():
    x, y = normal(2, 3, 8), normal(8, 4, seed=1)
    expected = jnp.einsum("...d,df->...f", x, y)
    for operands in (None, "float32"):
        np.testing.assert_array_equal(einsum("...d,df->...f", x, y, operands), expected)
    half = jnp.asarray(x, jnp.bfloat16)
    result = einsum("...d,df->...f", half, y, "bfloat16")
    assert result.dtype == jnp.bfloat16
    np.testing.assert_array_equal(result, jnp.einsum("...d,df->...f", half, y.astype(half.dtype)))


@pytest.mark.parametrize("name", CASES)
def test_all_three_products_have_the_fast_form(name):
    """After common axes, x is summed over its last axes, and y over its first or last axes."""
    subscripts, *shapes = CASES[name]

    def run(x, y):
        result, backward = jax.vjp(lambda x, y: einsum(subscripts, x, y, jnp.bfloat16), x, y)
        return backward(result)

    text = jax.jit(run).lower(*(jnp.zeros(shape) for shape in shapes)).as_text()
    lines = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert len(lines) == 3
    for line in lines:
        first, second, result = re.findall(r"tensor<([^>]*)>", line)
        assert first.endswith("bf16") and second.endswith("bf16") and result.endswith("f32")
        batch, summed = (
            [[int(axis) for axis in axes.split(",") if axis.strip()] for axes in found[0]]
            if (found := re.findall(rf"{kind}_dims = \[([^]]*)\] x \[([^]]*)\]", line))
            else [[], []]
            for kind in ("batching", "contracting")
        )
        common, of_x, of_y = len(batch[0]), *summed
        assert batch == [list(range(common))] * 2
        assert of_x == list(range(first.count("x")))[-len(of_x) :]
        axes = list(range(second.count("x")))
        assert of_y in (axes[common : common + len(of_y)], axes[-len(of_y) :])


def test_auto_chooses_bfloat16_only_on_cpus_that_are_fast_in_it(monkeypatch, tmp_path):
    fast, slow = tmp_path / "fast", tmp_path / "slow"
    fast.write_text("processor : 0\nflags : fpu avx512f avx512_bf16 amx_tile\n")
    slow.write_text("processor : 0\nflags : fpu avx512f\n")
    has = products._has_bfloat16_instructions
    assert has(str(fast)) and not has(str(slow)) and not has(str(tmp_path / "missing"))
    for answer, auto in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(products, "_has_bfloat16_instructions", lambda answer=answer: answer)
        assert operand_dtype("auto", "float32") == auto
        assert operand_dtype("dtype", "float32") == "float32"
        assert operand_dtype("bfloat16", "float32") == "bfloat16"
        assert operand_dtype("auto", "bfloat16") == "bfloat16"


# Lengths of one and of two blocks of queries. XLA fails if the form of a product is lost.
@pytest.mark.parametrize("length", [33, 300])
def test_attention_with_rounded_operands_is_close_to_float32(length):
    q, k, v = (normal(2, length, 3, 8, seed=i) for i in range(3))
    segments = np.sort(np.random.default_rng(3).integers(0, 3, (2, length)), axis=1)

    def loss(q, k, v, operands):
        out = attention(q, k, v, segment_ids=segments, operands=operands)
        assert out.dtype == jnp.float32
        return (out * normal(*out.shape, seed=4)).sum()

    run = jax.jit(jax.value_and_grad(loss, (0, 1, 2)), static_argnums=3)
    (value, gradients), (other, others) = run(q, k, v, None), run(q, k, v, "bfloat16")
    np.testing.assert_allclose(value, other, rtol=2e-2)
    for one, two in zip(gradients, others, strict=True):
        # An operand's relative error is at most 2^-9.
        assert 1e-6 < np.linalg.norm(one - two) / np.linalg.norm(one) < 1e-2


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (3, 5, 7, 1)])
def test_transpose_is_that_of_numpy_with_its_gradient(shape):
    array = normal(*shape)
    for order in itertools.permutations(range(4)):
        after = "".join("abcd"[axis] for axis in order)
        result, backward = jax.vjp(lambda x, after=after: transpose(x, "abcd", after), array)
        np.testing.assert_array_equal(result, array.transpose(order))
        np.testing.assert_array_equal(backward(result)[0], array)


@pytest.mark.parametrize("chunk", [4, 1000])
def test_cross_entropy_with_rounded_operands_is_that_of_rounded_arrays(chunk):
    hidden, table, targets, weights = inputs()

    def total(hidden, table):
        return chunked_cross_entropy(
            hidden, table, targets, weights, chunk=chunk, operands="bfloat16"
        )[0]

    value, gradients = jax.value_and_grad(total, (0, 1))(hidden, table)
    arrays = [jnp.asarray(rounded(array), jnp.float32) for array in (hidden, table)]
    expected, slopes = jax.value_and_grad(
        lambda h, t: optax_losses(h, t, targets, weights).sum(), (0, 1)
    )(*arrays)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for one, other in zip(gradients, slopes, strict=True):
        assert one.dtype == jnp.float32
        # The gradient of the logits is rounded too.
        assert np.linalg.norm(one - other) / np.linalg.norm(other) < 4e-3
