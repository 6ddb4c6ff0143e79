"""Tests the loop: exact resumption, signals, damaged checkpoints, errors and compilation."""

import dataclasses
import errno
import fcntl
import json
import os
import pathlib
import re
import shutil
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

from leon_jax import weight_files
from leon_jax.config import UserError
from leon_jax.train import optimizer, training_loop
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
    """A linear model with noise in its updates, so that results depend on order and randomness."""

    kind = "toy"
    flops_per_token = 0.0

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

    def batches(self, shard=0, shards=1):
        numbers = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
        source = grain.MapDataset.source(numbers).seed(self.config.seed).shuffle().repeat()
        source = source.slice(slice(shard, None, shards)).map(lambda x: {"x": self._slow(x)})
        return source.batch(4 // shards).to_iter_dataset()

    def _slow(self, x):
        time.sleep(self.delay / 4)
        return x

    def samples(self, state):
        return {"kernel": np.zeros((2, 2, 3), np.uint8)}

    def export(self, state, directory):
        weight_files.save(directory / "toy.safetensors", state.model, "toy", {})


SETTINGS = training_loop.LoopConfig(log_every=3, save_every=4, sample_every=5)


def exported_kernel(workdir: pathlib.Path) -> np.ndarray:
    return weight_files.load(workdir / "export" / "toy.safetensors", "toy")[0]["kernel"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Returns the workdir of an uninterrupted run of 30 steps."""
    workdir = tmp_path_factory.mktemp("uninterrupted")
    from leon_jax import sharding

    with jax.set_mesh(sharding.make_mesh((1, 1, 1, 1), jax.devices()[:1])):
        training_loop.run(ToyProgram(ToyConfig(30)), SETTINGS, workdir)
    return workdir


def test_a_run_writes_metrics_samples_tensorboard_files_and_a_model(uninterrupted):
    lines = [
        json.loads(line) for line in (uninterrupted / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines] == list(range(3, 31, 3))
    assert lines[-1]["loss"] > 0 and lines[-1]["seconds_per_step"] > 0
    assert len(list((uninterrupted / "samples").glob("kernel_*.png"))) == 6
    assert list((uninterrupted / "tensorboard").iterdir())
    assert exported_kernel(uninterrupted).shape == (3, 4)


def test_two_starts_give_the_same_model_as_one(uninterrupted, tmp_path):
    training_loop.run(ToyProgram(ToyConfig(13)), SETTINGS, tmp_path)
    training_loop.run(ToyProgram(ToyConfig(30)), SETTINGS, tmp_path)
    np.testing.assert_array_equal(exported_kernel(tmp_path), exported_kernel(uninterrupted))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    lines = [json.loads(line)["step"] for line in lines]
    assert lines == sorted(set(lines))


SCRIPT = """
import pathlib, sys
import jax
from leon_jax import sharding
from test_training_loop import SETTINGS, ToyConfig, ToyProgram
from leon_jax.train import training_loop
with jax.set_mesh(sharding.make_mesh((1, 1, 1, 1), jax.devices()[:1])):
    training_loop.run(ToyProgram(ToyConfig(30), delay=0.05), SETTINGS, pathlib.Path(sys.argv[1]))
"""


def start(workdir: pathlib.Path, script: str = SCRIPT) -> subprocess.Popen:
    this_file = pathlib.Path(__file__)
    environment = {**os.environ, "PYTHONPATH": f"{this_file.parents[2]}:{this_file.parent}"}
    return subprocess.Popen(
        [sys.executable, "-c", script, str(workdir)], env=environment,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for_step(workdir: pathlib.Path, step: int) -> None:
    path, deadline = workdir / "metrics.jsonl", time.monotonic() + 300
    while time.monotonic() < deadline:
        if path.exists() and f'"step": {step},' in path.read_text():
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached")


def test_a_killed_run_resumes_to_the_same_parameters_bit_for_bit(uninterrupted, tmp_path):
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
    np.testing.assert_array_equal(exported_kernel(tmp_path), exported_kernel(uninterrupted))


def test_sigterm_saves_a_checkpoint_and_ends_the_run(uninterrupted, tmp_path):
    process = start(tmp_path)
    wait_for_step(tmp_path, 6)
    process.send_signal(signal.SIGTERM)
    messages = process.communicate()[1]
    assert process.returncode == 128 + signal.SIGTERM
    saved = re.search(r"step (\d+) is saved", messages)
    assert saved and 6 < int(saved[1]) < 30, messages
    training_loop.run(ToyProgram(ToyConfig(30)), SETTINGS, tmp_path)
    np.testing.assert_array_equal(exported_kernel(tmp_path), exported_kernel(uninterrupted))


def test_a_signal_during_logging_loses_no_step(uninterrupted, tmp_path, monkeypatch):
    report = training_loop.Metrics.report

    def interrupted(*arguments):
        if not sent:
            sent.append(True)
            os.kill(os.getpid(), signal.SIGTERM)
        report(*arguments)

    sent: list[bool] = []
    monkeypatch.setattr(training_loop.Metrics, "report", interrupted)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    settings = dataclasses.replace(SETTINGS, log_every=2, save_every=1000)
    try:
        with pytest.raises(SystemExit):
            training_loop.run(ToyProgram(ToyConfig(30)), settings, tmp_path)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert Checkpoints(tmp_path / "checkpoints").latest() == 3
    training_loop.run(ToyProgram(ToyConfig(30)), settings, tmp_path)
    np.testing.assert_array_equal(exported_kernel(tmp_path), exported_kernel(uninterrupted))


def arrays_of(checkpoint: pathlib.Path) -> list[pathlib.Path]:
    """Returns the files with a checkpoint's arrays."""
    return [path for path in (checkpoint / "state").rglob("d/*") if path.is_file()]


@pytest.mark.parametrize("damage", ["cut", "zeroed", "deleted"])
def test_a_damaged_newest_checkpoint_is_replaced_by_the_previous_one(
    uninterrupted, tmp_path, damage, capsys
):
    training_loop.run(ToyProgram(ToyConfig(13)), SETTINGS, tmp_path)
    for path in arrays_of(tmp_path / "checkpoints" / "13"):
        data = path.read_bytes()
        third = len(data) // 3
        if damage == "deleted":
            path.unlink()
        elif damage == "cut":
            path.write_bytes(data[: 2 * third])
        else:  # as a failing disk may return it, without an error
            path.write_bytes(data[:third] + bytes(third) + data[2 * third :])
    training_loop.run(ToyProgram(ToyConfig(30)), SETTINGS, tmp_path)
    stderr = capsys.readouterr().err
    assert "checkpoint 13 is damaged" in stderr and "resumed from step 12" in stderr
    assert (tmp_path / "damaged_checkpoints" / "13").is_dir()
    np.testing.assert_array_equal(exported_kernel(tmp_path), exported_kernel(uninterrupted))


def test_if_no_checkpoint_is_intact_the_run_stops_and_moves_nothing(tmp_path):
    training_loop.run(ToyProgram(ToyConfig(13)), SETTINGS, tmp_path)
    for step in ("12", "13"):
        for path in arrays_of(tmp_path / "checkpoints" / step):
            path.write_bytes(b"")
    with pytest.raises(UserError, match="none of the 2 checkpoints"):
        training_loop.run(ToyProgram(ToyConfig(30)), SETTINGS, tmp_path)
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"12", "13"} and not (tmp_path / "damaged_checkpoints").exists()


def test_a_full_disk_ends_the_run_and_keeps_the_last_checkpoint(uninterrupted, tmp_path):
    # A limit on the size of files fails like a full disk.
    limit = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from leon_jax.config import UserError
from leon_jax.train.checkpoint import Checkpoints
save, saves = Checkpoints.save, []
def limited(self, *arguments):
    saves.append(1)
    if len(saves) == 3:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, resource.RLIM_INFINITY))
    save(self, *arguments)
Checkpoints.save = limited
"""
    script = limit + SCRIPT.replace("with jax", "try:\n  with jax", 1)
    script += "except UserError as error:\n  sys.exit(f'refused: {error}')\n"
    process = start(tmp_path, script)
    messages = process.communicate()[1]
    assert process.returncode == 1, messages
    refused = next(line for line in messages.splitlines() if line.startswith("refused"))
    assert "be written" in refused and "too large" in refused.lower()
    assert re.search(
        "the last good one is of step (4|8)|resume from the newest checkpoint", refused
    )
    # TensorBoard's thread, which hits the same limit, may print an error when the process exits.
    # A thread of the interrupted save may find the event loop closed.
    before = messages.partition("refused")[0]
    assert before.count("Traceback") == before.count("RuntimeError: Event loop is closed")
    training_loop.run(ToyProgram(ToyConfig(30)), SETTINGS, tmp_path)
    np.testing.assert_array_equal(exported_kernel(tmp_path), exported_kernel(uninterrupted))


class Poisoned(ToyProgram):
    """Has NaN in its batches from step `first` to step `last`."""

    def __init__(self, config, first, last):
        super().__init__(config)
        self.first, self.last = first, last

    def step(self, state, batch):
        is_poisoned = (state.step + 1 >= self.first) & (state.step + 1 <= self.last)
        return super().step(state, {"x": jnp.where(is_poisoned, jnp.nan, batch["x"])})


def test_a_non_finite_update_is_skipped_and_counted(tmp_path):
    settings = dataclasses.replace(SETTINGS, log_every=1, save_every=1, keep=30)
    training_loop.run(Poisoned(ToyConfig(9), 4, 5), settings, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [0, 0, 0, 1, 1, 0, 0, 0, 0]
    abstract = jax.eval_shape(ToyProgram(ToyConfig(9)).init, jax.random.key(0))
    states = {}
    for newest in (9, 5, 3):
        for step in range(newest + 1, 10):
            shutil.rmtree(tmp_path / "checkpoints" / str(step), ignore_errors=True)
        step, states[newest], _ = Checkpoints(tmp_path / "checkpoints").restore(abstract)
        assert step == newest
    np.testing.assert_array_equal(states[5].model.kernel[...], states[3].model.kernel[...])
    assert np.isfinite(exported_kernel(tmp_path)).all()
    assert (states[9].model.kernel[...] != states[5].model.kernel[...]).any(), (
        "training continues after the skipped updates"
    )


def test_too_many_skipped_updates_end_the_run_with_the_state_before_them(tmp_path):
    settings = dataclasses.replace(SETTINGS, max_skipped=4)
    with pytest.raises(UserError, match="had a non-finite loss or gradient and were skipped"):
        training_loop.run(Poisoned(ToyConfig(30), 8, 30), settings, tmp_path)
    training_loop.run(ToyProgram(ToyConfig(7)), SETTINGS, tmp_path / "before")
    abstract = jax.eval_shape(ToyProgram(ToyConfig(9)).init, jax.random.key(0))
    _, stopped, _ = Checkpoints(tmp_path / "checkpoints").restore(abstract)
    np.testing.assert_array_equal(stopped.model.kernel[...], exported_kernel(tmp_path / "before"))


def test_a_new_run_starts_from_the_weights_of_another_run(uninterrupted, tmp_path):
    settings = dataclasses.replace(SETTINGS, init_from=str(uninterrupted))
    state = training_loop.run(ToyProgram(ToyConfig(0)), settings, tmp_path)
    np.testing.assert_array_equal(state.model.kernel[...], exported_kernel(uninterrupted))
    with pytest.raises(UserError, match="there is no checkpoint"):
        training_loop.run(
            ToyProgram(ToyConfig(0)),
            dataclasses.replace(SETTINGS, init_from=str(tmp_path / "export")),
            tmp_path / "other",
        )


def test_resuming_with_another_configuration_is_refused_and_names_the_key(tmp_path):
    training_loop.run(ToyProgram(ToyConfig(4)), SETTINGS, tmp_path)
    with pytest.raises(UserError, match=r"width = 4, but it is now 5"):
        training_loop.run(ToyProgram(ToyConfig(4, width=5)), SETTINGS, tmp_path)


def test_a_new_run_starts_from_the_weights_of_a_file(uninterrupted, tmp_path):
    source = uninterrupted / "export" / "toy.safetensors"
    settings = dataclasses.replace(SETTINGS, init_from=str(source))
    state = training_loop.run(ToyProgram(ToyConfig(0)), settings, tmp_path)
    np.testing.assert_array_equal(state.model.kernel[...], exported_kernel(uninterrupted))
    with pytest.raises(UserError, match="another configuration"):
        training_loop.run(ToyProgram(ToyConfig(0, width=5)), settings, tmp_path / "other")


def test_a_workdir_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        training_loop.run(ToyProgram(ToyConfig(1)), SETTINGS, tmp_path / "file" / "run")


def compilations(caplog, workdir: pathlib.Path, steps: int) -> list[str]:
    """Returns JAX's messages about compilations in a run that logs and saves often."""
    caplog.clear()
    with jax.log_compiles():
        training_loop.run(
            ToyProgram(ToyConfig(steps)),
            training_loop.LoopConfig(log_every=1, save_every=2),
            workdir,
        )
    return [text for text in caplog.messages if text.startswith("Finished XLA compilation")]


def test_nothing_is_compiled_after_the_first_steps(caplog, tmp_path):
    compilations(caplog, tmp_path / "first", 4)  # compiles what a process compiles once
    short = compilations(caplog, tmp_path / "short", 4)
    long = compilations(caplog, tmp_path / "long", 12)
    assert sum("train_step" in text for text in long) == 1, "the step is compiled once"
    assert len(long) == len(short)


def test_an_implicit_transfer_from_the_host_in_a_step_is_refused(monkeypatch, tmp_path):
    batch = {"x": np.zeros((4, 3), np.float32)}
    monkeypatch.setattr(training_loop.Feed, "__next__", lambda self: batch)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        training_loop.run(ToyProgram(ToyConfig(4)), training_loop.LoopConfig(), tmp_path)


def test_a_second_run_in_the_same_workdir_is_refused_at_once(uninterrupted, tmp_path):
    """The first run continues, and its lock is released when it is killed."""
    first = start(tmp_path)
    wait_for_step(tmp_path, 3)
    files = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match=f"another run is training in {tmp_path}; wait"):
        training_loop.run(ToyProgram(ToyConfig(30)), SETTINGS, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == files
    first.kill()
    first.communicate()
    training_loop.run(ToyProgram(ToyConfig(30)), SETTINGS, tmp_path)
    np.testing.assert_array_equal(exported_kernel(tmp_path), exported_kernel(uninterrupted))


def test_a_file_system_without_locks_is_reported_and_used(tmp_path, monkeypatch, capsys):
    def flock(*arguments):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    training_loop.run(ToyProgram(ToyConfig(2)), SETTINGS, tmp_path)
    warning = f"a second run in {tmp_path} will not be detected"
    assert warning in capsys.readouterr().err


def test_a_workdir_may_contain_glob_characters(uninterrupted, tmp_path):
    workdir = tmp_path / "lr[3e-4] a=b \\ c" / "run*?"
    training_loop.run(ToyProgram(ToyConfig(13)), SETTINGS, workdir)
    state = training_loop.run(ToyProgram(ToyConfig(30)), SETTINGS, workdir)
    np.testing.assert_array_equal(exported_kernel(workdir), exported_kernel(uninterrupted))
    assert (workdir / "samples" / "kernel_0000030.png").is_file()
    assert list((workdir / "tensorboard").iterdir())
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6, 9, 12, 13, *range(15, 31, 3)]
    for init_from in (workdir, workdir / "export" / "toy.safetensors"):
        settings = dataclasses.replace(SETTINGS, init_from=str(init_from))
        other = training_loop.run(
            ToyProgram(ToyConfig(0)), settings, tmp_path / "[other]" / init_from.name
        )
        np.testing.assert_array_equal(other.model.kernel[...], state.model.kernel[...])


def test_the_compilation_cache_may_be_in_a_folder_with_glob_characters(tmp_path):
    cache = tmp_path / "lr[3e-4] a=b \\ c"
    script = (
        "import jax, sys\n"
        "jax.config.update('jax_compilation_cache_dir', sys.argv[1])\n"
        "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)\n"
        "jax.config.update('jax_persistent_cache_min_entry_size_bytes', 0)\n"
        "jax.config.update('jax_log_compiles', True)\n"
        "jax.jit(lambda x: x + 1)(1.0)\n"
    )
    command = [sys.executable, "-c", script, str(cache)]
    subprocess.run(command, check=True, capture_output=True)
    assert list(cache.glob("*-cache"))
    second = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "cache hit" in second.stderr.lower()
