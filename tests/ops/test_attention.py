"""All implementations of attention equal its formula, and cached attention equals the full one."""

import functools
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from leon_jax.models.decoder import Decoder
from leon_jax.models.decoder_config import DecoderConfig
from leon_jax.ops.attention import (
    CachedArray,
    LayerCache,
    attention,
    blocked,
    cached_attention,
    choose,
    cudnn,
    splash,
    xla,
)
from leon_jax.sharding import spec
from tests import simulated_devices


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def textbook(q, k, v, visible):
    """Computes one query at a time in float64. visible[b, t, s]: query t attends to key s."""
    out, shared = np.zeros(q.shape), q.shape[2] // k.shape[2]
    for b, t, h in np.ndindex(q.shape[:3]):
        keys = visible[b, t]
        logits = k[b, keys, h // shared].astype(np.float64) @ q[b, t, h] / np.sqrt(q.shape[-1])
        weights = np.exp(logits - logits.max())
        out[b, t, h] = (weights / weights.sum()) @ v[b, keys, h // shared]
    return out


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("implementation", ["xla", "blocked"])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_attention_equals_the_formula(causal, packed, implementation, kv_heads):
    q = normal(2, 6, 6, 4)
    k, v = (normal(2, 6, kv_heads, 4, seed=i) for i in (1, 2))
    segments = np.array([[1, 1, 1, 2, 2, 0], [1, 2, 2, 2, 2, 3]], np.int32) if packed else None
    visible = np.ones((2, 6, 6), bool)
    if causal:
        visible &= np.tril(np.ones((6, 6), bool))
    if packed:
        visible &= segments[:, :, None] == segments[:, None, :]
    attended = attention(
        q, k, v, segment_ids=segments, causal=causal, implementation=implementation
    )
    np.testing.assert_allclose(attended, textbook(q, k, v, visible), atol=1e-6)


def test_the_softmax_is_float32_when_inputs_are_bfloat16():
    """Scores 256, 258, 256: a softmax or a sum in bfloat16 would have errors of a few per cent."""
    q = jnp.full((1, 1, 1, 1), 16.0, jnp.bfloat16)
    k = jnp.array([16.0, 16.125, 16.0]).reshape(1, 3, 1, 1).astype(jnp.bfloat16)
    v = jnp.array([0.0, 1.0, 0.0]).reshape(1, 3, 1, 1).astype(jnp.bfloat16)
    out = attention(q, k, v, causal=False)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(out, np.float32).item(), np.exp(2) / (np.exp(2) + 2), rtol=1e-2
    )


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_cached_attention_equals_full_attention(kv_heads):
    """The last tokens of 2 groups of 3 samples. A group shares its first 4 tokens.

    The slots that are not valid have large numbers.
    """
    q = normal(6, 7, 4, 5)
    k, v = (normal(6, 7, kv_heads, 5, seed=i) for i in (1, 2))
    for array in (k, v):
        array[:, :4] = array[::3, :4].repeat(3, axis=0)
    expected = attention(q, k, v)[:, 6].reshape(2, 3, 4, 5)

    def cached(array, start, stop, slots, lead):
        cache = np.full((*lead, kv_heads, slots, 5), 1e4, np.float32)
        tokens = array[:: 6 // np.prod(lead), start:stop].swapaxes(1, 2)
        cache[..., : stop - start, :] = tokens.reshape(*lead, kv_heads, stop - start, 5)
        return cache

    prompt = LayerCache(
        *(CachedArray(cached(a, 0, 4, 8, (2,))) for a in (k, v)),
        np.broadcast_to(np.arange(8) < 4, (2, 8)),
    )
    output = LayerCache(
        *(CachedArray(cached(a, 4, 6, 5, (2, 3))) for a in (k, v)),
        np.broadcast_to(np.arange(5) < 2, (2, 3, 5)),
    )
    last = (array[:, 6].reshape(2, 3, -1, 5) for array in (q, k, v))
    np.testing.assert_allclose(cached_attention(*last, prompt, output), expected, atol=1e-6)


def test_a_token_with_an_empty_cache_attends_to_itself():
    q, k, v = (normal(1, 1, 3, 4, seed=i) for i in range(3))
    empty = np.zeros((1, 3, 2, 4), np.float32)
    prompt = LayerCache(CachedArray(empty), CachedArray(empty), np.zeros((1, 2), bool))
    output = LayerCache(
        CachedArray(empty[None]), CachedArray(empty[None]), np.zeros((1, 1, 2), bool)
    )
    attended = cached_attention(q, k, v, prompt, output)
    np.testing.assert_allclose(attended, v, atol=1e-6)


def test_gradients_are_finite_if_a_token_attends_only_to_itself():
    q, k, v = (normal(1, 4, 1, 2, seed=i) for i in range(3))
    segments = np.arange(4, dtype=np.int32)[None]
    gradient = jax.grad(lambda q: attention(q, k, v, segment_ids=segments).sum())(jnp.asarray(q))
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


SEGMENTS = np.repeat([[1] * 100 + [2] * 90 + [3] * 60 + [0] * 6], 2, axis=0).astype(np.int32)


def values_and_gradients(implementation, length, head_dim, packed, kv_heads=2, **options):
    # The sharding of the decoder.
    layout = jax.NamedSharding(
        jax.sharding.get_mesh(), spec("batch", "length", "heads", "head_dim")
    )
    q, k, v, cotangent = (
        jax.device_put(normal(2, length, heads, head_dim, seed=i), layout)
        for i, heads in enumerate((2, kv_heads, kv_heads, 2))
    )
    segments = np.resize(SEGMENTS, (2, length)) if packed else None

    def loss(q, k, v):
        attended = implementation(q, k, v, segment_ids=segments, **options)
        return (attended * cotangent).sum(), attended

    (_, attended), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
    return attended, *gradients


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_splash_attention_equals_the_reference(packed, head_dim):
    """Values and gradients of the interpreted TPU kernel."""
    check_splash(256, head_dim, packed)


def test_splash_attention_in_small_blocks_without_a_causal_mask():
    check_splash(384, 64, True, causal=False)


def test_splash_attention_of_heads_that_share_keys():
    check_splash(256, 64, True, kv_heads=1)


def check_splash(length, head_dim, packed, causal=True, kv_heads=2):
    expected = values_and_gradients(xla, length, head_dim, packed, kv_heads, causal=causal)
    run = functools.partial(splash, interpret=True)
    results = values_and_gradients(run, length, head_dim, packed, kv_heads, causal=causal)
    assert_all_close(results, expected, atol=2e-4)


def assert_all_close(results, expected, atol):
    for one, other in zip(results, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=atol)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="cuDNN is available there")
def test_a_decoder_calls_cudnn():
    """Its shardings have the axis `context` on every mesh, even with one device on this axis."""
    config = DecoderConfig(48, 16, 1, 32, 4, 64, dtype="bfloat16", attention="cudnn")
    model = Decoder(config, rngs=nnx.Rngs(0))
    ids = np.zeros((2, 16), np.int32)
    with pytest.raises(RuntimeError, match="cuDNN"):
        jax.jit(lambda model: model(ids, None, ids)).trace(model).lower(
            lowering_platforms=("cuda",)
        )


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("head_dim, kv_heads", [(64, 2), (128, 2), (64, 1)])
def test_cudnn_attention_equals_the_reference(packed, head_dim, kv_heads):
    def in_bfloat16(implementation):
        return lambda q, k, v, **options: implementation(
            *(jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)), **options
        ).astype(jnp.float32)

    expected = values_and_gradients(in_bfloat16(xla), 256, head_dim, packed, kv_heads)
    results = values_and_gradients(in_bfloat16(cudnn), 256, head_dim, packed, kv_heads)
    assert_all_close(results, expected, atol=5e-2)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("length, kv_heads", [(100, 2), (256, 2), (600, 2), (600, 1)])
def test_attention_in_blocks_equals_the_reference(length, kv_heads, packed, causal):
    expected = values_and_gradients(xla, length, 16, packed, kv_heads, causal=causal)
    results = values_and_gradients(blocked, length, 16, packed, kv_heads, causal=causal)
    assert_all_close(results, expected, atol=1e-5)


def test_splash_attention_needs_a_multiple_of_the_block():
    q = np.zeros((1, 100, 1, 64), np.float32)
    with pytest.raises(ValueError, match="multiple of 128 tokens, not 100"):
        splash(q, q, q)


def test_a_cpu_uses_blocks_if_there_are_several():
    assert choose(jnp.zeros((1, 256, 1, 64))) == "xla"
    assert choose(jnp.zeros((1, 257, 1, 64))) == "blocked"


@pytest.mark.slow
def test_splash_attention_on_a_mesh_equals_the_reference():
    """Splits rows, length and heads over eight simulated devices, in a separate process."""
    program = Path(__file__).with_name("splash_on_eight_devices.py")
    process = subprocess.run(
        [sys.executable, program],
        capture_output=True,
        text=True,
        timeout=900,
        env=simulated_devices.environment(),
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("equal") == 2, process.stdout
