"""Tests the encoder's training program: loss, batches, learning, resumption and export."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from leon_jax import config as configuration
from leon_jax.config import UserError
from leon_jax.data.config import CaptionedImageDataConfig, FolderComponent
from leon_jax.documents import Document, Provenance, Text
from leon_jax.models.clip import CLIPConfig, TextConfig, VisionConfig, create
from leon_jax.retrieval.encoder import RetrievalEncoder, frame
from leon_jax.tokenizers.text import TextTokenizer
from leon_jax.train.optimizer import OptimizerConfig
from leon_jax.train.retrieval_encoder import (
    EncoderConfig,
    EncoderProgram,
    contrastive_loss,
)
from tests import document_folders


@pytest.fixture
def program(tmp_path) -> EncoderProgram:
    return EncoderProgram(make_config(tmp_path, document_folders.drawings()))


def make_config(folder: pathlib.Path, documents: list[Document], **values) -> EncoderConfig:
    """Writes the documents and a text tokenizer into a folder, and returns a tiny configuration."""
    text = TextTokenizer.train([document.text for document in documents], 300)
    text.save(folder / "text.json")
    data = document_folders.write(folder / "documents", documents)
    config = tiny(data, str(folder / "text.json"))
    return dataclasses.replace(config, **values)


def tiny(folder: str, text: str) -> EncoderConfig:
    """Returns a configuration for a documents folder and a text tokenizer."""
    return EncoderConfig(
        model=CLIPConfig(
            vision=VisionConfig(16, 4, 16, 2, 2, "convolution"),
            text=TextConfig(16, 0, 16, 1, 2),
            embed_dim=8,
        ),
        optimizer=OptimizerConfig(1e-2, 60, 5, weight_decay=0.0),
        batch_size=8,
        steps=60,
        views=2,
        data=CaptionedImageDataConfig(folder, text=text),
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
    # The two views of a group are adjacent and show different documents.
    np.testing.assert_array_equal(batch["concept"][0::2], batch["concept"][1::2])
    assert len(set(batch["concept"][0::2].tolist())) == 4
    assert all(
        (a != b).any() for a, b in zip(batch["image"][0::2], batch["image"][1::2], strict=True)
    )
    text = program.text
    frames = {text.decode(row[1 : list(row).index(program.config.model.text.end)])
              for row in batch["text"]}  # fmt: skip
    captions = {c for d in document_folders.drawings() for c in d.provenance.captions}
    assert frames <= captions, "captions are not rewritten"


def test_with_one_view_a_batch_has_every_document_at_most_once(tmp_path):
    config = make_config(tmp_path, document_folders.drawings(), views=1, batch_size=12)
    program = EncoderProgram(config)
    batch = next(iter(program.batches()))
    assert len({image.tobytes() for image in batch["image"]}) == 12
    numbers, counts = np.unique(batch["concept"], return_counts=True)
    assert len(numbers) == 6 and set(counts) == {2}, "documents of a group are positives"


def test_equal_images_are_positives_and_texts_are_captions_without_groups(tmp_path):
    first, second, *others = document_folders.drawings(grouped=False)
    same = Document((Text("the same"), first.parts[1]), Provenance("x", "test", "CC0-1.0", ""))
    config = make_config(tmp_path, [first, second, same, *others[:5]], views=1, batch_size=8)
    program = EncoderProgram(config)
    batch = next(iter(program.batches()))
    end = program.config.model.text.end
    by_text = {
        program.text.decode(row[1 : list(row).index(end)]): number
        for row, number in zip(batch["text"], batch["concept"], strict=True)
    }
    assert set(by_text) == {d.text for d in (first, second, same, *others[:5])}
    assert by_text["the same"] == by_text[first.text] != by_text[second.text]
    assert len(set(by_text.values())) == 7


def test_groups_of_equal_names_in_different_folders_are_different_concepts(tmp_path):
    drawings = document_folders.drawings()
    config = make_config(tmp_path, drawings)
    other = document_folders.write(tmp_path / "other", drawings)
    parts = (FolderComponent(config.data.folder), FolderComponent(other))
    data = CaptionedImageDataConfig(mixture=parts, text=config.data.text)
    config = dataclasses.replace(config, data=data, views=1, batch_size=24)
    batch = next(iter(EncoderProgram(config).batches()))
    assert len(set(batch["concept"].tolist())) == 12


def test_a_document_without_text_is_named(tmp_path):
    image = document_folders.drawings()[0].parts[1]
    documents = [Document((image,), Provenance("k7", "s", "CC0-1.0", ""))] * 4
    config = make_config(tmp_path, documents, views=1, batch_size=4)
    with pytest.raises(UserError, match=r"document \d of .* \(k7\) has no text"):
        next(iter(EncoderProgram(config).batches()))


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


def test_a_vocabulary_size_that_does_not_fit_the_tokenizer_is_refused(program):
    values = configuration.to_dict(program.config)
    values["model"]["text"]["vocab_size"] = 1000
    size = program.text.size
    other = EncoderProgram(configuration.build(EncoderConfig, values))
    with pytest.raises(UserError, match=rf"vocab_size is 1000; .* {size} entries, .* {size + 3}"):
        other.batches()
    del values["model"]["text"]["vocab_size"]
    config = EncoderProgram(configuration.build(EncoderConfig, values)).config
    assert config.model.text.vocab_size == size + 3


def test_a_program_with_a_vocabulary_size_needs_its_text_tokenizer_only_for_batches(program):
    """`leon plan` builds the program without data."""
    data = dataclasses.replace(program.config.data, text="nowhere.json")
    other = EncoderProgram(dataclasses.replace(program.config, data=data))
    batch = next(iter(program.batches()))
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
        name: (shape.shape, shape.dtype) for name, shape in other.batch_shapes().items()
    }
    jax.eval_shape(other.init, jax.random.key(0))
    with pytest.raises(UserError, match=r"cannot read the text tokenizer nowhere\.json"):
        other.batches()


def test_a_mesh_that_cannot_split_the_batch_or_a_tower_is_refused(program):
    """The batch has 8 rows; both towers have the width 16 and two heads."""
    program.check_mesh((2, 4, 3, 2))
    for mesh, message in (
        ((3, 1, 1, 1), "config.batch_size is 8; it must be a multiple of data x fsdp, 3"),
        ((1, 1, 1, 4), "config.model.vision.heads is 2; it must be a multiple of tensor, 4"),
    ):
        with pytest.raises(UserError, match=message):
            program.check_mesh(mesh)


def test_a_batch_larger_than_the_data_is_refused(program):
    program.config = dataclasses.replace(program.config, batch_size=64)
    with pytest.raises(
        UserError,
        match=r"batch_size is 64, which takes 32 groups of documents, but the training data has 6; "
        r"set config\.batch_size to at most 12, or train on at least 32 groups",
    ):
        program.batches()
