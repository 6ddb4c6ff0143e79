"""LPIPS of all pairs, and the share of images that are nearest to their own."""

import numpy as np
import pytest

from leon_jax.evaluate import perceptual_match
from leon_jax.models.perceptual import lpips
from leon_jax.tokenizers.image import normalize
from leon_jax.train import perceptual_weights


@pytest.fixture(scope="module")
def weights():
    return perceptual_weights.load("vgg16")


def images(count, seed=0):
    rng = np.random.default_rng(seed)
    return [
        np.repeat(np.repeat(rng.integers(0, 256, (8, 8, 3), np.uint8), 8, 0), 8, 1)
        for _ in range(count)
    ]


def test_distances_are_those_of_lpips(weights):
    first, second = images(3), images(2, seed=1)
    expected = [
        [lpips(*(normalize(image[None]) for image in (one, other)), weights)[0] for other in second]
        for one in first
    ]
    actual = perceptual_match.distances(first, second, weights)
    np.testing.assert_allclose(actual, np.array(expected), rtol=1e-3, atol=1e-4)


def test_the_share_counts_images_that_are_nearest_to_their_own(weights):
    real = images(4)
    noisy = [
        np.clip(image.astype(int) + np.random.default_rng(5).integers(-20, 20, image.shape), 0, 255)
        for image in real
    ]
    generated = [image.astype(np.uint8) for image in noisy]
    assert perceptual_match.match_share(generated, real, weights) == 1
    swapped = [generated[1], generated[0], *generated[2:]]
    assert perceptual_match.match_share(swapped, real, weights) == 0.5


def test_a_copy_of_a_document_is_not_nearer_to_the_truth(weights):
    truth, other, document = images(3)
    noise = np.random.default_rng(5).integers(-20, 20, truth.shape)
    drawn = np.clip(truth.astype(int) + noise, 0, 255).astype(np.uint8)
    share = perceptual_match.beyond_documents_share(
        [drawn, document], [truth, other], [[document], [document, truth]], weights
    )
    assert share == 0.5
    assert perceptual_match.beyond_documents_share([drawn], [truth], [[]], weights) == 1
