"""Tests the measurement of near-copy thresholds."""

import numpy as np
import pytest

from leon_jax.config import UserError
from leon_jax.documents import Document, Image, Provenance, Text
from leon_jax.retrieval import near_copies
from leon_jax.retrieval.encoder import normalise


class PixelEncoder:
    """Embeds an image as its pixels at a quarter of the side, and a text as nothing."""

    def embed_images(self, images):
        rows = []
        for image in images:
            block = len(image) // 4
            rows.append(image.reshape(4, block, 4, block, 3).mean((1, 3)).ravel() - 128)
        return normalise(np.array(rows, np.float32))

    def embed_texts(self, texts):
        return np.zeros((len(texts), 48), np.float32)


def documents(members: int) -> list[Document]:
    """Returns documents in groups of similar images: blocks of noise and weaker noise on them."""
    rng = np.random.default_rng(0)
    result = []
    for group in range(40):
        base = rng.integers(0, 256, (4, 4, 3))
        for member in range(members):
            blocks = 0.7 * base + 0.3 * rng.integers(0, 256, (4, 4, 3))
            pixels = blocks.repeat(16, 0).repeat(16, 1).astype(np.uint8)
            provenance = Provenance(f"{group}/{member}", "blocks", "CC0-1.0", "", group=str(group))
            result.append(Document((Text("blocks"), Image(pixels)), provenance))
    return result


def groups(members: int) -> list[str]:
    return [document.provenance.group for document in documents(members)]


def similarities(members: int) -> np.ndarray:
    """Returns the similarity of the images of each group."""
    images = [document.parts[1].pixels for document in documents(members)]
    rows = PixelEncoder().embed_images(images).reshape(40, members, -1)
    return (rows[:, 0] * rows[:, 1]).sum(1)


def test_images_of_one_group_are_no_copies():
    measured = near_copies.measure(PixelEncoder(), documents(2), 20, groups=groups(2))
    assert measured.separates_images
    assert np.percentile(similarities(2), 90) < measured.image < 1
    # Documents and images are equally similar here, because texts have no vectors.
    assert measured.document == measured.image


def test_without_groups_only_strangers_are_no_copies():
    alone = near_copies.measure(PixelEncoder(), documents(1), 20, groups=groups(1))
    assert alone == near_copies.measure(PixelEncoder(), documents(1), 20)
    assert alone.image < similarities(2).mean()


def test_an_encoder_that_sees_no_difference_gives_the_threshold_of_the_variations():
    class Blind(PixelEncoder):
        def embed_images(self, images):
            means = [[image.mean(), 300] for image in images]
            return normalise(np.array(means, np.float32))

        def embed_texts(self, texts):
            return np.zeros((len(texts), 2), np.float32)

    measured = near_copies.measure(Blind(), documents(2), 20, groups=groups(2))
    assert not measured.separates_images and measured.image > 0.99


def test_too_few_documents_are_refused():
    with pytest.raises(UserError, match="there are 7 documents; thresholds need at least 8"):
        near_copies.measure(PixelEncoder(), documents(1)[:7])
