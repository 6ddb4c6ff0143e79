"""The VQ-GAN: shapes, quantisation, and the gradients that its training needs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from leon_jax import sharding
from leon_jax.config import ConfigError, build
from leon_jax.models.discriminator import PatchDiscriminator, hinge_loss
from leon_jax.models.vqgan import VQGAN, GroupNorm, VQGANConfig, nearest_code, quantize

TINY = VQGANConfig(
    resolution=16, channels=8, multipliers=(1, 2), blocks=1, attention_sizes=(8,), groups=4,
    latent=8, code_dim=4, codes=32,
)  # fmt: skip


@pytest.fixture(scope="module")
def images():
    return jax.random.uniform(jax.random.key(1), (2, 16, 16, 3), minval=-1, maxval=1)


def test_images_are_encoded_to_a_grid_of_codes_and_decoded(images):
    model = VQGAN(TINY, rngs=nnx.Rngs(0))
    codes = model.encode(images)
    assert codes.shape == (2, 8, 8) and codes.dtype == jnp.int32
    assert int(codes.min()) >= 0 and int(codes.max()) < 32
    assert model.decode(codes).shape == images.shape


def test_the_last_layer_may_make_squares_of_pixels(images):
    config = dataclasses.replace(TINY, multipliers=(1, 2, 2), pixel_patch=2)
    model, plain = (
        VQGAN(dataclasses.replace(config, pixel_patch=patch), rngs=nnx.Rngs(0)) for patch in (2, 1)
    )
    codes = model.encode(images)
    assert model.decode(codes).shape == plain.decode(codes).shape == images.shape
    features = model.decoder.features(model.from_code(model.codebook[...][codes]))
    assert features.shape == (2, 8, 8, 16), "the finest level, of 8 channels, is left out"
    pixels, patches = model.decoder.pixels(features), model.decoder.out(features)
    # The channels of a position are the rows of its square, from top to bottom.
    square = patches[1, 2, 5].reshape(2, 2, 3)
    np.testing.assert_array_equal(pixels[1, 4:6, 10:12], square)
    # Also for a batch that a mesh shares, as in training.
    with jax.set_mesh(sharding.make_mesh((1, 1, 1, 1), jax.devices()[:1])):
        batch = jax.device_put(np.asarray(features), sharding.spec("batch"))
        np.testing.assert_allclose(jax.jit(model.decoder.pixels)(batch), pixels, atol=1e-5)


def test_the_default_configuration_has_the_grid_of_cm3leon():
    config = VQGANConfig()
    assert (config.grid, config.codes) == (32, 8192)
    model = jax.eval_shape(lambda: VQGAN(config, rngs=nnx.Rngs(0)))
    codes = jax.eval_shape(lambda m, x: m.encode(x), model, jnp.zeros((1, 256, 256, 3)))
    assert codes.shape == (1, 32, 32)


@pytest.mark.parametrize("halo", [0, 2])
def test_with_a_halo_a_latent_depends_only_on_its_patch_and_the_halo(images, halo):
    model = VQGAN(dataclasses.replace(TINY, halo=halo), rngs=nnx.Rngs(0))
    assert model.encode(images).shape == (2, 8, 8)
    # The patch of the latent at (3, 4) has rows 6 and 7, and columns 8 and 9.
    gradient = jax.grad(lambda x: jnp.abs(model.latents(x)[0, 3, 4]).sum())(images)[0]
    depends = np.asarray(gradient).any(-1)
    expected = np.zeros((16, 16), bool)
    expected[6 - halo : 8 + halo, 8 - halo : 10 + halo] = True
    np.testing.assert_array_equal(depends, expected)
    white = model.latents(jnp.ones((1, 16, 16, 3)))
    np.testing.assert_allclose(white, jnp.broadcast_to(white[:, :1, :1], white.shape), atol=1e-6)
    with pytest.raises(ConfigError, match="halo is -1"):
        build(VQGANConfig, {"halo": -1})


@pytest.mark.parametrize("halo", [None, 1])
def test_recomputing_layers_does_not_change_the_gradients(images, halo):
    def gradient(remat):
        config = dataclasses.replace(TINY, halo=halo, remat=remat)
        model = VQGAN(config, rngs=nnx.Rngs(0))

        def loss(model):
            return jnp.square(model.decoder(model.from_code(model.latents(images)))).sum()

        return jax.jit(jax.grad(loss))(model)

    for plain, recomputed in zip(
        jax.tree.leaves(gradient(False)), jax.tree.leaves(gradient(True)), strict=True
    ):
        atol = 1e-4 * np.abs(plain).max()
        np.testing.assert_allclose(recomputed, plain, rtol=1e-3, atol=atol)


def test_the_nearest_code_has_the_smallest_euclidean_distance():
    rng = np.random.default_rng(0)
    latents, codebook = rng.normal(size=(2, 3, 5, 4)), rng.normal(size=(32, 4))
    distances = np.square(latents[..., None, :] - codebook).sum(-1)
    codes = nearest_code(jnp.float32(latents), jnp.float32(codebook))
    np.testing.assert_array_equal(codes, distances.argmin(-1))


def test_unit_codes_are_chosen_by_direction(images):
    model = VQGAN(dataclasses.replace(TINY, unit_codes=True), rngs=nnx.Rngs(0))
    raw = np.asarray(model.to_code(model.encoder(images)), np.float64)
    codebook = np.asarray(model.codebook[...], np.float64)
    cosines = raw @ codebook.T / np.linalg.norm(raw, axis=-1)[..., None]
    cosines /= np.linalg.norm(codebook, axis=-1)
    codes = model.encode(images)
    np.testing.assert_array_equal(codes, cosines.argmax(-1))
    np.testing.assert_allclose(jnp.linalg.norm(model.latents(images), axis=-1), 1, atol=1e-6)
    # Only the directions of the codebook's vectors matter.
    decoded = model.decode(codes)
    lengths = jnp.linspace(0.5, 2, 32)[:, None]
    model.codebook[...] = model.codebook[...] * lengths
    np.testing.assert_array_equal(model.encode(images), codes)
    np.testing.assert_allclose(model.decode(codes), decoded, atol=1e-5)


def test_quantisation_passes_gradients_straight_through():
    rng = np.random.default_rng(0)
    latents = jnp.float32(rng.normal(size=(1, 2, 2, 4)))
    codebook = jnp.float32(rng.normal(size=(8, 4)))
    weights = jnp.float32(rng.normal(size=(1, 2, 2, 4)))
    gradient = jax.grad(lambda z: (quantize(z, codebook, 0.25)[0] * weights).sum())(latents)
    np.testing.assert_allclose(gradient, weights, rtol=1e-6)


def test_commitment_scales_the_term_of_the_encoder_and_not_of_the_codebook():
    rng = np.random.default_rng(0)
    latents = jnp.float32(rng.normal(size=(1, 2, 2, 4)))
    codebook = jnp.float32(rng.normal(size=(8, 4)))

    def gradients(commitment):
        return jax.grad(lambda z, e: quantize(z, e, commitment)[1], argnums=(0, 1))(
            latents, codebook
        )

    weak, strong = gradients(0.25), gradients(1.0)
    np.testing.assert_allclose(strong[0], 4 * weak[0], rtol=1e-5)
    np.testing.assert_allclose(strong[1], weak[1], rtol=1e-6)
    vectors = codebook[nearest_code(latents, codebook)]
    np.testing.assert_allclose(weak[0], 0.25 * 2 * (latents - vectors) / latents.size, rtol=1e-4)


def test_group_normalisation_equals_flax():
    x = jax.random.normal(jax.random.key(0), (2, 5, 6, 12)) * 3 + 1
    peer = nnx.GroupNorm(12, num_groups=4, epsilon=1e-6, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(GroupNorm(12, 4)(x), peer(x), atol=1e-5)


def test_the_discriminator_scores_patches_and_the_hinge_loss_equals_its_formula(images):
    scores = PatchDiscriminator(4, 2, rngs=nnx.Rngs(0))(images)
    assert scores.ndim == 3 and scores.shape[0] == 2
    real, fake = jnp.array([2.0, 0.0]), jnp.array([-2.0, 0.5])
    assert float(hinge_loss(real, fake)) == pytest.approx(0.5 * (0.5 + 0.75))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("resolution", 50, "multiple of 8"),
        ("groups", 24, "groups"),
        ("chanels", 8, "channels"),
        ("pixel_patch", 8, "it must be one of 1, 2, 4"),
        ("pixel_patch", 3, "it must be one of 1, 2, 4"),
    ],
)
def test_a_wrong_size_is_rejected_with_its_key(key, value, words):
    with pytest.raises(ConfigError, match=words):
        build(VQGANConfig, {key: value})
