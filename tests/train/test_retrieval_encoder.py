"""Tests the encoder's training program: loss, batches, learning, resumption and export."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from leon_jax import config as configuration
from leon_jax.config import UserError
from leon_jax.documents import Document, Image, Provenance, Text
from leon_jax.models.clip import CLIPConfig, TextConfig, VisionConfig, create
from leon_jax.retrieval.encoder import RetrievalEncoder, frame
from leon_jax.tokenizers.text import TextTokenizer
from leon_jax.train import retrieval_encoder as program_module
from leon_jax.train.optimizer import OptimizerConfig
from leon_jax.train.retrieval_encoder import (
    EncoderConfig,
    EncoderData,
    EncoderProgram,
    augment_caption,
    contrastive_loss,
    training_example,
)

NAMES = ("red heart", "blue square", "green tree", "black cat", "yellow sun", "left arrow")


def documents() -> list[Document]:
    rng = np.random.default_rng(0)
    dataset = []
    for number, name in enumerate(NAMES):
        base = rng.integers(0, 256, (2, 2, 3), np.uint8)
        for style in ("flat", "outlined"):
            pixels = np.repeat(np.repeat(base, 12, 0), 12, 1)
            pixels = np.clip(pixels.astype(int) + rng.integers(-9, 9, pixels.shape), 0, 255)
            source = Provenance(f"{style}/{number}", "test", "CC0-1.0", "")
            parts = (Text(f"{name}, {style} style"), Image(pixels=pixels.astype(np.uint8)))
            dataset.append(Document(parts, source))
    return dataset


@pytest.fixture
def program(tmp_path, monkeypatch) -> EncoderProgram:
    text = TextTokenizer.train([doc.parts[0].text for doc in documents()], 300)
    text.save(tmp_path / "text.json")
    monkeypatch.setattr(program_module.demo, "source", lambda split, folder: documents())
    return EncoderProgram(tiny(tmp_path / "text.json", text.size))


def tiny(text_path: pathlib.Path, size: int) -> EncoderConfig:
    return EncoderConfig(
        model=CLIPConfig(
            vision=VisionConfig(16, 4, 16, 2, 2, "convolution"),
            text=TextConfig(16, size + 3, 16, 1, 2),
            embed_dim=8,
        ),
        optimizer=OptimizerConfig(1e-2, 60, 5, weight_decay=0.0),
        batch_size=8,
        steps=60,
        data=EncoderData(text=str(text_path)),
    )


def expected_loss(model, images, texts, concepts) -> float:
    image = np.asarray(model.embed_image(images.astype(np.float32) / 255), np.float64)
    text = np.asarray(model.embed_text(texts), np.float64)
    logits = float(model.scale()) * image @ text.T
    total = 0.0
    for scores in (logits, logits.T):
        for row in range(len(scores)):
            positives = np.flatnonzero(concepts == concepts[row])
            total -= np.mean(scores[row, positives] - np.log(np.exp(scores[row]).sum()))
    return total / (2 * len(logits))


@pytest.mark.parametrize("concepts", [(0, 1, 2, 3), (5, 5, 2, 5)])
def test_the_loss_is_infonce_with_all_pairs_of_a_concept_as_positives(concepts):
    config = CLIPConfig(VisionConfig(8, 4, 8, 1, 2), TextConfig(6, 20, 8, 1, 2), embed_dim=4)
    model = create(config, jax.random.key(0))
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (4, 8, 8, 3), np.uint8)
    texts = np.stack([frame(rng.integers(0, 17, 3), config.text) for _ in range(4)])
    concepts = np.array(concepts, np.int32)
    loss, accuracy = contrastive_loss(
        model, jnp.asarray(images), jnp.asarray(texts), jnp.asarray(concepts)
    )
    assert float(loss) == pytest.approx(expected_loss(model, images, texts, concepts), rel=1e-4)
    assert 0 <= float(accuracy) <= 1


def test_batches_have_views_framed_texts_and_concept_numbers(program):
    batch = next(iter(program.batches()))
    assert batch["image"].shape == (8, 16, 16, 3) and batch["image"].dtype == np.uint8
    assert batch["text"].shape == (8, 16) and batch["text"].dtype == np.int32
    assert (batch["text"][:, 0] == program.config.model.text.start).all()
    assert ((batch["text"] == program.config.model.text.end).sum(1) == 1).all()
    # The two views of a concept are adjacent and show different designs.
    np.testing.assert_array_equal(batch["concept"][0::2], batch["concept"][1::2])
    assert len(set(batch["concept"][0::2].tolist())) == 4
    assert all(
        (a != b).any() for a, b in zip(batch["image"][0::2], batch["image"][1::2], strict=True)
    )
    flat, outlined, third = documents()[:3]
    assert training_example(flat)[2] == training_example(outlined)[2] != training_example(third)[2]


def test_batches_resume_exactly_from_a_saved_position(program):
    iterator = iter(program.batches())
    next(iterator)
    state = iterator.get_state()
    expected = [next(iterator) for _ in range(3)]
    resumed = iter(program.batches())
    resumed.set_state(state)
    for batch in expected:
        other = next(resumed)
        assert all(np.array_equal(batch[name], other[name]) for name in batch)


@pytest.mark.slow
def test_training_lowers_the_loss_and_export_gives_the_trained_encoder(program, tmp_path):
    state = jax.jit(program.init)(jax.random.key(0))
    step, losses = jax.jit(program.step), []
    for _, batch in zip(range(60), program.batches(), strict=False):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert int(state.step) == 60
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:10])
    program.export(state, tmp_path)
    text = TextTokenizer.load(tmp_path / "text.json")
    encoder = RetrievalEncoder.load(tmp_path / "encoder.safetensors", text)
    ids = frame(text.encode("red heart"), program.config.model.text)
    expected = state.model.embed_text(jnp.asarray(ids)[None])
    np.testing.assert_allclose(encoder.embed_texts(["red heart"]), expected, atol=1e-5)
    assert program.samples(state) == {}


def test_captions_lose_words_and_get_a_random_style():
    rng = np.random.default_rng(0)
    data = EncoderData(name_style=0.5, drop_words=0.5)
    styles = ("flat style", "outlined style")
    captions = {augment_caption("black cat, flat style", data, rng, styles) for _ in range(400)}
    assert captions == {
        words + style
        for words in ("black cat", "black", "cat")
        for style in ("", ", flat style", ", outlined style")
    }
    plain = dataclasses.replace(data, name_style=0.0, drop_words=0.0)
    caption = augment_caption("kiss: woman, man, flat style", plain, rng, styles)
    assert caption == "kiss: woman, man"
    assert augment_caption("cat", dataclasses.replace(plain, name_style=1.0), rng) == "cat"


def test_a_vocabulary_size_that_does_not_fit_the_tokenizer_is_refused(program):
    values = configuration.to_dict(program.config)
    values["model"]["text"]["vocab_size"] = 1000
    size = program.text.size
    with pytest.raises(UserError, match=rf"vocab_size is 1000; .* {size} entries, .* {size + 3}"):
        EncoderProgram(configuration.build(EncoderConfig, values))


def test_a_batch_larger_than_the_data_is_refused(program):
    program.config = dataclasses.replace(program.config, batch_size=64)
    with pytest.raises(UserError, match="batch_size is 64"):
        program.batches()
