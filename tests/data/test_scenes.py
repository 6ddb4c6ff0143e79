"""Tests that a scene shows each of its images once, whole and at a random place."""

import numpy as np
import pytest

from leon_jax.data.scenes import compose

COLOURS = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (90, 90, 0)]


def solid(colour, sides=(48, 48)):
    return np.full((*sides, 3), colour, np.uint8)


def boxes(scene, count):
    """Returns top, left, height and width of each colour, which must fill its box."""
    found = []
    for colour in COLOURS[:count]:
        rows, columns = np.nonzero((scene == colour).all(-1))
        top, left = rows.min(), columns.min()
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert len(rows) == height * width
        found.append((top, left, height, width))
    assert sum(h * w for _, _, h, w in found) + (scene == 255).all(-1).sum() == scene.size // 3
    return np.array(found)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_every_image_is_a_whole_square_of_20_to_40_pixels_on_white(count):
    images = [solid(colour) for colour in COLOURS[:count]]
    scenes = [compose(images, 64, np.random.default_rng(seed)) for seed in range(300)]
    found = np.concatenate([boxes(scene, count) for scene in scenes])
    np.testing.assert_array_equal(found[:, 2], found[:, 3])
    assert found[:, 2].min() == 20
    assert 36 <= found[:, 2].max() <= 40  # four images leave room for 40 pixels rarely
    # Images reach all four edges.
    assert found[:, :2].min(0).tolist() == [0, 0]
    assert (found[:, :2] + found[:, 2:]).max(0).tolist() == [64, 64]


def test_the_sides_scale_with_the_scene():
    images = [solid(colour) for colour in COLOURS]
    for seed in range(50):
        scene = compose(images, 128, np.random.default_rng(seed))
        sides = boxes(scene, 4)[:, 2]
        assert sides.min() >= 40 and sides.max() <= 80


def test_the_seed_decides():
    images = [solid(colour) for colour in COLOURS[:3]]
    first, again, other = (compose(images, 64, np.random.default_rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_the_centre_of_a_long_image_is_shown():
    """The image has three squares in a row; at their borders resizing mixes the colours."""
    squares = [solid(colour, (30, 30)) for colour in ((1, 1, 1), COLOURS[0], (1, 1, 1))]
    images = [np.concatenate(squares, axis=1), solid(COLOURS[1])]
    scene = compose(images, 64, np.random.default_rng(0))
    assert (scene == COLOURS[0]).all(-1).sum() > 16 * 16
    assert not (scene == 1).all(-1).any()


@pytest.mark.parametrize("count", [1, 5])
def test_other_numbers_of_images_are_refused(count):
    with pytest.raises(ValueError, match=f"two to four images, not {count}"):
        compose([solid((0, 0, 0))] * count, 64, np.random.default_rng(0))
