"""Decoders of every form: weights, decoding, gradients, conversion and sharding."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from leon_jax import sharding
from leon_jax.config import ConfigError, UserError, build, to_dict
from leon_jax.models.decoder import Decoder
from leon_jax.models.decoder_config import DecoderConfig, Form, layer_weights
from leon_jax.models.weight_conversion import convert_weights, unstack
from leon_jax.ops.attention import CachedArray, LayerCache
from leon_jax.weight_files import flatten, load, restore, save
from tests import simulated_devices
from tests.models import forms

NAMES = list(forms.FORMS)
states = jax.jit(Decoder.__call__)


@jax.jit
def logits(model, ids, cells):
    return model.logits(model(ids, cells=cells))


@pytest.fixture(scope="module", params=NAMES)
def model(request):
    with jax.set_mesh(sharding.make_mesh((1, 1, 1, 1), jax.devices()[:1])):
        yield forms.decoder(request.param)


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_those_of_the_form(name):
    config = forms.config(name)
    arrays = flatten(jax.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    assert sum(array.size for array in arrays.values()) == config.parameter_count()
    names = {name.removeprefix("blocks.") for name in arrays if name.startswith("blocks.")}
    assert names == set(layer_weights(config))
    assert ("positions" in arrays) == (config.form.positions == "learned")
    assert ("head_table" in arrays) == (not config.form.tied_head)
    assert arrays["blocks.key"].shape == (2, 32, config.kv_heads or 4, 8)


def test_the_weights_of_llama_are_as_many_as_published():
    """Llama 2 7B and 70B (Touvron et al. 2023): 6.738 and 68.977 billion weights."""
    form = Form(**forms.LLAMA)
    small = DecoderConfig(32000, 4096, 32, 4096, 32, 11008, form=form)
    large = DecoderConfig(32000, 4096, 80, 8192, 64, 28672, kv_heads=8, form=form)
    assert [config.parameter_count() for config in (small, large)] == [
        6_738_415_616,
        68_976_648_192,
    ]


def test_operations_are_six_for_each_weight_of_a_product():
    """Norms and the input table are not multiplied; attention depends on the query heads alone."""
    config = DecoderConfig(32000, 4096, 80, 8192, 64, 28672, kv_heads=8, form=Form(**forms.LLAMA))
    others = 32000 * 8192 + (2 * 80 + 1) * 8192
    attention = 6 * 80 * 4096 * 8192
    assert config.flops_per_token(4096) == 6 * (config.parameter_count() - others) + attention


@pytest.mark.parametrize("name", NAMES)
def test_at_step_zero_every_layer_is_the_identity(name):
    config = forms.config(name)
    decoder = jax.jit(lambda: Decoder(config, rngs=nnx.Rngs(0)))()
    ids, cells = forms.random_ids()

    @jax.jit
    def without_layers(decoder):
        return decoder._final_norm(decoder._embed(ids, jnp.broadcast_to(jnp.arange(12), ids.shape)))

    hidden = states(decoder, ids, None, None, cells)
    np.testing.assert_allclose(hidden, without_layers(decoder), atol=1e-6)


def test_decode_steps_equal_the_whole_sequence(model):
    """Rows of different prompt lengths, of which one ends inside an image."""
    ids, cells = forms.random_ids(rows=3)
    whole = np.asarray(states(model, ids, None, None, cells))
    lengths = np.array([2, 5, 3])
    is_prompt = np.arange(5) < lengths[:, None]
    padded, padded_cells = (
        np.where(is_prompt, each[:, :5], padding) for each, padding in ((ids, 1), (cells, -1))
    )
    hidden, (keys,), (values,) = jax.jit(Decoder.prefill)(model, padded, None, padded_cells)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(hidden[row, :length], whole[row, :length], atol=1e-4)
    assert keys.shape == (2, 3, model.config.key_heads, 5, 8)
    prompt = LayerCache([CachedArray(keys)], [CachedArray(values)], is_prompt)
    empty = np.zeros((2, 3, 1, model.config.key_heads, 10, 8), np.float32)
    keys, values, rows, step = empty, empty.copy(), np.arange(3), jax.jit(Decoder.decode_step)
    for count in range(12 - lengths.max()):
        output = LayerCache(
            [CachedArray(keys)],
            [CachedArray(values)],
            np.broadcast_to(np.arange(10) < count, (3, 1, 10)),
        )
        at = lengths + count
        inputs = (each.astype(np.int32)[None, :, None] for each in (ids[rows, at], at))
        hidden, (k,), (v,) = step(
            model, *inputs, [prompt], [output], cells[rows, at][None, :, None]
        )
        np.testing.assert_allclose(hidden[0, :, 0], whole[rows, at], atol=1e-4)
        keys[..., count, :], values[..., count, :] = k[:, 0], v[:, 0]


@jax.jit
def gradients(model):
    ids, cells = forms.random_ids()
    return jax.grad(lambda m: jnp.square(m.logits(m(ids, cells=cells))).mean())(model)


@pytest.mark.parametrize("remat", ["dots", "dots_and_attention", "attention", "full"])
def test_remat_does_not_change_the_gradients(model, remat):
    plain = flatten(gradients(model))
    recomputing = nnx.clone(model)
    recomputing.config = dataclasses.replace(model.config, remat=remat)
    for name, gradient in flatten(gradients(recomputing)).items():
        assert np.isfinite(gradient).all() and np.any(gradient), name
        # The gradient of a bias of the keys is rounding error alone: softmax cancels the bias.
        atol = 1e-8 if name.endswith("key_bias") else 1e-5 * np.abs(plain[name]).max()
        np.testing.assert_allclose(gradient, plain[name], rtol=1e-4, atol=atol, err_msg=name)


def test_unstacked_layers_compute_the_same(model):
    ids, cells = forms.random_ids()
    expected = logits(model, ids, cells)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(logits(unstack(model), ids, cells), expected, atol=1e-6 * scale)


def test_weights_in_eight_bits_are_nearly_the_same(model):
    ids, cells = forms.random_ids()
    small, exact = convert_weights(model, "int8"), np.asarray(logits(model, ids, cells))
    assert np.std(logits(small, ids, cells) - exact) < 0.05 * np.std(exact)
    products = [weight for weight in layer_weights(model.config).values() if weight.summed]
    arrays = flatten(small.blocks)
    assert sum(array.dtype == jnp.int8 for array in arrays.values()) == len(products)
    assert {array.dtype for array in flatten(convert_weights(model, "bfloat16")).values()} == {
        jnp.dtype("bfloat16")
    }


def test_bfloat16_compute_is_close_to_float32(model):
    ids, cells = forms.random_ids()
    small = jax.tree.map(lambda x: 0.3 * x, model)
    half = nnx.clone(small)
    half.config = dataclasses.replace(model.config, dtype="bfloat16")
    hidden, exact = (states(each, ids, None, None, cells) for each in (half, small))
    assert hidden.dtype == jnp.bfloat16
    error = hidden.astype(jnp.float32) - exact
    assert np.std(error) < 0.03 * np.std(exact)


def test_a_weight_file_restores_the_model(model, tmp_path):
    save(tmp_path / "decoder.safetensors", model, "decoder", {"model": to_dict(model.config)})
    arrays, header = load(tmp_path / "decoder.safetensors", "decoder")
    config = build(DecoderConfig, header["model"])
    assert config == model.config
    restored = restore(jax.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(1))), arrays)
    for one, other in zip(jax.tree.leaves(restored), jax.tree.leaves(model), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_default_form_is_not_written_to_files():
    values = to_dict(forms.config("cm3leon"))
    assert not {"form", "kv_heads"} & set(values)
    assert set(to_dict(forms.config("llama"))) - set(values) == {"form", "kv_heads"}


def test_a_rotated_token_does_not_depend_on_where_the_sequence_begins():
    model, (ids, _) = forms.decoder("llama"), forms.random_ids()
    positions = np.broadcast_to(np.arange(12, dtype=np.int32), ids.shape)
    hidden = states(model, ids, positions)
    np.testing.assert_allclose(states(model, ids, positions + 100), hidden, atol=1e-4)
    assert np.abs(states(model, ids, 2 * positions) - hidden).max() > 1e-2


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"kv_heads": 3}, "heads 4 must be a multiple of kv_heads 3"),
        ({"kv_heads": 0}, "kv_heads is 0; it must be at least 1"),
        ({"embed": 36, "form": {"positions": "rotary"}}, "embed / heads is 9; form.positions"),
        ({"embed": 24, "form": {"positions": "rotary_2d", "image_columns": 2}}, "multiple of 4"),
        ({"form": {"positions": "rotary_2d"}}, "config.form: image_columns is 0"),
        ({"form": {"rotary_base": 0}}, "config.form: rotary_base is 0"),
        ({"form": {"mlp": "swish"}}, "config.form.mlp is 'swish'; it must be one of"),
        ({"form": {"mpl": "relu"}}, "did you mean config.form.mlp?"),
    ],
)
def test_an_impossible_form_is_rejected(changes, message):
    values = to_dict(forms.config("cm3leon"))
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        build(DecoderConfig, values | changes)
    assert issubclass(ConfigError, UserError)


def test_cells_are_needed_on_a_grid():
    with pytest.raises(ValueError, match="the cells of the tokens are missing"):
        forms.decoder("grid")(forms.random_ids()[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name != "cm3leon"])
def test_a_mesh_that_splits_every_axis_equals_one_device(name):
    """See `test_decoder.py`, which does the same with the form of CM3Leon on more meshes."""
    process = subprocess.run(
        [sys.executable, Path(__file__).with_name("eight_devices.py"), name],
        capture_output=True,
        text=True,
        timeout=900,
        env=simulated_devices.environment(16),
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("equal") == 1, process.stdout
