"""The loop: exact resume after a kill, signals, and refusals."""

import dataclasses
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from leon_jax import model_files
from leon_jax.config import UserError
from leon_jax.train import loop, optimizer
from leon_jax.train.checkpoint import Checkpoints
from leon_jax.train.state import TrainState


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    steps: int
    seed: int = 0
    width: int = 4


class Line(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (3, width)))


class ToyProgram:
    """A linear model with noise in its updates, so that data order and randomness both matter."""

    kind = "toy"

    def __init__(self, config: ToyConfig, delay: float = 0.0):
        self.config, self.delay = config, delay
        self.optimizer = optimizer.make(
            optimizer.OptimizerConfig(learning_rate=0.05, total_steps=100, warmup_steps=2)
        )

    def init(self, key):
        model = Line(self.config.width, rngs=nnx.Rngs(key))
        return TrainState(jnp.int32(0), model, self.optimizer.init(model), key)

    def step(self, state, batch):
        noise = jax.random.normal(state.step_key(), (self.config.width,))

        def loss(model):
            return jnp.square(batch["x"] @ model.kernel[...] - noise).mean()

        value, grads = jax.value_and_grad(loss)(state.model)
        updates, opt_state = self.optimizer.update(grads, state.opt_state, state.model)
        model = jax.tree.map(jnp.add, state.model, updates)
        return TrainState(state.step + 1, model, opt_state, state.key), {"loss": value}

    def batches(self):
        numbers = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
        source = grain.MapDataset.source(numbers).seed(self.config.seed).shuffle().repeat()
        return source.map(lambda x: {"x": self._slow(x)}).batch(4).to_iter_dataset()

    def _slow(self, x):
        time.sleep(self.delay / 4)
        return x

    def samples(self, state):
        return {"kernel": np.zeros((2, 2, 3), np.uint8)}

    def export(self, state, directory):
        model_files.save(directory / "toy.safetensors", state.model, "toy", {})


SETTINGS = loop.LoopConfig(log_every=3, save_every=4, sample_every=5)


def final(workdir: pathlib.Path) -> np.ndarray:
    return model_files.load(workdir / "export" / "toy.safetensors", "toy")[0]["kernel"]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The parameters of a run of 30 steps that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("unbroken")
    from leon_jax import sharding

    with jax.set_mesh(sharding.make_mesh((1, 1, 1, 1), jax.devices()[:1])):
        loop.run(ToyProgram(ToyConfig(30)), SETTINGS, workdir)
    return workdir


def test_a_run_leaves_metrics_samples_a_board_and_a_model(unbroken):
    lines = [json.loads(line) for line in (unbroken / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(3, 31, 3))
    assert lines[-1]["loss"] > 0 and lines[-1]["seconds_per_step"] > 0
    assert len(list((unbroken / "samples").glob("kernel_*.png"))) == 6
    assert list((unbroken / "tensorboard").iterdir())
    assert final(unbroken).shape == (3, 4)


def test_two_starts_make_the_same_model_as_one(unbroken, tmp_path):
    loop.run(ToyProgram(ToyConfig(13)), SETTINGS, tmp_path)
    loop.run(ToyProgram(ToyConfig(30)), SETTINGS, tmp_path)
    np.testing.assert_array_equal(final(tmp_path), final(unbroken))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    lines = [json.loads(line)["step"] for line in lines]
    assert lines == sorted(set(lines))


SCRIPT = """
import pathlib, sys
import jax
from leon_jax import sharding
from test_loop import SETTINGS, ToyConfig, ToyProgram
from leon_jax.train import loop
with jax.set_mesh(sharding.make_mesh((1, 1, 1, 1), jax.devices()[:1])):
    loop.run(ToyProgram(ToyConfig(30), delay=0.05), SETTINGS, pathlib.Path(sys.argv[1]))
"""


def start(workdir: pathlib.Path) -> subprocess.Popen:
    here = pathlib.Path(__file__)
    environment = {**os.environ, "PYTHONPATH": f"{here.parents[2]}:{here.parent}"}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(workdir)], env=environment,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for_step(workdir: pathlib.Path, step: int) -> None:
    path, until = workdir / "metrics.jsonl", time.monotonic() + 300
    while time.monotonic() < until:
        if path.exists() and f'"step": {step},' in path.read_text():
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached")


def test_a_killed_run_resumes_to_the_same_bits(unbroken, tmp_path):
    for step in (6, 15):
        process = start(tmp_path)
        wait_for_step(tmp_path, step)
        process.kill()
        process.communicate()
        assert not (tmp_path / "export").exists()
    process = start(tmp_path)
    messages = process.communicate()[1]
    assert process.returncode == 0, messages
    assert "resumed from step" in messages
    np.testing.assert_array_equal(final(tmp_path), final(unbroken))


def test_sigterm_saves_and_ends_the_run(unbroken, tmp_path):
    process = start(tmp_path)
    wait_for_step(tmp_path, 6)
    process.send_signal(signal.SIGTERM)
    messages = process.communicate()[1]
    assert process.returncode == 128 + signal.SIGTERM
    saved = re.search(r"step (\d+) is saved", messages)
    assert saved and 6 < int(saved[1]) < 30, messages
    loop.run(ToyProgram(ToyConfig(30)), SETTINGS, tmp_path)
    np.testing.assert_array_equal(final(tmp_path), final(unbroken))


def test_a_signal_that_comes_while_a_step_is_logged_loses_nothing(unbroken, tmp_path, monkeypatch):
    report = loop.Metrics.report

    def interrupted(metrics):
        if not sent:
            sent.append(True)
            os.kill(os.getpid(), signal.SIGTERM)
        report(metrics)

    sent: list[bool] = []
    monkeypatch.setattr(loop.Metrics, "report", interrupted)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    settings = dataclasses.replace(SETTINGS, log_every=2, save_every=1000)
    try:
        with pytest.raises(SystemExit):
            loop.run(ToyProgram(ToyConfig(30)), settings, tmp_path)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert Checkpoints(tmp_path / "checkpoints").latest() == 3
    loop.run(ToyProgram(ToyConfig(30)), settings, tmp_path)
    np.testing.assert_array_equal(final(tmp_path), final(unbroken))


def test_another_configuration_is_refused_by_its_key(tmp_path):
    loop.run(ToyProgram(ToyConfig(4)), SETTINGS, tmp_path)
    with pytest.raises(UserError, match=r"width = 4, but it is now 5"):
        loop.run(ToyProgram(ToyConfig(4, width=5)), SETTINGS, tmp_path)


def test_weights_of_a_file_start_a_new_run(unbroken, tmp_path):
    source = unbroken / "export" / "toy.safetensors"
    settings = dataclasses.replace(SETTINGS, init_from=str(source))
    state = loop.run(ToyProgram(ToyConfig(0)), settings, tmp_path)
    np.testing.assert_array_equal(state.model.kernel[...], final(unbroken))
    with pytest.raises(UserError, match="another configuration"):
        loop.run(ToyProgram(ToyConfig(0, width=5)), settings, tmp_path / "other")


def test_a_workdir_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        loop.run(ToyProgram(ToyConfig(1)), SETTINGS, tmp_path / "file" / "run")
