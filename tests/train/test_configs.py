"""Tests that the files in configs/ have only known keys, with values of the right type."""

import pathlib
import runpy

import pytest

from leon_jax import config as configs
from leon_jax.prepare.config import PrepareConfig
from leon_jax.train.decoder_config import DecoderTraining
from leon_jax.train.image_tokenizer import TokenizerConfig
from leon_jax.train.retrieval_encoder import EncoderConfig
from leon_jax.train.text_tokenizer import TextConfig
from leon_jax.train.training_loop import LoopConfig

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
FILES = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.py"))
KINDS = {
    "text": TextConfig,
    "tokenizer": TokenizerConfig,
    "encoder": EncoderConfig,
    "decoder": DecoderTraining,
}


@pytest.mark.parametrize("name", [name for name in FILES if name != "cm3leon_base.py"])
def test_a_config_file_can_be_built(name):
    values = runpy.run_path(str(CONFIGS / name))["get_config"]().to_dict()
    if name == "prepare.py":
        assert len(configs.build(PrepareConfig, values).sources) == 3
        return
    configs.build(LoopConfig, values.pop("loop", {}), "config.loop")
    assert configs.build(KINDS[values["kind"]], values).kind == values["kind"]
