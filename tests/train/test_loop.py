"""The loop: exact resume after a kill, signals, and refusals."""

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


SETTINGS = loop.LoopConfig(log_every=3, save_every=4, sample_every=5)


def final(workdir: pathlib.Path) -> np.ndarray:
    return weight_files.load(workdir / "export" / "toy.safetensors", "toy")[0]["kernel"]


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


def start(workdir: pathlib.Path, script: str = SCRIPT) -> subprocess.Popen:
    here = pathlib.Path(__file__)
    environment = {**os.environ, "PYTHONPATH": f"{here.parents[2]}:{here.parent}"}
    return subprocess.Popen(
        [sys.executable, "-c", script, str(workdir)], env=environment,
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

    def interrupted(*arguments):
        if not sent:
            sent.append(True)
            os.kill(os.getpid(), signal.SIGTERM)
        report(*arguments)

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


def arrays_of(checkpoint: pathlib.Path) -> list[pathlib.Path]:
    """The files that hold a checkpoint's arrays."""
    return [path for path in (checkpoint / "state").rglob("d/*") if path.is_file()]


@pytest.mark.parametrize("damage", ["cut", "zeroed", "gone"])
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(
    unbroken, tmp_path, damage, capsys
):
    loop.run(ToyProgram(ToyConfig(13)), SETTINGS, tmp_path)
    kept = tmp_path / "checkpoints"
    for path in arrays_of(kept / "13"):
        data = path.read_bytes()
        third = len(data) // 3
        if damage == "gone":
            path.unlink()
        elif damage == "cut":
            path.write_bytes(data[: 2 * third])
        else:  # what a disk may return without an error
            path.write_bytes(data[:third] + bytes(third) + data[2 * third :])
    loop.run(ToyProgram(ToyConfig(30)), SETTINGS, tmp_path)
    said = capsys.readouterr().err
    assert "checkpoint 13 is damaged" in said and "resumed from step 12" in said
    assert (tmp_path / "damaged_checkpoints" / "13").is_dir()
    np.testing.assert_array_equal(final(tmp_path), final(unbroken))


def test_if_no_checkpoint_is_whole_the_run_stops_and_moves_nothing(tmp_path):
    loop.run(ToyProgram(ToyConfig(13)), SETTINGS, tmp_path)
    for step in ("12", "13"):
        for path in arrays_of(tmp_path / "checkpoints" / step):
            path.write_bytes(b"")
    with pytest.raises(UserError, match="none of the 2 checkpoints"):
        loop.run(ToyProgram(ToyConfig(30)), SETTINGS, tmp_path)
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"12", "13"} and not (tmp_path / "damaged_checkpoints").exists()


def test_a_full_disk_ends_the_run_and_keeps_the_last_checkpoint(unbroken, tmp_path):
    # No file of this process may grow beyond a limit, which fails like a full disk.
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
        "the last good one, of step (4|8), stays|checkpoints that are whole stay", refused
    )
    # TensorBoard's thread, which met the same limit, may complain when the process ends.
    assert "Traceback" not in messages.partition("refused")[0]
    loop.run(ToyProgram(ToyConfig(30)), SETTINGS, tmp_path)
    np.testing.assert_array_equal(final(tmp_path), final(unbroken))


class Poisoned(ToyProgram):
    """Its data hold NaN from one example to another."""

    def __init__(self, config, first, last):
        super().__init__(config)
        self.first, self.last = first, last

    def step(self, state, batch):
        bad = (state.step + 1 >= self.first) & (state.step + 1 <= self.last)
        return super().step(state, {"x": jnp.where(bad, jnp.nan, batch["x"])})


def test_an_update_that_is_not_finite_is_left_out_and_counted(tmp_path):
    settings = dataclasses.replace(SETTINGS, log_every=1, save_every=1, keep=30)
    loop.run(Poisoned(ToyConfig(9), 4, 5), settings, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [0, 0, 0, 1, 1, 0, 0, 0, 0]
    abstract = jax.eval_shape(ToyProgram(ToyConfig(9)).init, jax.random.key(0))
    states = {}
    for keep in (9, 5, 3):
        for step in range(keep + 1, 10):
            shutil.rmtree(tmp_path / "checkpoints" / str(step), ignore_errors=True)
        step, states[keep], _ = Checkpoints(tmp_path / "checkpoints").restore(abstract)
        assert step == keep
    np.testing.assert_array_equal(states[5].model.kernel[...], states[3].model.kernel[...])
    assert np.isfinite(final(tmp_path)).all()
    assert (states[9].model.kernel[...] != states[5].model.kernel[...]).any(), "it went on after"


def test_too_many_such_updates_end_the_run_with_the_state_before_them(tmp_path):
    settings = dataclasses.replace(SETTINGS, max_skipped=4)
    with pytest.raises(UserError, match="not finite; none of them was made"):
        loop.run(Poisoned(ToyConfig(30), 8, 30), settings, tmp_path)
    loop.run(ToyProgram(ToyConfig(7)), SETTINGS, tmp_path / "before")
    abstract = jax.eval_shape(ToyProgram(ToyConfig(9)).init, jax.random.key(0))
    _, stopped, _ = Checkpoints(tmp_path / "checkpoints").restore(abstract)
    np.testing.assert_array_equal(stopped.model.kernel[...], final(tmp_path / "before"))


def test_goodput_spans_starts_and_adds_up_to_the_wall_time(tmp_path):
    before = time.time()
    process = start(tmp_path)
    wait_for_step(tmp_path, 9)
    process.kill()
    process.communicate()
    first = json.loads((tmp_path / "goodput.json").read_text())
    loop.run(ToyProgram(ToyConfig(30)), SETTINGS, tmp_path)
    kept = json.loads((tmp_path / "goodput.json").read_text())
    seconds, wall = kept["seconds"], kept["time"] - before
    assert kept["step"] == 30 and all(spent >= 0 for spent in seconds.values())
    # What passes before the first start's clock is importing, in a process of its own.
    assert sum(first["seconds"].values()) < sum(seconds.values()) <= wall
    assert seconds["redone"] > 0 and seconds["down"] > 0 and seconds["compile"] > 0
    assert wall - sum(seconds.values()) < wall


def test_the_weights_of_another_run_start_a_new_one(unbroken, tmp_path):
    settings = dataclasses.replace(SETTINGS, init_from=str(unbroken))
    state = loop.run(ToyProgram(ToyConfig(0)), settings, tmp_path)
    np.testing.assert_array_equal(state.model.kernel[...], final(unbroken))
    with pytest.raises(UserError, match="there is no checkpoint"):
        loop.run(
            ToyProgram(ToyConfig(0)),
            dataclasses.replace(SETTINGS, init_from=str(tmp_path / "export")),
            tmp_path / "other",
        )


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


def compilations(caplog, workdir: pathlib.Path, steps: int) -> list[str]:
    """What JAX says it compiles in a run that logs and saves all the time."""
    caplog.clear()
    with jax.log_compiles():
        loop.run(ToyProgram(ToyConfig(steps)), loop.LoopConfig(log_every=1, save_every=2), workdir)
    return [text for text in caplog.messages if text.startswith("Finished XLA compilation")]


def test_nothing_is_compiled_after_the_first_steps(caplog, tmp_path):
    compilations(caplog, tmp_path / "first", 4)  # what is compiled once a process
    short = compilations(caplog, tmp_path / "short", 4)
    long = compilations(caplog, tmp_path / "long", 12)
    assert sum("train_step" in text for text in long) == 1, (
        "the step itself, ahead of the first one"
    )
    assert len(long) == len(short)


def test_the_step_takes_nothing_from_the_host(monkeypatch, tmp_path):
    batch = {"x": np.zeros((4, 3), np.float32)}
    monkeypatch.setattr(loop.Feed, "__next__", lambda self: batch)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        loop.run(ToyProgram(ToyConfig(4)), loop.LoopConfig(), tmp_path)


def test_a_second_run_in_the_same_workdir_is_refused_at_once(unbroken, tmp_path):
    """The first one goes on, and when it is killed the lock is gone with it."""
    first = start(tmp_path)
    wait_for_step(tmp_path, 3)
    files = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match=f"another run is training in {tmp_path}; wait"):
        loop.run(ToyProgram(ToyConfig(30)), SETTINGS, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == files
    first.kill()
    first.communicate()
    loop.run(ToyProgram(ToyConfig(30)), SETTINGS, tmp_path)
    np.testing.assert_array_equal(final(tmp_path), final(unbroken))


def test_a_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch, capsys):
    def flock(*arguments):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    loop.run(ToyProgram(ToyConfig(2)), SETTINGS, tmp_path)
    assert "a second run in it would not be noticed" in capsys.readouterr().err.replace(
        str(tmp_path), "it"
    )


def test_a_workdir_may_have_any_name(unbroken, tmp_path):
    """Brackets and the like mean something in patterns, which Orbax looks for its files with."""
    workdir = tmp_path / "lr[3e-4] a=b \\ c" / "run*?"
    loop.run(ToyProgram(ToyConfig(13)), SETTINGS, workdir)
    state = loop.run(ToyProgram(ToyConfig(30)), SETTINGS, workdir)
    np.testing.assert_array_equal(final(workdir), final(unbroken))
    assert (workdir / "samples" / "kernel_0000030.png").is_file()
    assert list((workdir / "tensorboard").iterdir())
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6, 9, 12, 13, *range(15, 31, 3)]
    for init_from in (workdir, workdir / "export" / "toy.safetensors"):
        settings = dataclasses.replace(SETTINGS, init_from=str(init_from))
        other = loop.run(ToyProgram(ToyConfig(0)), settings, tmp_path / "[other]" / init_from.name)
        np.testing.assert_array_equal(other.model.kernel[...], state.model.kernel[...])


def test_compiled_programs_are_kept_in_a_folder_of_any_name(tmp_path):
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
    again = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "cache hit" in again.stderr.lower()
