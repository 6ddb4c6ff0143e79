"""Tests random square crops and augmentation of images of any size."""

import dataclasses

import numpy as np
import PIL.Image
import pytest

from leon_jax.config import UserError
from leon_jax.data.augment import AugmentConfig, CropConfig, augment, random_crop, random_square

NO_CHANGE = AugmentConfig(
    zoom=0, aspect=0, shift=0, mirror=0, blur=0, brightness=0, contrast=0, saturation=0, hue=0,
    gray=0, close=0, outline=0,
)  # fmt: skip
HARDLY = dataclasses.replace(NO_CHANGE, zoom=1e-9)


@pytest.mark.parametrize("sides", [(9, 30), (30, 9), (16, 16), (1, 5)])
def test_squares_lie_inside_and_reach_every_edge(sides):
    rng = np.random.default_rng(0)
    squares = [random_square(sides, 0.5, rng) for _ in range(400)]
    for top, left, side in squares:
        assert min(sides) / 2 - 1 < side <= min(sides)
        assert 0 <= top <= sides[0] - side and 0 <= left <= sides[1] - side
    assert {top for top, _, _ in squares} >= {0, sides[0] - min(sides)}
    assert max(left + side for _, left, side in squares) == sides[1]


@pytest.mark.parametrize("sides", [(40, 40), (64, 100), (10, 8)])
def test_a_crop_is_the_square_resized_and_mirrored(sides):
    pixels = np.random.default_rng(1).integers(0, 256, (*sides, 3), np.uint8)
    for seed in range(8):
        config = CropConfig(crop=0.6, mirror=seed % 2)
        result = random_crop(pixels, 16, config, np.random.default_rng(seed))
        top, left, side = random_square(sides, 0.6, np.random.default_rng(seed))
        square = PIL.Image.fromarray(pixels[top : top + side, left : left + side])
        expected = np.asarray(square.resize((16, 16), PIL.Image.Resampling.LANCZOS))
        expected = expected[:, ::-1] if seed % 2 else expected
        np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("config", [NO_CHANGE, HARDLY])
def test_the_encoder_sees_squares_of_long_images_without_distortion(config):
    """The image has five bands of 20 columns; a squeezed one would show all of them."""
    pixels = np.repeat(np.arange(5, dtype=np.uint8) * 50, 20)[None, :, None]
    pixels = np.broadcast_to(pixels, (20, 100, 3))
    for seed in range(10):
        view = augment(np.array(pixels), 20, config, np.random.default_rng(seed))
        assert view.shape == (20, 20, 3) and view.dtype == np.uint8
        assert np.ptp(view) < 90


def test_a_crop_without_other_changes_shows_what_the_general_resampling_shows():
    y, x = np.mgrid[:60, :80]
    pixels = np.stack([2 * y, 2 * x, y + x], axis=-1).astype(np.uint8)
    config = [dataclasses.replace(one, crop=0.5) for one in (NO_CHANGE, HARDLY)]
    for seed in range(5):
        first, second = (augment(pixels, 32, one, np.random.default_rng(seed)) for one in config)
        # At the edges the general resampling blends with the white outside.
        difference = np.abs(first.astype(int) - second)[2:-2, 2:-2]
        assert difference.max() <= 4


@pytest.mark.parametrize("values", [{"crop": 0.0}, {"crop": 1.1}, {"mirror": -0.1}])
def test_values_out_of_range_are_refused(values):
    for config in (CropConfig, AugmentConfig):
        with pytest.raises(UserError, match=f"{next(iter(values))} is"):
            config(**values)
    with pytest.raises(UserError, match=r"scenes is 1\.5; it must be between 0 and 1"):
        CropConfig(scenes=1.5)
