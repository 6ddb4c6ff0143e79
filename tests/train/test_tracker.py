"""Tests `loop.log_to`: Weights & Biases without a network, and what it does when that fails."""

import dataclasses
import json
import os
import pathlib
import struct
import subprocess
import sys
import types

import numpy as np
import pytest

from leon_jax.config import UserError
from leon_jax.train import tracker, training_loop
from tests.train.test_training_loop import SETTINGS, ToyConfig, ToyProgram, exported_kernel

SCRIPT = """
import dataclasses, pathlib, sys
import jax
from leon_jax import sharding
from tests.train.test_training_loop import SETTINGS, ToyConfig, ToyProgram
from leon_jax.train import training_loop
settings = dataclasses.replace(SETTINGS, log_to="wandb:cats")
with jax.set_mesh(sharding.make_mesh((1, 1, 1, 1), jax.devices()[:1])):
    training_loop.run(ToyProgram(ToyConfig(int(sys.argv[2]))), settings, pathlib.Path(sys.argv[1]))
"""


def records(folder: pathlib.Path) -> list:
    """Returns the records of an offline run of Weights & Biases.

    The file is a header of 7 bytes and a log of LevelDB: blocks of 32 KiB with pieces of records,
    each with a checksum (4 bytes), a length (2) and a type (1: whole, 2 to 4: first to last piece).
    """
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("*.wandb")
    data, position, piece, found = path.read_bytes(), 7, b"", []
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        piece += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(piece)
            found.append(record)
            piece = b""
    return found


@pytest.mark.slow
def test_two_starts_are_one_run_of_weights_and_biases(tmp_path):
    environment = {
        **os.environ,
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "PYTHONPATH": str(pathlib.Path(__file__).parents[2]),
    }
    for steps in (7, 13):
        result = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(tmp_path), str(steps)],
            env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
    folders = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    lines, configs, runs = {}, [], set()
    for folder in folders:
        for record in records(folder):
            if record.WhichOneof("record_type") == "run":
                runs.add((record.run.run_id, record.run.project))
                configs.append({x.key: json.loads(x.value_json) for x in record.run.config.update})
            if record.WhichOneof("record_type") == "history":
                values = {x.key or x.nested_key[0]: x.value_json for x in record.history.item}
                lines[json.loads(values["_step"])] = values
    assert {project for _, project in runs} == {"cats"} and len(runs) == 1
    assert configs[0]["width"] == 4 and configs[0]["loop"]["log_to"] == "wandb:cats"
    logged = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for line in logged:
        assert json.loads(lines[line["step"]]["loss"]) == line["loss"]
    assert "kernel" in lines[5] and list((tmp_path / "wandb").rglob("kernel_*.png"))
    assert list((tmp_path / "tensorboard").iterdir()), "TensorBoard stays"


def fake(monkeypatch, **functions) -> list:
    """Replaces both packages by a module with the same functions; returns the calls of log."""
    calls: list = []
    module = types.SimpleNamespace(
        init=lambda project, name, config, resume: None,
        log=lambda values, step: calls.append((step, values)),
        finish=lambda: calls.append("finish"),
        Image=lambda pixels: pixels.shape,
    )
    module.__dict__.update(functions)
    for name in tracker.TRACKERS:
        monkeypatch.setitem(sys.modules, name, module)
    return calls


def test_a_tracker_that_fails_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    def log(values, step):
        if step > 3:
            raise ConnectionError("no route to host")
        calls.append(step)

    calls = fake(monkeypatch, log=log)
    settings = dataclasses.replace(SETTINGS, log_to="trackio")
    training_loop.run(ToyProgram(ToyConfig(13)), settings, tmp_path / "tracked")
    error = capsys.readouterr().err
    assert error.count("trackio failed, so the run goes on without it: no route to host") == 1
    assert calls == [3]
    training_loop.run(ToyProgram(ToyConfig(13)), SETTINGS, tmp_path / "plain")
    np.testing.assert_array_equal(*(exported_kernel(tmp_path / x) for x in ("tracked", "plain")))


def test_images_and_the_end_are_sent(tmp_path, monkeypatch):
    calls = fake(monkeypatch)
    settings = dataclasses.replace(SETTINGS, log_to="trackio")
    training_loop.run(ToyProgram(ToyConfig(5)), settings, tmp_path)
    assert calls[-1] == "finish" and (5, {"kernel": (2, 2, 3)}) in calls


def test_a_tracker_that_does_not_start_is_one_sentence(tmp_path, monkeypatch):
    def init(**arguments):
        raise RuntimeError("No API key configured")

    fake(monkeypatch, init=init)
    settings = dataclasses.replace(SETTINGS, log_to="wandb")
    with pytest.raises(UserError, match="does not start: No API key configured; for use without"):
        training_loop.run(ToyProgram(ToyConfig(5)), settings, tmp_path)


def test_a_missing_package_and_a_wrong_name_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    settings = dataclasses.replace(SETTINGS, log_to="wandb")
    with pytest.raises(UserError, match="wandb is not installed; run pip install wandb"):
        training_loop.run(ToyProgram(ToyConfig(5)), settings, tmp_path)
    for name in ("neptune", "wandb:"):
        with pytest.raises(ValueError, match="must be wandb or trackio"):
            dataclasses.replace(SETTINGS, log_to=name)
