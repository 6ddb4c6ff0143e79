"""Tests checkpoints without the loop: exact restoring, damage, and changed configurations."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from leon_jax import weight_files
from leon_jax.config import UserError, to_dict
from leon_jax.data.augment import CropConfig
from leon_jax.models.decoder_config import DecoderConfig
from leon_jax.models.vqgan import VQGANConfig
from leon_jax.train.checkpoint import Checkpoints, complete_steps, find_step
from leon_jax.train.checkpoint_reader import load_model, load_weights
from leon_jax.train.run_config import check_config
from leon_jax.train.state import TrainState


class Weights(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.large = nnx.Param(jax.random.normal(rngs.params(), (300, 500)))
        self.half = nnx.Param(jax.random.normal(rngs.params(), (7,)).astype(jnp.bfloat16))


def state(seed: int, step: int) -> TrainState:
    model = Weights(rngs=nnx.Rngs(seed))
    return TrainState(jnp.int32(step), model, {"count": jnp.int32(step)}, jax.random.key(seed))


ABSTRACT = jax.eval_shape(lambda: state(0, 0))


def save_two(folder):
    checkpoints = Checkpoints(folder)
    for step in (1, 2):
        checkpoints.save(state(step, step), {"0": f'{{"at": {step}}}'})
    checkpoints.close()


def test_restore_returns_exactly_what_was_saved(tmp_path):
    save_two(tmp_path / "checkpoints")
    step, restored, data = Checkpoints(tmp_path / "checkpoints").restore(ABSTRACT)
    assert (step, data) == (2, {"0": '{"at": 2}'})
    for restored_leaf, saved_leaf in zip(
        jax.tree.leaves(restored), jax.tree.leaves(state(2, 2)), strict=True
    ):
        assert restored_leaf.dtype == saved_leaf.dtype
        if jnp.issubdtype(restored_leaf.dtype, jax.dtypes.prng_key):
            restored_leaf, saved_leaf = (
                jax.random.key_data(restored_leaf),
                jax.random.key_data(saved_leaf),
            )
        np.testing.assert_array_equal(
            np.asarray(restored_leaf, np.float64), np.asarray(saved_leaf, np.float64)
        )


class Layers(nnx.Module):
    """Has an array called `value`, as the decoder does; older versions left this name out."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.query = nnx.Param(jax.random.normal(rngs.params(), (4, 4)))
        self.value = nnx.Param(jax.random.normal(rngs.params(), (4, 5)))


class Layered(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.blocks = Layers(rngs=rngs)


def layered(seed: int) -> TrainState:
    model = Layered(rngs=nnx.Rngs(seed))
    moments = optax.adam(1e-3).init(model)
    moments = jax.tree.map(lambda x: x + jnp.ones_like(x), moments)
    return TrainState(jnp.int32(3), model, moments, jax.random.key(seed))


@pytest.mark.parametrize("is_old_version", [False, True])
def test_a_checkpoint_of_an_older_version_is_restored_exactly(
    tmp_path, monkeypatch, is_old_version
):
    flatten = weight_files.flatten
    names = [weight_files.former_name(name) for name in flatten(layered(0))]
    assert "model.blocks" in names and "model.blocks.value" in flatten(layered(0))
    with monkeypatch.context() as patch:
        if is_old_version:
            patch.setattr(
                weight_files,
                "flatten",
                lambda tree: dict(zip(names, flatten(tree).values(), strict=True)),
            )
        checkpoints = Checkpoints(tmp_path / "checkpoints")
        checkpoints.save(layered(0), {"0": "x"})
        checkpoints.close()
    abstract = jax.eval_shape(lambda: layered(0))
    step, restored, _ = Checkpoints(tmp_path / "checkpoints").restore(abstract)
    assert step == 3
    raw = lambda x: jax.random.key_data(x) if x.dtype == restored.key.dtype else x  # noqa: E731
    for restored_leaf, saved_leaf in zip(
        jax.tree.leaves(restored), jax.tree.leaves(layered(0)), strict=True
    ):
        np.testing.assert_array_equal(raw(restored_leaf), raw(saved_leaf))
    shapes = {f"model.{name}": leaf for name, leaf in flatten(abstract.model).items()}
    weights = load_weights(tmp_path / "checkpoints", shapes, 3)
    for name, array in flatten(layered(0).model).items():
        np.testing.assert_array_equal(weights[f"model.{name}"], array)


def test_silently_changed_bytes_are_detected(tmp_path, capsys):
    save_two(tmp_path / "checkpoints")
    files = [path for path in (tmp_path / "checkpoints/2/state").rglob("d/*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    assert len(data) > 400_000, "one file holds the large array"
    middle = len(data) // 2
    data[middle : middle + 4096] = bytes(4096)
    largest.write_bytes(data)
    step, restored, _ = Checkpoints(tmp_path / "checkpoints").restore(ABSTRACT)
    assert step == 1
    np.testing.assert_array_equal(restored.model.large[...], state(1, 1).model.large[...])
    assert (
        "checkpoint 2 is damaged (model.large does not match its checksum"
        in capsys.readouterr().err
    )


def test_the_best_checkpoint_is_kept_beside_the_newest_ones(tmp_path):
    folder = tmp_path / "run[1]" / "checkpoints"
    losses = {1: None, 2: 3.0, 3: None, 4: 2.5, 5: None, 6: None}
    for steps in ((1, 2, 3), (4, 5, 6)):  # two starts
        checkpoints = Checkpoints(folder, 2, "nine documents")
        assert checkpoints.best_loss == (np.inf if steps[0] == 1 else 3.0)
        for step in steps:
            checkpoints.save(state(step, step), {"0": ""}, losses[step])
        checkpoints.close()
    assert {path.name for path in folder.iterdir() if path.name.isdigit()} == {"4", "5", "6"}
    assert Checkpoints(folder, 2, "nine documents").best_loss == 2.5
    assert [find_step(folder, name) for name in ("best", "newest", "5")] == [4, 6, 5]
    model = load_model(folder, ABSTRACT, 4)
    np.testing.assert_array_equal(model.large[...], state(4, 4).model.large[...])
    with pytest.raises(UserError, match=r"no checkpoint of step 3 in .*; its steps are 4, 5, 6"):
        find_step(folder, "3")
    checkpoints = Checkpoints(folder, 2, "ten documents")
    assert checkpoints.restore(ABSTRACT)[0] == 6, "a run continues from the newest"
    assert checkpoints.best_loss == np.inf, "losses on other documents are not compared"
    for step, loss in ((7, 8.0), (8, None), (9, None)):
        checkpoints.save(state(step, step), {"0": ""}, loss)
    checkpoints.close()
    assert {path.name for path in folder.iterdir() if path.name.isdigit()} == {"7", "8", "9"}
    assert find_step(folder, "best") == 7
    save_two(tmp_path / "other")
    with pytest.raises(UserError, match=r"has a held-out loss; set config\.loop\.eval_every"):
        find_step(tmp_path / "other", "best")


def test_milestones_stay_beside_the_newest_and_the_best_checkpoint(tmp_path):
    folder = tmp_path / "checkpoints"
    for steps in (range(1, 5), range(5, 9)):  # two starts
        checkpoints = Checkpoints(folder, 1, keep_every=3)
        for step in steps:
            checkpoints.save(state(step, step), {"0": ""}, 1.0 if step == 2 else None)
        checkpoints.close()
    assert complete_steps(folder) == [2, 3, 6, 8]
    assert find_step(folder, "3") == 3
    model = load_model(folder, ABSTRACT, 3)
    np.testing.assert_array_equal(model.large[...], state(3, 3).model.large[...])


def test_the_best_checkpoint_of_an_earlier_version_is_known(tmp_path, monkeypatch):
    """It has a loss without the documents and the step."""
    folder = tmp_path / "checkpoints"
    checkpoints = Checkpoints(folder, 1)
    save = checkpoints._checkpointer.save_checkpointables_async

    def save_loss_only(*arguments, metrics, **options):
        loss = metrics and {"held_out_loss": metrics["held_out_loss"]}
        return save(*arguments, metrics=loss, **options)

    monkeypatch.setattr(checkpoints._checkpointer, "save_checkpointables_async", save_loss_only)
    for step, loss in ((1, 3.0), (2, 2.5), (3, None)):
        checkpoints.save(state(step, step), {"0": ""}, loss)
    checkpoints.close()
    checkpoints = Checkpoints(folder, 1, "nine documents")
    assert checkpoints.best_loss == 2.5
    checkpoints.save(state(4, 4), {"0": ""}, 2.0)
    checkpoints.save(state(5, 5), {"0": ""})
    checkpoints.close()
    assert {path.name for path in folder.iterdir() if path.name.isdigit()} == {"4", "5"}


def test_a_folder_that_cannot_be_created_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"checkpoints cannot be saved in .*file"):
        Checkpoints(tmp_path / "file" / "checkpoints")


def test_a_run_of_an_older_version_resumes_without_the_keys_that_it_lacks(tmp_path):
    (tmp_path / "checkpoints" / "100").mkdir(parents=True)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"augment": {"crop": 0.75, "mirror": 0.5}}))
    with pytest.raises(UserError, match=r"augment\.scenes = None, but it is now 0\.5"):
        check_config(path, {"augment": to_dict(CropConfig(scenes=0.5))})
    check_config(path, {"augment": to_dict(CropConfig())})
    decoder = DecoderConfig(48, 16, layers=2, embed=32, heads=4, mlp=64)
    assert not {"products", "kv_heads", "form"} & to_dict(decoder).keys()
    assert not {"unit_codes", "remat"} & to_dict(VQGANConfig()).keys()


class Wider(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.large = nnx.Param(jax.random.normal(rngs.params(), (300, 501)))
        self.half = nnx.Param(jax.random.normal(rngs.params(), (7,)).astype(jnp.bfloat16))


def test_arrays_of_another_shape_are_refused_without_quoting_the_library(tmp_path):
    save_two(tmp_path / "checkpoints")
    other = jax.eval_shape(lambda: dataclasses.replace(state(0, 0), model=Wider(rngs=nnx.Rngs(0))))
    names = {f"model.{name}": leaf for name, leaf in weight_files.flatten(other.model).items()}
    message = r"a file is damaged, or .*another shape|or its arrays do not fit\); restore the"
    for load in (
        lambda: Checkpoints(tmp_path / "checkpoints").restore(other),
        lambda: load_weights(tmp_path / "checkpoints", names, 2),
    ):
        with pytest.raises(UserError, match=message) as raised:
            load()
        assert "\n" not in str(raised.value) and "orbax" not in str(raised.value).lower()


def test_the_files_of_the_model_folder_may_change_between_starts(tmp_path):
    """They have no effect on training, and runs of earlier versions have no such keys."""
    path = tmp_path / "config.json"
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    for config in ({"seed": 0}, {"seed": 0, "export": {"encoder": ""}}):
        check_config(path, config)
    check_config(path, {"seed": 0, "export": {"encoder": "models/encoder"}})
    with pytest.raises(UserError, match="seed = 0, but it is now 1"):
        check_config(path, {"seed": 1, "export": {"encoder": "models/encoder"}})
