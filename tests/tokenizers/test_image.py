"""Images to codes and back with the image tokenizer."""

import numpy as np
import PIL.Image
import pytest
from flax import nnx

from leon_jax import weight_files
from leon_jax.config import UserError, to_dict
from leon_jax.models.vqgan import VQGAN, VQGANConfig
from leon_jax.tokenizers.image import ImageTokenizer, fit_image, normalize, to_pixels

TINY = VQGANConfig(
    resolution=16, channels=8, multipliers=(1, 2), blocks=1, attention_sizes=(), groups=4,
    latent=8, code_dim=4, codes=32,
)  # fmt: skip


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8)


def test_a_saved_tokenizer_gives_the_same_codes(tmp_path, pixels):
    model = VQGAN(TINY, rngs=nnx.Rngs(0))
    path = tmp_path / "tokenizer.safetensors"
    weight_files.save(path, model, "tokenizer", to_dict(TINY))
    loaded = ImageTokenizer.load(path)
    assert (loaded.resolution, loaded.shape, loaded.codes) == (16, (8, 8), 32)
    images = normalize(pixels)
    np.testing.assert_array_equal(loaded.encode(images), ImageTokenizer(model).encode(images))


def test_codes_do_not_depend_on_the_batch(pixels):
    model, images = VQGAN(TINY, rngs=nnx.Rngs(0)), normalize(pixels)
    whole = ImageTokenizer(model, batch_size=8).encode(images)
    cut = ImageTokenizer(model, batch_size=2).encode(images)
    np.testing.assert_array_equal(whole, cut)
    assert whole.shape == (5, 8, 8)


def test_decoded_images_stay_in_range_and_unknown_codes_are_rejected():
    tokenizer = ImageTokenizer(VQGAN(TINY, rngs=nnx.Rngs(0)))
    decoded = tokenizer.decode(np.arange(64, dtype=np.int32).reshape(1, 8, 8) % 32)
    assert decoded.shape == (1, 16, 16, 3) and np.abs(decoded).max() <= 1
    with pytest.raises(ValueError, match="between 0 and 31"):
        tokenizer.decode(np.full((1, 8, 8), 32))


def test_images_are_blended_with_white_and_cropped_in_the_centre():
    clear = PIL.Image.new("RGBA", (40, 20), (255, 0, 0, 0))
    assert (fit_image(clear, 16) == 255).all()
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 200
    np.testing.assert_array_equal(fit_image(wide, 20), wide[:, 20:40])
    assert fit_image(np.zeros((1, 3, 3), np.uint8), 16).shape == (16, 16, 3)


def test_pixels_survive_normalisation_exactly():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=-1)
    scaled = normalize(levels)
    assert scaled.min() == -1 and scaled.max() == 1
    np.testing.assert_array_equal(to_pixels(scaled), levels)


def test_a_file_of_another_kind_is_rejected(tmp_path):
    path = tmp_path / "x.safetensors"
    weight_files.save(path, VQGAN(TINY, rngs=nnx.Rngs(0)), "encoder", to_dict(TINY))
    with pytest.raises(UserError, match="tokenizer file is needed"):
        ImageTokenizer.load(path)
