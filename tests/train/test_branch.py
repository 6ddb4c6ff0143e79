"""Tests runs that branch from a checkpoint of another run."""

import json
import pathlib
import shutil

import grain
import jax
import numpy as np
import pytest

from leon_jax import config as configs
from leon_jax import sharding, weight_files
from leon_jax.config import UserError
from leon_jax.data import pipeline
from leon_jax.data.config import FolderComponent
from leon_jax.train import branch, training_loop
from leon_jax.train.decoder import DecoderProgram
from leon_jax.train.decoder_config import DecoderTraining
from leon_jax.train.optimizer import OptimizerConfig, learning_rate
from tests.train.test_decoder_program import make_config, write_data

# The checkpoints of steps 4 and 8 stay as milestones.
LOOP = training_loop.LoopConfig(
    log_every=1, save_every=1000, sample_every=1000, keep=1, keep_every=4
)
STEPS = 12


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


def make_program(data: pathlib.Path, changes=None) -> DecoderProgram:
    """Returns a small decoder's program, with values by dotted key."""
    config = make_config(data)
    config.samples.image = ""
    config.model.layers = 1
    config.steps = STEPS
    config.optimizer.total_steps = 100
    config.optimizer.schedule = "constant"
    with config.unlocked():
        for key, value in (changes or {}).items():
            config.update_from_flattened_dict({key: value})
    return DecoderProgram(configs.build(DecoderTraining, config))


def train(program: DecoderProgram, workdir: pathlib.Path, branch_from: str = "") -> None:
    program, begun = branch.prepare(branch_from, workdir, program, configs.to_dict(LOOP))
    with jax.set_mesh(sharding.make_mesh((1, 1, 1, 1), jax.devices()[:1])):
        training_loop.run(program, LOOP, workdir, begun)


@pytest.fixture(scope="module")
def parent(data, tmp_path_factory):
    """Returns the workdir of a run of twelve steps, with checkpoints of steps 4, 8 and 12."""
    workdir = tmp_path_factory.mktemp("runs") / "parent"
    train(make_program(data), workdir)
    return workdir


def weights(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    return weight_files.load(workdir / "export" / "decoder.safetensors", "decoder")[0]


def are_equal(one: pathlib.Path, other: pathlib.Path) -> bool:
    first, second = weights(one), weights(other)
    return all(np.array_equal(first[name], second[name]) for name in first)


def lines(workdir: pathlib.Path) -> dict[int, dict]:
    texts = (workdir / "metrics.jsonl").read_text().splitlines()
    return {line["step"]: line for line in map(json.loads, texts)}


def test_a_branch_without_changes_is_its_parent_bit_for_bit(data, parent, tmp_path):
    train(make_program(data), tmp_path / "same", f"{parent}@8")
    assert list(lines(tmp_path / "same")) == [9, 10, 11, 12]
    assert are_equal(tmp_path / "same", parent)
    (entry,) = json.loads((tmp_path / "same" / "history.json").read_text())
    assert entry["changes"] == {} and entry["carried"] == "everything"


def test_a_new_schedule_changes_the_run_from_the_next_step_on(data, parent, tmp_path):
    """Restarts need the parent no more, and may leave the flag out."""
    moved = tmp_path / "moved"
    shutil.copytree(parent, moved)
    wsd = {
        "optimizer.schedule": "wsd",
        "optimizer.total_steps": STEPS,
        "optimizer.decay_steps": 4,
    }
    source = f"{moved}@8"
    train(make_program(data, {**wsd, "steps": 10}), tmp_path / "wsd", source)
    shutil.rmtree(moved)
    train(make_program(data, wsd), tmp_path / "wsd")
    old, new = lines(parent), lines(tmp_path / "wsd")
    assert list(new) == [9, 10, 11, 12]
    # Step 9 has the parent's state and batch, and is the first with another learning rate.
    assert [new[9][name] for name in ("loss", "gradient_norm")] == [
        old[9][name] for name in ("loss", "gradient_norm")
    ]
    rates = [new[step]["learning_rate"] / old[step]["learning_rate"] for step in new]
    np.testing.assert_allclose(rates, [1, 0.775, 0.55, 0.325], rtol=1e-5)
    assert new[10]["loss"] == old[10]["loss"] and new[11]["loss"] != old[11]["loss"]
    (entry,) = json.loads((tmp_path / "wsd" / "history.json").read_text())
    assert (entry["from"], entry["step"]) == (str(moved), 8)
    assert entry["changes"]["optimizer.schedule"] == ["constant", "wsd"]
    train(make_program(data, wsd), tmp_path / "whole", f"{parent}@8")
    assert are_equal(tmp_path / "wsd", tmp_path / "whole")
    # A restart may also repeat the flag.
    program = make_program(data, wsd)
    assert branch.prepare(source, tmp_path / "wsd", program, {}) == (program, None)


@pytest.mark.slow
def test_another_batch_size_carries_the_state_and_the_examples_that_were_read(
    data, parent, tmp_path
):
    train(make_program(data, {"batch_size": 4}), tmp_path / "small", f"{parent}@4")
    (entry,) = json.loads((tmp_path / "small" / "history.json").read_text())
    assert entry["carried"] == "state and consumed examples"
    (stream,) = entry["streams"]
    assert stream["stream"] == 0 and stream["start"] >= 0
    saved = json.loads((tmp_path / "small" / "config.json").read_text())
    assert saved["data"]["mixture"][0]["start"] == stream["start"]
    # A branch of the branch counts on, and has both in its history.
    train(make_program(data, {"batch_size": 2}), tmp_path / "smaller", f"{tmp_path / 'small'}@12")
    history = json.loads((tmp_path / "smaller" / "history.json").read_text())
    assert [entry["step"] for entry in history] == [4, 12]
    assert history[1]["streams"][0]["start"] > stream["start"]


def test_other_rows_carry_the_state_alone(data, parent, tmp_path):
    train(make_program(data, {"data.length": 48}), tmp_path / "rows", f"{parent}@newest")
    (entry,) = json.loads((tmp_path / "rows" / "history.json").read_text())
    assert (entry["step"], entry["carried"], entry["streams"]) == (12, "state", [])


@pytest.mark.parametrize(
    ("changes", "source", "message"),
    [
        ({"model.embed": 64}, "{parent}@8", "config.model.embed is 32 in the parent and 64 here"),
        ({"seed": 1}, "{parent}@8", "config.seed is 0 in the parent and 1 here, but a branch can"),
        ({"optimizer.weight_decay": 0.2}, "{parent}@8", "config.optimizer.weight_decay is 0.1"),
        ({}, "{parent}@7", "there is no checkpoint of step 7 in .*; its steps are 4, 8, 12"),
        ({}, "{parent}", "must be WORKDIR@STEP, for example runs/a@200"),
        ({}, "{parent}/none@8", "none"),
    ],
)
def test_what_cannot_be_carried_is_refused(data, parent, tmp_path, changes, source, message):
    with pytest.raises(UserError, match=message):
        train(make_program(data, changes), tmp_path / "run", source.format(parent=parent))
    assert not (tmp_path / "run").exists()


def test_the_workdir_of_another_run_is_refused(data, parent, tmp_path):
    with pytest.raises(UserError, match="holds a run that does not branch from"):
        branch.prepare(f"{parent}@8", parent, make_program(data), {})
    (tmp_path / "history.json").write_text(json.dumps([{"branch_from": "a@1"}]))
    with pytest.raises(UserError, match="the beginning of a branch; repeat --branch_from=a@1"):
        branch.prepare("", tmp_path, make_program(data), {})


class Number(grain.transforms.RandomMap):
    """Maps an item to its component and its number."""

    def __init__(self, component: str) -> None:
        self.component = component

    def random_map(self, index, rng):
        return self.component, int(index)


@pytest.mark.parametrize("shards", [1, 2])
def test_each_folders_order_goes_on_after_the_examples_that_were_consumed(shards):
    """Also if the folders have another order and other weights, and a new one is among them."""
    sizes = {"a": 17, "b": 5, "c": 7}

    def mixture(components, shard):
        return pipeline.shuffled_mixture(
            [sizes[part.folder] for part in components],
            [Number(part.folder) for part in components],
            components,
            seed=3,
            shard=(shard, shards),
        )

    parents = [FolderComponent("a", weight=3), FolderComponent("b", weight=1)]
    position, read = {}, []
    for shard in range(shards):
        iterator = iter(mixture(parents, shard).to_iter_dataset())
        read += [next(iterator) for _ in range(8)]
        position[str(shard)] = json.dumps({"parent": iterator.get_state(), "next_row": 2})
    counts = branch.consumed(parents, position)
    assert counts == [sum(name == part.folder for name, _ in read) for part in parents]
    weights = {"c": 1, "b": 2, "a": 1}
    streams = branch.continued(
        parents, counts, [FolderComponent(name, weight=weight) for name, weight in weights.items()]
    )
    children = [
        FolderComponent(x["folder"], "train", weights[x["folder"]], x["start"], x["stream"])
        for x in streams
    ]
    assert [child.start for child in children] == [0, counts[1], counts[0]]
    after = [mixture(children, shard)[i] for i in range(16) for shard in range(shards)]
    whole = pipeline.shuffled_mixture(
        [17, 5], [Number("a"), Number("b")],
        [FolderComponent("a"), FolderComponent("b")], seed=3,
    )  # fmt: skip
    for name, count in zip("ab", counts, strict=True):
        order = [number for folder, number in (whole[i] for i in range(200)) if folder == name]
        numbers = [number for folder, number in after if folder == name]
        assert sorted(numbers) == sorted(order[count : count + len(numbers)])
        if shards == 1:
            assert numbers == order[count : count + len(numbers)]
    assert len({child.stream for child in children}) == 3


def test_wsd_is_stable_after_its_warm_up_and_decays_at_the_end():
    config = OptimizerConfig(1.0, 100, 10, "wsd", final_fraction=0.1, decay_steps=20)
    rates = [float(learning_rate(config)(step)) for step in (5, 10, 50, 80, 90, 100, 200)]
    np.testing.assert_allclose(rates, [0.5, 1, 1, 1, 0.55, 0.1, 0.1], rtol=1e-6)
    for arguments in ({"decay_steps": 91}, {"decay_steps": 0}):
        with pytest.raises(ValueError, match="with the schedule wsd it must be at least 1 and at"):
            OptimizerConfig(1.0, 100, 10, "wsd", **arguments)
    with pytest.raises(ValueError, match="but the schedule linear has none"):
        OptimizerConfig(1.0, 100, 10, "linear", decay_steps=5)
