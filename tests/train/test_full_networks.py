"""Tests one step of the paper's image tokenizer and encoder on photographs, with small batches."""

import pathlib
import runpy

import jax
import numpy as np
import pytest

from leon_jax import config as configs
from leon_jax.tokenizers.text import TextTokenizer
from leon_jax.train.image_tokenizer import TokenizerConfig, TokenizerProgram
from leon_jax.train.retrieval_encoder import EncoderConfig, EncoderProgram
from tests import document_folders

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


def values(name: str, **changes) -> dict:
    """Returns the values of a config file, without `loop` and with changes."""
    values = runpy.run_path(str(CONFIGS / name))["get_config"]().to_dict()
    del values["loop"]
    return values | changes


def one_step(program) -> dict[str, float]:
    """Trains one step and returns its metrics."""
    state = jax.jit(program.init)(jax.random.key(0))
    batch = next(iter(program.batches()))
    _, metrics = jax.jit(program.step, donate_argnums=0)(state, batch)
    return {name: float(value) for name, value in metrics.items()}


@pytest.mark.slow
def test_the_image_tokenizer_of_the_paper_trains_on_photographs(tmp_path):
    folder = document_folders.write(tmp_path / "a", document_folders.photographs(4, 280))
    changes = {"batch_size": 2, "data": {"folder": folder}}
    config = configs.build(TokenizerConfig, values("vqgan_256.py", **changes))
    metrics = one_step(TokenizerProgram(config))
    assert metrics["pictures"] == 2 and metrics["codes_revived"] == 8192
    assert all(map(np.isfinite, metrics.values())) and metrics["lpips"] > 0


@pytest.mark.slow
def test_clip_b32_trains_on_photographs_with_the_vocabulary_of_its_tokenizer(tmp_path):
    documents = document_folders.photographs(40, 240)
    folder = document_folders.write(tmp_path / "a", documents)
    text = TextTokenizer.train([document.text for document in documents], 49_405)
    text.save(tmp_path / "text.json")
    data = {"folder": folder, "text": str(tmp_path / "text.json")}
    config = configs.build(EncoderConfig, values("clip_b32.py", batch_size=32, data=data))
    program = EncoderProgram(config)
    assert program.config.model.text.vocab_size == text.size + 3 < 1000
    metrics = one_step(program)
    # 32 different pairs, and weights that know nothing.
    assert metrics["loss"] == pytest.approx(np.log(32), rel=0.2)
    assert all(map(np.isfinite, metrics.values()))
