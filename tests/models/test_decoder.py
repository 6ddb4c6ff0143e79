"""The decoder's sizes, initialisation, masking, decoding and sharding."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import stats

from leon_jax import sharding
from leon_jax.config import UserError, build, to_dict
from leon_jax.models.decoder import Decoder
from leon_jax.models.decoder_config import DecoderConfig
from leon_jax.models.weight_conversion import convert_weights, unstack, weight_dtype
from leon_jax.ops.attention import CachedArray, LayerCache
from leon_jax.vocabulary import Vocabulary
from tests import simulated_devices
from tests.tiny import random_decoder, randomise

CONFIG = DecoderConfig(vocab_size=48, max_length=16, layers=3, embed=32, heads=4, mlp=64)
PAD = Vocabulary().pad
PAPER = {  # layers, embed, heads, and millions of parameters, by the names of Table 3
    "350M": (24, 1024, 16, 373),
    "760M": (24, 1536, 16, 786),
    "7B": (32, 4096, 32, 6728),
}


def random_ids(rows=2, length=12, seed=0):
    return np.random.default_rng(seed).integers(0, 48, (rows, length)).astype(np.int32)


@pytest.fixture(scope="module")
def model():
    with jax.set_mesh(sharding.make_mesh((1, 1, 1, 1), jax.devices()[:1])):
        yield random_decoder(48, 16)


@pytest.mark.parametrize("name", PAPER)
def test_parameter_counts_of_the_paper(name):
    layers, embed, heads, millions = PAPER[name]
    config = DecoderConfig(65536, 4096, layers, embed, heads, 4 * embed)
    abstract = jax.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    count = sum(leaf.size for leaf in jax.tree.leaves(abstract))
    assert count == config.parameter_count()
    assert round(count / 1e6) == millions


def test_flops_of_7b_are_six_per_weight_and_token_plus_attention():
    config = DecoderConfig(65536, 4096, 32, 4096, 32, 16384)
    attention = 6 * 32 * 4096 * 4096
    weights = config.parameter_count() - 4096 * 4096  # positions are looked up, not multiplied
    assert config.flops_per_token(4096) == 6 * weights + attention


def test_at_step_zero_every_block_is_the_identity():
    model, ids = Decoder(CONFIG, rngs=nnx.Rngs(0)), random_ids()
    x = np.asarray(model.table[...])[ids] + np.asarray(model.positions[...])[:12]
    x = x.astype(np.float64) - x.mean(-1, keepdims=True)
    x /= np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(model(ids), x, atol=1e-5)


def test_initial_weights_are_truncated_normals_and_the_pad_row_is_zero():
    config = DecoderConfig(2000, 512, 2, 64, 4, 256)
    model = Decoder(config, rngs=nnx.Rngs(0))
    table, positions = np.asarray(model.table[...]), np.asarray(model.positions[...])
    assert not table[PAD].any()
    assert not np.asarray(model.blocks.out[...]).any()
    assert not np.asarray(model.blocks.fc2[...]).any()
    for weights, std in [
        (np.delete(table, PAD, axis=0), 0.006),
        (positions, 0.0002),
        (np.asarray(model.blocks.query[...]), 0.006),
        (np.asarray(model.blocks.fc1[...]), 0.006),
    ]:
        assert np.abs(weights).max() <= 3 * std
        sample = weights.ravel()[:: max(1, weights.size // 5000)] / std
        assert stats.kstest(sample, stats.truncnorm(-3, 3).cdf).pvalue > 1e-3


def test_initial_sinusoids_have_the_configured_sd_and_shift_by_rotation():
    config = DecoderConfig(48, 64, 1, 32, 4, 64, position_std=0.02, position_init="sinusoids")
    table = np.asarray(Decoder(config, rngs=nnx.Rngs(0)).positions[...])
    assert np.sqrt(np.square(table).mean()) == pytest.approx(0.02, rel=1e-5)
    # One matrix maps every position to the one 8 later.
    shift, *_ = np.linalg.lstsq(table[:-8], table[8:])
    np.testing.assert_allclose(table[:-8] @ shift, table[8:], atol=1e-5)
    assert np.linalg.matrix_rank(table, tol=1e-4) > 16  # so all positions differ
    with pytest.raises(UserError, match="33"):
        DecoderConfig(48, 64, 1, 33, 3, 64, position_init="sinusoids")


def test_a_model_created_under_jit_equals_the_model_created_eagerly():
    eager = Decoder(CONFIG, rngs=nnx.Rngs(3))
    jitted = jax.jit(lambda: Decoder(CONFIG, rngs=nnx.Rngs(3)))()
    for one, other in zip(jax.tree.leaves(eager), jax.tree.leaves(jitted), strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.sharding == other.sharding


def test_a_token_does_not_change_earlier_hidden_states(model):
    ids = random_ids()
    changed = ids.copy()
    changed[:, 7] = (changed[:, 7] + 1) % 48
    before, after = np.asarray(model(ids)), np.asarray(model(changed))
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert (np.abs(before[:, 7:] - after[:, 7:]).max(axis=-1) > 1e-4).all()


def test_packed_documents_equal_separate_documents(model):
    first, second = random_ids(1, 5, seed=1), random_ids(1, 7, seed=2)
    ids = np.concatenate([first, second], axis=1)
    segments = np.array([[1] * 5 + [2] * 7], np.int32)
    positions = np.array([[*range(5), *range(7)]], np.int32)
    packed = model(ids, positions, segments)
    np.testing.assert_allclose(packed[:, :5], model(first), atol=1e-5)
    np.testing.assert_allclose(packed[:, 5:], model(second), atol=1e-5)


def test_a_part_of_the_logits_equals_the_slice_of_all(model):
    hidden = model(random_ids())
    whole = model.logits(hidden)
    assert whole.dtype == jnp.float32 and whole.shape == (2, 12, 48)
    np.testing.assert_allclose(model.logits(hidden, model.head(4, 15)), whole[..., 4:15], atol=1e-5)
    np.testing.assert_allclose(
        model.logits(hidden[:, 3], model.head(40)), whole[:, 3, 40:], atol=1e-5
    )


def test_decode_steps_equal_the_whole_sequence(model):
    """Decodes rows of different prompt lengths in one right-padded batch."""
    ids = random_ids(rows=3)
    whole = np.asarray(model(ids))
    lengths = np.array([2, 5, 3])
    padded = np.where(np.arange(5) < lengths[:, None], ids[:, :5], 1)
    hidden, keys, values = model.prefill(padded)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(hidden[row, :length], whole[row, :length], atol=1e-4)
    (keys,), (values,) = keys, values
    prompt = LayerCache([CachedArray(keys)], [CachedArray(values)], np.arange(5) < lengths[:, None])
    empty = np.zeros((keys.shape[0], 3, 1, keys.shape[2], 10, keys.shape[4]), np.float32)
    keys, values, rows, count = empty, empty.copy(), np.arange(3), 0
    step = jax.jit(Decoder.decode_step)
    while (lengths < 12).all():
        output = LayerCache(
            [CachedArray(keys)],
            [CachedArray(values)],
            np.broadcast_to(np.arange(10) < count, (3, 1, 10)),
        )
        # One stream with three groups of one sample.
        tokens, positions = (
            array.astype(np.int32)[None, :, None] for array in (ids[rows, lengths], lengths)
        )
        hidden, (k,), (v,) = step(model, tokens, positions, [prompt], [output])
        np.testing.assert_allclose(hidden[0, :, 0], whole[rows, lengths], atol=1e-4)
        keys[..., count, :], values[..., count, :] = k[:, 0], v[:, 0]
        lengths, count = lengths + 1, count + 1
    assert lengths.max() == 12


def abstract(config: DecoderConfig) -> Decoder:
    """Returns a decoder's shapes; nothing is compiled."""
    return jax.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))


@jax.jit
def gradients(model):
    ids = random_ids()
    return jax.grad(lambda m: jnp.square(m.logits(m(ids))).mean())(model)


@pytest.mark.parametrize("remat", ["dots", "dots_and_attention", "full"])
def test_remat_does_not_change_the_gradients(model, remat):
    config = DecoderConfig(48, 16, layers=2, embed=32, heads=4, mlp=64, remat=remat)
    other = randomise(abstract(config))
    plain, recomputed = gradients(model), gradients(other)
    pairs = zip(jax.tree.leaves(plain), jax.tree.leaves(recomputed), strict=True)
    for one, two in pairs:
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-6)


def test_bfloat16_compute_keeps_float32_weights_and_logits():
    config = DecoderConfig(48, 16, layers=2, embed=32, heads=4, mlp=64, dtype="bfloat16")
    model, reference = randomise(abstract(config), 0.1), random_decoder(48, 16)
    hidden = model(random_ids())
    assert hidden.dtype == jnp.bfloat16 and model.logits(hidden).dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jnp.dtype("float32")}
    reference = randomise(reference, 0.1)
    np.testing.assert_allclose(hidden.astype(jnp.float32), reference(random_ids()), atol=0.15)


def test_rounded_products_are_float32_with_smaller_errors_than_bfloat16():
    directions = np.random.default_rng(1).normal(size=(2, 12, 48)).astype(np.float32)

    def run(**settings):
        config = DecoderConfig(48, 16, layers=2, embed=32, heads=4, mlp=64, **settings)
        model = randomise(abstract(config), 0.1)

        def loss(model):
            hidden = model(random_ids())
            return (model.logits(hidden) * directions).sum(), hidden

        gradient, hidden = jax.jit(jax.grad(loss, has_aux=True))(model)
        return model.prefill(random_ids())[0], [hidden, *jax.tree.leaves(gradient)]

    prefilled, exact = run()
    same, rounded = run(products="bfloat16")
    _, half = run(dtype="bfloat16")
    np.testing.assert_array_equal(prefilled, same)
    assert {array.dtype for array in rounded} == {jnp.dtype("float32")}

    def error(arrays):
        return [
            np.linalg.norm(one.astype(jnp.float32) - other) / np.linalg.norm(other)
            for one, other in zip(arrays, exact, strict=True)
        ]

    assert min(error(rounded)) > 1e-4 and max(error(rounded)) < 2e-2
    assert np.mean(error(rounded)) < np.mean(error(half))


def test_a_layer_adds_attention_and_then_the_mlp(model):
    """The attention lets every position attend only to itself, so it returns the values."""
    layer = jax.tree.map(lambda x: x[0], model.blocks)
    x = np.random.default_rng(0).normal(size=(2, 3, 32)).astype(np.float32)

    def norm(x):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)

    after, (key, value) = layer(jnp.asarray(x), lambda q, k, v: v)
    expected_value = np.einsum("btd,dhk->bthk", norm(x), layer.value[...])
    np.testing.assert_allclose(value, expected_value, atol=1e-5)
    np.testing.assert_allclose(key, np.einsum("btd,dhk->bthk", norm(x), layer.key[...]), atol=1e-5)
    x = x + np.einsum("bthk,hkd->btd", expected_value, layer.out[...])
    x = x + np.maximum(norm(x) @ layer.fc1[...], 0) @ layer.fc2[...]
    np.testing.assert_allclose(after, x, atol=1e-4)


def test_unstacked_layers_compute_exactly_the_same(model):
    run = jax.jit(lambda model, ids: (model.logits(model(ids)), model.prefill(ids)))
    unstacked = unstack(model)
    assert [stack.query.shape[0] for stack in unstacked.stacks] == [1, 1]
    logits, (_, keys, _) = run(unstacked, random_ids())
    expected, (_, (stacked_keys,), _) = run(model, random_ids())
    np.testing.assert_array_equal(logits, expected)
    np.testing.assert_array_equal(np.concatenate(keys), stacked_keys)
    assert weight_dtype(convert_weights(unstacked, "int8")) == "int8"
    assert weight_dtype(model) == "float32"


def test_a_configuration_of_an_older_version_can_be_read():
    values = to_dict(CONFIG)
    assert build(DecoderConfig, values | {"pad_id": 1}) == CONFIG
    with pytest.raises(UserError, match=r"config\.pad_id is 0; it can only be 1 now"):
        build(DecoderConfig, values | {"pad_id": 0})


def test_impossible_sizes_are_rejected():
    with pytest.raises(UserError, match="embed 30 must be a multiple of heads 4"):
        DecoderConfig(48, 16, 2, 30, 4, 64)
    with pytest.raises(UserError, match="layers is 0"):
        DecoderConfig(48, 16, 0, 32, 4, 64)
    with pytest.raises(ValueError, match="17 tokens in a row, but max_length is 16"):
        random_decoder(48, 16)(random_ids(1, 17))


@pytest.mark.slow
def test_every_mesh_of_eight_devices_equals_one_device():
    """Logits, gradients, shardings and decoding, in a process with simulated devices."""
    program = Path(__file__).with_name("eight_devices.py")
    process = subprocess.run(
        [sys.executable, program],
        capture_output=True,
        text=True,
        timeout=900,
        env=simulated_devices.environment(),
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("equal") == 6, process.stdout
