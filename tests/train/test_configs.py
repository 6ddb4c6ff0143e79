"""Tests that the files in configs/ have only known keys, with values of the right type."""

import pathlib
import runpy

import pytest

from leon_jax import config as configs
from leon_jax.prepare.config import PrepareConfig
from leon_jax.train.decoder_config import DecoderTraining, retrieval_notice
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
    if name in ("prepare.py", "emoji/designs.py"):
        assert len(configs.build(PrepareConfig, values).sources) == 3
        return
    if values["kind"] == "pipeline":
        return  # test_the_stages_of_every_pipeline_can_be_built
    if values["kind"] == "finetune":  # the model to tune brings the other keys
        values = values["decoder"]
        values |= {"model": {"vocab_size": 1000, "max_length": 512, "layers": 1, "embed": 8,
                             "heads": 1, "mlp": 8}}  # fmt: skip
        layout = {"image_codes": 500, "sentinels": 4, "text_start": 510, "text_tokens": 490}
        values |= {"vocabulary": layout}
    configs.build(LoopConfig, values.pop("loop", {}), "config.loop")
    assert configs.build(KINDS[values["kind"]], values).kind == values["kind"]


PIPELINES = [("own.py", (size,)) for size in ("tiny", "small", "base")]
PIPELINES += [("emoji/pipeline.py", ())]


@pytest.mark.parametrize(("name", "arguments"), PIPELINES)
def test_the_stages_of_every_pipeline_can_be_built(name, arguments):
    values = runpy.run_path(str(CONFIGS / name))["get_config"](*arguments).to_dict()
    check_stages(values)


@pytest.mark.parametrize("codebook", ["unit", "plain"])
@pytest.mark.parametrize("grid", [8, 16])
def test_the_emoji_stages_can_have_other_grids_and_codebooks(grid, codebook):
    tokenizer, decoder = (
        runpy.run_path(str(CONFIGS / "emoji" / f"{name}.py"))["stage"]
        for name in ("tokenizer", "decoder")
    )
    check_stages({"stages": {"tokenizer": tokenizer(grid, codebook), "decoder": decoder(grid)}})


def test_the_emoji_configs_only_add_to_the_stages_of_the_pipeline():
    values = runpy.run_path(str(CONFIGS / "emoji" / "pipeline.py"))["get_config"]()
    for name, stage in values.stages.items():
        file = CONFIGS / "emoji" / f"{name.removesuffix('_second')}.py"
        alone = runpy.run_path(str(file))["get_config"]()
        if stage.kind == "decoder":
            # The stages differ in their schedule and in the variants of images.
            alone.steps, alone.optimizer, alone.data.variants = stage.steps, stage.optimizer, 1
        updated = alone.copy_and_resolve_references()
        updated.update(stage)
        assert updated.to_dict() == alone.to_dict()
        assert alone.data.folder and "folder" not in stage.get("data", {})


def check_stages(values):
    """Builds the configuration of every stage, and checks that sizes fit each other."""
    for name, stage in values["stages"].items():
        configs.build(LoopConfig, stage.pop("loop", {}), f"config.stages.{name}.loop")
        if stage["kind"] == "encoder":
            stage["data"] = {"text": "text.json"}
        if stage["kind"] == "text":
            stage["data"] = {}
        if stage["kind"] == "tokenizer":
            stage["data"] = {}
        if stage["kind"] == "decoder":  # the pipeline knows the vocabulary after the tokenizers
            codes, sentinels = values["stages"]["tokenizer"]["model"]["codes"], 64
            start = 4 + codes + 2 + sentinels
            layout = {"image_codes": codes, "sentinels": sentinels, "text_start": start}
            stage["vocabulary"] = layout | {"text_tokens": 1000}
            stage["model"]["vocab_size"] = start + 1000
            rows, columns = stage["data"]["image_shape"]
            sides = values["stages"]["tokenizer"]["model"]
            factor = 2 ** (len(sides["multipliers"]) - 1)
            assert (rows * factor, columns * factor) == (sides["resolution"],) * 2
            retrieved = len(stage["data"]["retrieved"]) - 1
            assert stage["data"]["length"] >= (retrieved + 1) * (rows * columns + 20)
        assert configs.build(KINDS[stage["kind"]], stage).kind == stage["kind"]


def test_rows_that_are_too_short_for_retrieval_are_told_at_the_start():
    values = runpy.run_path(str(CONFIGS / "emoji" / "decoder.py"))["get_config"]().to_dict()
    values.pop("loop")

    def notice(**data):
        changed = values | {"data": values["data"] | data}
        return retrieval_notice(configs.build(DecoderTraining, changed))

    assert notice() is None
    assert notice(length=130) == (
        "a row of 130 tokens holds no retrieved image of 64 tokens, but config.data.retrieved "
        "asks for up to 2; set config.data.length >= 201, or shorten config.data.retrieved to 1 "
        "probabilities"
    )
    assert "holds 1 retrieved image of 64 tokens" in notice(length=200)
    assert notice(length=201) is None and notice(length=130, retrieved=(1.0,)) is None
    values["model"]["form"]["positions"] = "rotary"  # "stream" cuts images
    assert notice(length=130, packing="stream") is None
