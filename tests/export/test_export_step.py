"""`leon export --step`: the model of a checkpoint, for example of the best one."""

import json
import pathlib

import jax
import numpy as np
import pytest

from leon_jax import config as configuration
from leon_jax import sharding, weight_files
from leon_jax.cli import main
from leon_jax.data.config import ImageDataConfig
from leon_jax.model_folder import ModelFolder
from leon_jax.train import training_loop
from leon_jax.train.checkpoint_reader import load_model
from leon_jax.train.decoder import DecoderProgram
from leon_jax.train.decoder_config import DecoderTraining
from tests import tiny
from tests.train import test_image_tokenizer

LOOP = training_loop.LoopConfig(log_every=2, save_every=100, sample_every=100, keep=1)


def make_program() -> DecoderProgram:
    """Returns a decoder whose learning rate is so high that the held-out loss rises."""
    folder, prepared = tiny.folders()
    header = weight_files.read_config(folder / "decoder.safetensors", "decoder")
    values = {
        "model": header["model"],
        "vocabulary": header["vocabulary"],
        "optimizer": {"learning_rate": 1.0, "warmup_steps": 4, "total_steps": 6, "average": 0.5},
        "batch_size": 4,
        "steps": 6,
        "data": {
            "folder": str(prepared),
            "text": str(folder / "text.json"),
            "image_shape": header["image_shape"],
            "length": 128,
            "retrieved": [0.5, 0.5],
            "threads": 0,
        },
        "export": {
            "tokenizer": str(folder / "tokenizer.safetensors"),
            "encoder": str(folder / "encoder.safetensors"),
        },
    }
    return DecoderProgram(configuration.build(DecoderTraining, values))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Returns the folder of an evaluated run of six steps, evaluated after every second one."""
    folder = tmp_path_factory.mktemp("runs") / "evaluated"
    loop = training_loop.LoopConfig(**{**LOOP.__dict__, "eval_every": 2})
    with jax.set_mesh(sharding.make_mesh((1, 1, 1, 1), jax.devices()[:1])):
        training_loop.run(make_program(), loop, folder)
    return folder


def decoder_of(folder: pathlib.Path) -> dict[str, np.ndarray]:
    return weight_files.load(folder / "decoder.safetensors", "decoder")[0]


def are_equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    assert one.keys() == other.keys()
    return all(np.array_equal(one[name], other[name]) for name in one)


def test_a_decoder_trained_with_evaluation_is_the_same_bit_for_bit(workdir, tmp_path):
    training_loop.run(make_program(), LOOP, tmp_path / "plain")
    assert are_equal(decoder_of(tmp_path / "plain" / "export"), decoder_of(workdir / "export"))


def test_the_best_decoder_of_a_run_becomes_a_model_folder(workdir, tmp_path):
    losses = {
        line["step"]: line["heldout/image_loss_1"]
        for line in map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    }
    best = min(losses, key=losses.__getitem__)
    assert best < 6, "the loss rises"
    out = tmp_path / "best"
    assert main.run(("export", f"--workdir={workdir}", "--step=best", f"--out={out}")) == 0
    training_loop.run(_shorter(best), LOOP, tmp_path / "shorter")
    assert are_equal(decoder_of(out), decoder_of(tmp_path / "shorter" / "export"))
    folder = ModelFolder.open(out)
    assert folder.description.training["decoder"]["steps"] == best
    assert folder.index_path == tiny.folders()[1]
    newest = tmp_path / "newest"
    assert main.run(("export", f"--workdir={workdir}", f"--out={newest}")) == 0
    assert are_equal(decoder_of(newest), decoder_of(workdir / "export"))
    assert ModelFolder.open(newest).description.training["decoder"]["steps"] == 6


def test_the_weights_after_the_last_update_are_exported_on_request(workdir, tmp_path):
    flags = (f"--workdir={workdir}", "--step=6")
    for name, flag in (("averaged", "--average"), ("last", "--noaverage")):
        assert main.run(("export", *flags, flag, f"--out={tmp_path / name}")) == 0
    averaged, last = (decoder_of(tmp_path / name) for name in ("averaged", "last"))
    assert are_equal(averaged, decoder_of(workdir / "export"))
    abstract = jax.eval_shape(make_program().init, jax.random.key(0))
    model = load_model(workdir / "checkpoints", abstract, 6)
    assert are_equal(last, {k: np.asarray(v) for k, v in weight_files.flatten(model).items()})
    assert not are_equal(last, averaged)


def _shorter(steps: int) -> DecoderProgram:
    """Returns the program, ending after fewer steps."""
    values = configuration.to_dict(make_program().config) | {"steps": steps}
    return DecoderProgram(configuration.build(DecoderTraining, values))


def test_the_image_tokenizer_of_a_checkpoint_is_written(tmp_path):
    config = test_image_tokenizer.CONFIG
    values = configuration.to_dict(config) | {"data": configuration.to_dict(ImageDataConfig("a"))}
    program = test_image_tokenizer.TokenizerProgram(config)
    state = jax.jit(program.init)(jax.random.key(0))
    checkpoints = training_loop.Checkpoints(tmp_path / "run" / "checkpoints")
    checkpoints.save(state, {"0": ""}, 1.5)
    checkpoints.close()
    (tmp_path / "run" / "config.json").write_text(json.dumps(values | {"loop": {}}))
    flags = (f"--workdir={tmp_path / 'run'}", "--step=best", f"--out={tmp_path / 'out'}")
    assert main.run(("export", *flags)) == 0
    program.export(state, tmp_path / "expected")
    written, expected = (
        (tmp_path / name / "tokenizer.safetensors").read_bytes() for name in ("out", "expected")
    )
    assert written == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--step=best"], "--step=best needs --workdir, whose checkpoint it is"),
        (["--step=best", "--workdir={workdir}", "--decoder=a"], "and no --decoder"),
        (["--step=5", "--workdir={workdir}"], "there is no checkpoint of step 5 in"),
        (["--step=last", "--workdir={workdir}"], "there is no checkpoint of step last in"),
    ],
)
def test_checkpoints_that_do_not_exist_are_refused(workdir, tmp_path, capsys, flags, message):
    flags = [flag.format(workdir=workdir) for flag in flags]
    assert main.run(("export", *flags, f"--out={tmp_path / 'out'}")) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
