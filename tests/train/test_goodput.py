"""Tests what the wall time of a run is counted under."""

import json
import re
import time

import pytest

from leon_jax.train import training_loop
from leon_jax.train.goodput import GoodputTracker
from tests.train.test_training_loop import (
    SETTINGS,
    ToyConfig,
    ToyProgram,
    start,
    wait_for_step,
)


def test_goodput_spans_starts_and_adds_up_to_the_wall_time(tmp_path):
    before = time.time()
    process = start(tmp_path)
    wait_for_step(tmp_path, 9)
    process.kill()
    process.communicate()
    first = json.loads((tmp_path / "goodput.json").read_text())
    training_loop.run(ToyProgram(ToyConfig(30)), SETTINGS, tmp_path)
    second = json.loads((tmp_path / "goodput.json").read_text())
    seconds, wall = second["seconds"], second["time"] - before
    assert second["step"] == 30 and all(value >= 0 for value in seconds.values())
    # The wall time also includes the imports of the first process, before its clock starts.
    assert sum(first["seconds"].values()) < sum(seconds.values()) <= wall
    assert seconds["redone"] > 0 and seconds["down"] > 0 and seconds["compile"] > 0
    assert wall - sum(seconds.values()) < wall


def test_the_time_to_the_first_step_is_printed_by_part_and_counted(tmp_path, capfd):
    for steps in (2, 4):
        start_time = time.time() - 5
        training_loop.run(ToyProgram(ToyConfig(steps)), SETTINGS, tmp_path, start_time=start_time)
        (line,) = re.findall(r"^first step after (.*)$", capfd.readouterr().err, re.MULTILINE)
        total, _, parts = line.partition(" s: ")
        seconds = {name: float(value) for name, value in re.findall(r"(\w+) ([\d.]+) s", parts)}
        assert list(seconds) == ["start", "data", "restore", "compile", "step"]
        assert seconds["start"] >= 5
        assert sum(seconds.values()) == pytest.approx(float(total), abs=0.31)
    booked = json.loads((tmp_path / "goodput.json").read_text())["seconds"]
    assert booked["start"] >= 10 and booked["data"] > 0 and booked["restore"] > 0


def test_the_wall_time_of_a_run_of_an_earlier_version_is_kept(tmp_path):
    path = tmp_path / "goodput.json"
    tracker = GoodputTracker()
    tracker.open(path)
    tracker.report(0)
    saved = json.loads(path.read_text())
    del saved["seconds"]["evaluate"]
    path.write_text(json.dumps(saved | {"seconds": {**saved["seconds"], "step": 50.0}}))
    tracker = GoodputTracker()
    tracker.open(path)
    assert tracker.seconds["step"] == 50 and tracker.seconds["evaluate"] == 0
