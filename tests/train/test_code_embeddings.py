"""Tests the start of the embeddings of image ids at the vectors of their codes."""

import jax
import numpy as np
import pytest

from leon_jax import config as configuration
from leon_jax import weight_files
from leon_jax.config import UserError
from leon_jax.train.code_embeddings import read_codebook
from leon_jax.train.decoder import DecoderProgram
from leon_jax.train.decoder_config import DecoderTraining
from tests.train.test_decoder_program import make_config, write_folder


@pytest.fixture
def config(tmp_path):
    write_folder(tmp_path)
    config = make_config(tmp_path)
    config.model.embed = 512
    return config


def build(config) -> DecoderTraining:
    return configuration.build(DecoderTraining, config.to_dict())


def tables(config) -> dict[str, np.ndarray]:
    """Returns the tables of a new decoder by name."""
    program = DecoderProgram(build(config))
    model = jax.jit(program.init)(jax.random.key(0)).model
    return {
        name: np.asarray(getattr(model, name)[...])
        for name in ("table", "head_table")
        if hasattr(model, name)
    }


@pytest.mark.parametrize("is_tied", [True, False])
def test_embeddings_have_the_angles_of_the_codes(config, tmp_path, is_tied):
    config.model.form = {"tied_head": is_tied}
    random = tables(config)
    config.codebook = str(tmp_path / "tokenizer.safetensors")
    started = tables(config)
    vocabulary = build(config).vocabulary
    images = slice(vocabulary.image_start, vocabulary.image_stop)
    codes = read_codebook(config.codebook, vocabulary.image_codes)
    assert len(started) == 1 + (not is_tied)
    for name, table in started.items():
        others = np.delete(np.arange(vocabulary.size), np.arange(images.start, images.stop))
        np.testing.assert_array_equal(table[others], random[name][others])
        assert np.isclose(table[images].std(), config.model.init_std, rtol=0.25)
        measured, expected = cosines(table[images]), 0.9 * cosines(codes)
        assert np.corrcoef(measured, expected)[0, 1] > 0.95
        assert abs(np.corrcoef(cosines(random[name][images]), expected)[0, 1]) < 0.5


def cosines(rows: np.ndarray) -> np.ndarray:
    """Returns the cosine of each pair of rows."""
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return (unit @ unit.T)[np.triu_indices(len(rows), 1)]


def test_a_codebook_has_a_mean_square_length_of_one(config, tmp_path):
    codes = read_codebook(tmp_path / "tokenizer.safetensors", 16)
    np.testing.assert_allclose(np.square(codes).sum(1).mean(), 1, rtol=1e-5)
    stored, _ = weight_files.load(tmp_path / "tokenizer.safetensors", "tokenizer")
    np.testing.assert_allclose(cosines(codes), cosines(stored["codebook"]), atol=1e-5)


def test_another_number_of_codes_is_refused(config, tmp_path):
    with pytest.raises(UserError, match="has 16 codes, but the vocabulary has 32 image codes"):
        read_codebook(tmp_path / "tokenizer.safetensors", 32)
