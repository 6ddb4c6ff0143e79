"""Variants: the same transformation for all images; the first half keep colours."""

import numpy as np
import pytest
from flax import nnx

from leon_jax.config import UserError
from leon_jax.data import image_variants
from leon_jax.documents import Document, Image, Text
from leon_jax.models.vqgan import VQGAN, VQGANConfig
from leon_jax.tokenizers.image import ImageTokenizer

COUNT = 8


def disc(colour, centre=(24, 32)) -> np.ndarray:
    """A disc on white, 64 px."""
    y, x = np.mgrid[:64, :64]
    inside = (y - centre[0]) ** 2 + (x - centre[1]) ** 2 < 150
    return np.where(inside[..., None], np.array(colour, np.uint8), np.uint8(255))


def mean_colour(pixels) -> np.ndarray:
    """The mean colour of the disc, without the background."""
    inside = pixels.min(-1) < 128
    return pixels[inside].astype(float).mean(0)


def test_variant_0_changes_nothing_and_all_variants_differ():
    image = disc((200, 30, 30))
    np.testing.assert_array_equal(image_variants.change(image, 0, COUNT), image)
    changed = [image_variants.change(image, variant, COUNT) for variant in range(COUNT)]
    assert len({pixels.tobytes() for pixels in changed}) == COUNT
    np.testing.assert_array_equal(changed[5], image_variants.change(image, 5, COUNT))


def test_the_first_half_keeps_colours_and_sides_and_the_rest_changes_hues():
    image = disc((200, 30, 30), centre=(32, 16))
    for variant in range(COUNT):
        changed = image_variants.change(image, variant, COUNT)
        assert (changed[0] > 250).all() and (changed[-1] > 250).all(), "the background is white"
        same_colour = np.abs(mean_colour(changed) - (200, 30, 30)).max() < 12
        assert same_colour == (variant < image_variants.plain(COUNT)), variant
        if same_colour:
            assert np.nonzero(changed.min(-1) < 128)[1].mean() < 32, "the disc is on the left"


def test_a_variant_moves_two_images_in_the_same_way():
    images = disc((200, 30, 30)), disc((30, 30, 200))
    for variant in range(COUNT):
        centres = [
            np.argwhere(image_variants.change(image, variant, COUNT).min(-1) < 128).mean(0)
            for image in images
        ]
        np.testing.assert_allclose(centres[0], centres[1], atol=0.5)


@pytest.fixture
def tokenizer():
    config = VQGANConfig(
        resolution=16, channels=8, multipliers=(1, 2), blocks=1, attention_sizes=(), groups=4,
        latent=8, code_dim=4, codes=32,
    )  # fmt: skip
    return ImageTokenizer(VQGAN(config, rngs=nnx.Rngs(0)), batch_size=2)


def test_encoded_variants_are_the_codes_of_changed_images(tokenizer):
    colours = [(200, 30, 30), (30, 200, 30), (30, 30, 200)]
    source = [Document((Text(str(c)), Image(pixels=disc(c)))) for c in colours]
    codes = image_variants.encode(source, tokenizer, COUNT)
    read = image_variants.Variants([codes[:1], codes[1:]], source)
    assert read.count == COUNT
    changed = tokenizer.preprocess(image_variants.change(source[2].pixels, 6, COUNT))
    np.testing.assert_array_equal(read(2, 6).codes, tokenizer.encode(changed[None])[0])
    assert read(2, 6).text == source[2].text


def test_variants_of_another_number_of_documents_raise_an_error(tokenizer):
    source = [Document((Text("red"), Image(pixels=disc((200, 30, 30)))))]
    codes = image_variants.encode(source, tokenizer, 2)
    with pytest.raises(UserError, match="variants of 1 documents, not of 2"):
        image_variants.Variants([codes], source * 2)
