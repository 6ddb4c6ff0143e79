"""Tests runs with evaluation: the same parameters, the logs, and the best checkpoint."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest

from leon_jax import sharding
from leon_jax.train import training_loop
from leon_jax.train.checkpoint import Checkpoints, find_step
from leon_jax.train.evaluation import Evaluation
from tests.train.test_training_loop import (
    SCRIPT,
    SETTINGS,
    ToyConfig,
    ToyProgram,
    exported_kernel,
    start,
    wait_for_step,
)

EVALUATED = dataclasses.replace(SETTINGS, eval_every=7)


class Evaluated(ToyProgram):
    """Its held-out error is lowest in the middle of the run."""

    def evaluation(self):
        def metrics(outputs):
            return {"rows": len(outputs["error"]), "error": outputs["error"].mean()}

        rows = {"x": np.random.default_rng(3).normal(size=(5, 3)).astype(np.float32)}
        return Evaluation("five rows", rows, 2, self.errors, metrics, "error")

    def errors(self, model, batch):
        return {"error": -(batch["x"] @ model.kernel[...]).sum(1)}


def lines_of(workdir: pathlib.Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def held_out(workdir: pathlib.Path) -> dict[int, float]:
    return {x["step"]: x["heldout/error"] for x in lines_of(workdir) if "heldout/error" in x}


def steps_of(workdir: pathlib.Path) -> set[int]:
    return {int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Returns the workdirs of a run without evaluation and of one with it."""
    plain, evaluated = (tmp_path_factory.mktemp(name) for name in ("plain", "evaluated"))
    with jax.set_mesh(sharding.make_mesh((1, 1, 1, 1), jax.devices()[:1])):
        training_loop.run(ToyProgram(ToyConfig(30)), SETTINGS, plain)
        training_loop.run(Evaluated(ToyConfig(30)), EVALUATED, evaluated)
    return plain, evaluated


def test_a_run_with_evaluation_has_the_same_parameters_bit_for_bit(runs):
    plain, evaluated = runs
    np.testing.assert_array_equal(exported_kernel(plain), exported_kernel(evaluated))


def test_held_out_metrics_are_logged_with_those_of_the_step(runs):
    _, evaluated = runs
    assert list(held_out(evaluated)) == [7, 14, 21, 28, 30]
    lines = lines_of(evaluated)
    assert [line["step"] for line in lines] == sorted({*range(3, 31, 3), 7, 14, 28})
    assert all(line["loss"] > 0 for line in lines)
    assert all(line["heldout/rows"] == 5 for line in lines if "heldout/rows" in line)
    kernel = exported_kernel(evaluated)
    rows = np.random.default_rng(3).normal(size=(5, 3)).astype(np.float32)
    expected = -(rows @ kernel).sum(1).mean()
    assert held_out(evaluated)[30] == pytest.approx(expected, rel=1e-6)
    seconds = json.loads((evaluated / "goodput.json").read_text())["seconds"]
    assert seconds["evaluate"] > 0
    assert json.loads((evaluated / "config.json").read_text())["loop"]["eval_every"] == 7


def test_the_best_checkpoint_is_kept_beside_the_newest_ones(runs):
    _, evaluated = runs
    errors = held_out(evaluated)
    best = min(errors, key=errors.__getitem__)
    assert best < 28, "the best is not among the two newest"
    assert steps_of(evaluated) == {best, 28, 30}
    assert find_step(evaluated / "checkpoints", "best") == best
    assert Checkpoints(evaluated / "checkpoints", 2, "five rows").best_loss == errors[best]


def test_a_killed_run_resumes_with_the_same_evaluations_and_the_same_best(runs, tmp_path):
    _, evaluated = runs
    script = (
        SCRIPT.replace(
            "import training_loop\n",
            "import training_loop\n"
            "from tests.train.test_evaluated_runs import EVALUATED, Evaluated\n",
        )
        .replace("SETTINGS, pathlib", "EVALUATED, pathlib")
        .replace("ToyProgram(Toy", "Evaluated(Toy")
    )
    for step in (9, 21):
        process = start(tmp_path, script)
        wait_for_step(tmp_path, step)
        process.kill()
        process.communicate()
    process = start(tmp_path, script)
    messages = process.communicate()[1]
    assert process.returncode == 0, messages
    assert "resumed from step" in messages and "heldout/error" in messages
    assert "every 7 steps the run evaluates five rows" in messages
    np.testing.assert_array_equal(exported_kernel(tmp_path), exported_kernel(evaluated))
    assert held_out(tmp_path) == held_out(evaluated)
    assert steps_of(tmp_path) == steps_of(evaluated)


def test_a_run_without_held_out_documents_says_so_and_is_not_evaluated(runs, tmp_path, capsys):
    class WithoutDocuments(ToyProgram):
        def evaluation(self):
            return None

    training_loop.run(WithoutDocuments(ToyConfig(30)), EVALUATED, tmp_path)
    assert "no folder of config.data has a held-out split" in capsys.readouterr().err
    assert not held_out(tmp_path)
    np.testing.assert_array_equal(exported_kernel(tmp_path), exported_kernel(runs[0]))


def test_a_run_can_continue_with_and_without_evaluation(runs, tmp_path):
    """The best checkpoint stays while the run is not evaluated."""
    plain, _ = runs
    training_loop.run(Evaluated(ToyConfig(9)), EVALUATED, tmp_path)
    errors = held_out(tmp_path)
    best = min(errors, key=errors.__getitem__)
    training_loop.run(ToyProgram(ToyConfig(30)), SETTINGS, tmp_path)
    np.testing.assert_array_equal(exported_kernel(tmp_path), exported_kernel(plain))
    assert steps_of(tmp_path) == {best, 28, 30}
    with pytest.raises(ValueError, match="eval_every is -1; it must be at least 0"):
        dataclasses.replace(SETTINGS, eval_every=-1)
