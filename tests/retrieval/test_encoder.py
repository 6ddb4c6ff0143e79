"""Both kinds of encoders: embeddings, preprocessing, dropout and errors."""

import numpy as np
import pytest

from leon_jax.config import UserError
from leon_jax.data.augment import plain
from leon_jax.retrieval.encoder import RetrievalEncoder
from leon_jax.retrieval.neighbour_selection import drop_tokens
from leon_jax.tokenizers.text import TextTokenizer
from tests import tiny
from tests.retrieval import clip_folder


@pytest.fixture(scope="module", params=["ours", "OpenAI's"])
def path(request, tmp_path_factory):
    """A path for `RetrievalEncoder.load`: our file, or a CLIP folder."""
    if request.param == "ours":
        return tiny.folders()[0] / "encoder.safetensors"
    return clip_folder.write(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def encoder(path):
    return RetrievalEncoder.load(path, batch_size=4)


def images(count: int = 6) -> list[np.ndarray]:
    """Images of several sizes, none of them the size of the network."""
    rng = np.random.default_rng(0)
    return [
        np.full((20 + 9 * i, 50 - 5 * i, 3), rng.integers(0, 256, 3), np.uint8)
        for i in range(count)
    ]


def test_embeddings_are_unit_vectors_in_the_order_of_the_inputs(encoder):
    texts = ["a cat", "a red heart", "", "a cat", "the word " * 100]
    for rows, single in (
        (encoder.embed_texts(texts), encoder.embed_texts(texts[1:2])),
        (encoder.embed_images(images()), encoder.embed_images(images()[1:2])),
    ):
        assert rows.shape[1] == encoder.dimensions and rows.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
        np.testing.assert_allclose(rows[1:2], single, atol=1e-6)
        assert np.abs(rows[0] - rows[1]).max() > 1e-3
    assert encoder.embed_texts([]).shape == (0, encoder.dimensions)
    assert encoder.embed_images([]).shape == (0, encoder.dimensions)


def test_images_may_be_preprocessed_first_and_may_be_an_iterator(encoder):
    squares = [encoder.preprocess(pixels) for pixels in images()]
    assert {(square.shape, square.dtype.name) for square in squares} == {((16, 16, 3), "uint8")}
    expected = encoder.embed_images(images())
    np.testing.assert_array_equal(encoder.embed_preprocessed(squares), expected)
    np.testing.assert_array_equal(encoder.embed_preprocessed(iter(squares)), expected)
    np.testing.assert_array_equal(encoder.embed_images(iter(images())), expected)


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((16, 16, 3), np.float32),
        np.zeros((16, 16), np.uint8),
        np.zeros((16, 16, 4), np.uint8),
        np.zeros((0, 16, 3), np.uint8),
    ],
    ids=lambda pixels: f"{pixels.dtype}{pixels.shape}",
)
def test_arrays_that_are_not_images_are_rejected(encoder, pixels):
    with pytest.raises(UserError, match=r"must be uint8\[h, w, 3\], not "):
        encoder.embed_images([pixels])
    with pytest.raises(UserError, match=r"must be uint8\[16, 16, 3\], not "):
        encoder.embed_preprocessed([pixels])


def test_query_dropout_works_with_either_tokenizer(encoder):
    text = "the red heart the blue car the green tree"
    rng = np.random.default_rng(0)
    dropped = drop_tokens(text, encoder.text, 0.5, rng)
    assert len(dropped) < len(text) and set(dropped) <= set(text)
    assert drop_tokens(text, encoder.text, 0.0, rng) == text


def test_our_encoder_takes_the_square_in_the_centre_resized_without_augmentation():
    encoder = RetrievalEncoder.load(tiny.folders()[0] / "encoder.safetensors")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 23, 3)).astype(np.uint8)
    np.testing.assert_allclose(
        encoder.preprocess(pixels) / 255, plain(pixels[8:31], 16), atol=0.5001 / 255
    )


def test_our_encoder_needs_the_text_tokenizer_it_was_trained_with(tmp_path):
    path = tiny.folders()[0] / "encoder.safetensors"
    explicit = RetrievalEncoder.load(path, TextTokenizer.load(path.with_name("text.json")))
    default = RetrievalEncoder.load(path)
    np.testing.assert_array_equal(explicit.embed_texts(["cat"]), default.embed_texts(["cat"]))
    other = TextTokenizer.train(["another text"], 256)
    with pytest.raises(UserError, match=r"with a text tokenizer of \d+ entries, not 256"):
        RetrievalEncoder.load(path, other)
    (tmp_path / "encoder.safetensors").write_bytes(path.read_bytes())
    with pytest.raises(UserError, match=r"cannot read the text tokenizer .*text\.json"):
        RetrievalEncoder.load(tmp_path / "encoder.safetensors")


def test_a_folder_without_a_clip_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*config\.json: No such file"):
        RetrievalEncoder.load(tmp_path)
