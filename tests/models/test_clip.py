"""CLIP: its arithmetic against a reference in float64, padding, remat and configurations."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from leon_jax import sharding
from leon_jax.config import UserError, build, to_dict
from leon_jax.models.clip import (
    DEVIATION,
    MEAN,
    CLIPConfig,
    TextConfig,
    VisionConfig,
    create,
)

CONFIG = CLIPConfig(
    vision=VisionConfig(image_size=8, patch_size=4, width=12, layers=2, heads=3),
    text=TextConfig(context_length=7, vocab_size=20, width=8, layers=2, heads=2),
    embed_dim=6,
)


@pytest.fixture
def model():
    """A model with only random parameters, so that no zero hides a missing term."""
    module = create(CONFIG, jax.random.key(0))
    leaves, structure = jax.tree.flatten(module)
    rng = np.random.default_rng(0)
    arrays = [
        jax.device_put(leaf + rng.normal(0, 0.2, leaf.shape).astype(np.float32), leaf.sharding)
        for leaf in leaves
    ]
    return jax.tree.unflatten(structure, arrays)


def double(parameter) -> np.ndarray:
    return np.asarray(parameter[...], np.float64)


def layer_norm(x, scale, bias):
    mean = x.mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * scale + bias


def transformer(x, blocks, layers, causal):
    """The residual blocks of OpenAI's model, one position and one head at a time."""
    for layer in range(layers):
        weights = {
            name: double(getattr(blocks, name))[layer]
            for name in ("qkv", "qkv_bias", "out", "out_bias", "fc1", "fc1_bias", "fc2", "fc2_bias")
        }
        norms = [
            (double(norm.scale)[layer], double(norm.bias)[layer])
            for norm in (blocks.norm1, blocks.norm2)
        ]
        y = layer_norm(x, *norms[0])
        heads = weights["qkv"].shape[2]
        update = np.zeros_like(x) + weights["out_bias"]
        for head in range(heads):
            q, k, v = (
                y @ weights["qkv"][:, c, head] + weights["qkv_bias"][c, head] for c in range(3)
            )
            for t in range(len(x)):
                last = t + 1 if causal else len(x)
                scores = k[:last] @ q[t] / np.sqrt(q.shape[-1])
                attention = np.exp(scores - scores.max())
                update[t] += (attention / attention.sum()) @ v[:last] @ weights["out"][head]
        x = x + update
        hidden = layer_norm(x, *norms[1]) @ weights["fc1"] + weights["fc1_bias"]
        hidden = hidden / (1 + np.exp(-1.702 * hidden))
        x = x + hidden @ weights["fc2"] + weights["fc2_bias"]
    return x


def test_image_embeddings_equal_a_float64_reference(model):
    images = np.random.default_rng(1).random((2, 8, 8, 3)).astype(np.float32)
    rows = []
    for image in images:
        pixels = (image.astype(np.float64) - MEAN) / DEVIATION
        kernel = double(model.stem.kernel)
        tokens = [double(model.class_token)]
        for y in (0, 4):
            for x in (0, 4):
                patch = pixels[y : y + 4, x : x + 4, :, None]
                tokens.append((patch * kernel).sum((0, 1, 2)))
        x = np.stack(tokens) + double(model.patch_positions)
        before, after = model.vision_before, model.vision_after
        x = layer_norm(x, double(before.scale), double(before.bias))
        x = transformer(x, model.vision_blocks, 2, causal=False)
        x = layer_norm(x[0], double(after.scale), double(after.bias))
        x = x @ double(model.image_projection)
        rows.append(x / np.linalg.norm(x))
    np.testing.assert_allclose(model.embed_image(images), rows, atol=2e-5)


def test_text_embeddings_equal_a_float64_reference(model):
    ids = np.array([[18, 3, 5, 7, 19, 17, 17], [18, 1, 19, 17, 17, 17, 17]], np.int32)
    rows = []
    for row in ids:
        end = int(np.argmax(row == CONFIG.text.end))
        x = double(model.tokens)[row] + double(model.token_positions)
        x = transformer(x, model.text_blocks, 2, causal=True)
        x = layer_norm(x[end], double(model.text_after.scale), double(model.text_after.bias))
        x = x @ double(model.text_projection)
        rows.append(x / np.linalg.norm(x))
    np.testing.assert_allclose(model.embed_text(ids), rows, atol=2e-5)


def test_ids_after_the_end_token_do_not_matter_and_ids_before_it_do(model):
    base = np.array([[18, 3, 5, 19, 17, 17, 17]], np.int32)
    padded, shorter, other = base.copy(), base[:, :5], base.copy()
    padded[0, 4:] = (2, 19, 9)
    other[0, 1] = 4
    expected = np.asarray(model.embed_text(base))
    np.testing.assert_allclose(model.embed_text(padded), expected, atol=1e-6)
    np.testing.assert_allclose(model.embed_text(shorter), expected, atol=1e-6)
    assert np.abs(np.asarray(model.embed_text(other)) - expected).max() > 1e-3


@pytest.mark.parametrize("stem", ["patch", "convolution"])
def test_embeddings_are_unit_vectors_and_remat_does_not_change_gradients(stem):
    vision = VisionConfig(8, 4, 12, 2, 3, stem)
    plain = create(CLIPConfig(vision, CONFIG.text, 6), jax.random.key(0))
    remat = create(CLIPConfig(vision, CONFIG.text, 6, remat=True), jax.random.key(0))
    images = np.random.default_rng(1).random((3, 8, 8, 3)).astype(np.float32)
    embedded = plain.embed_image(images)
    assert embedded.shape == (3, 6) and embedded.dtype == jnp.float32
    np.testing.assert_allclose(np.linalg.norm(embedded, axis=1), 1, atol=1e-5)

    def gradient(model):
        return jax.grad(lambda m: m.embed_image(images)[:, 0].sum())(model)

    for one, other in zip(
        jax.tree.leaves(gradient(plain)), jax.tree.leaves(gradient(remat)), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_the_scale_starts_at_one_over_007_and_never_exceeds_100():
    model = create(CONFIG, jax.random.key(0))
    assert float(model.scale()) == pytest.approx(1 / 0.07, rel=1e-5)
    huge = create(CLIPConfig(CONFIG.vision, CONFIG.text, 6, logit_scale=9.0), jax.random.key(0))
    assert float(huge.scale()) == 100


def test_a_configuration_of_an_older_version_can_be_read():
    assert build(CLIPConfig, to_dict(CONFIG) | {"max_scale": 100.0}) == CONFIG
    with pytest.raises(UserError, match=r"config\.max_scale is 50\.0; it can only be 100\.0 now"):
        build(CLIPConfig, to_dict(CONFIG) | {"max_scale": 50.0})


def test_vit_b32_has_the_published_number_of_parameters():
    with jax.set_mesh(sharding.make_mesh((1, 1, 1, 1), jax.devices()[:1])):
        config = CLIPConfig(text=TextConfig(vocab_size=49_408))
        model = jax.eval_shape(lambda: create(config, jax.random.key(0)))
    total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(model))
    assert total == 151_277_313  # openai/CLIP ViT-B/32, including the logit scale


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 50, "patch_size": 8}, "image_size 50 is not a multiple of patch_size 8"),
        ({"width": 10, "heads": 3}, "width 10 is not a multiple of heads 3"),
        (
            {"image_size": 48, "patch_size": 6, "stem": "convolution"},
            "patch_size is 6; .* a power of two",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_rejected(arguments, message):
    with pytest.raises(ValueError, match=message):
        VisionConfig(**arguments)
