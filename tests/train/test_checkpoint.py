"""Checkpoints, apart from the loop: silent damage is found, and arrays keep their kind."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from leon_jax import model_files
from leon_jax.config import UserError
from leon_jax.train.checkpoint import Checkpoints, check_config, load_weights
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


def test_what_is_restored_is_what_was_saved(tmp_path):
    save_two(tmp_path / "checkpoints")
    step, restored, data = Checkpoints(tmp_path / "checkpoints").restore(ABSTRACT)
    assert (step, data) == (2, {"0": '{"at": 2}'})
    for got, saved in zip(jax.tree.leaves(restored), jax.tree.leaves(state(2, 2)), strict=True):
        assert got.dtype == saved.dtype
        if jnp.issubdtype(got.dtype, jax.dtypes.prng_key):
            got, saved = jax.random.key_data(got), jax.random.key_data(saved)
        np.testing.assert_array_equal(np.asarray(got, np.float64), np.asarray(saved, np.float64))


def test_bytes_that_changed_silently_are_found(tmp_path, capsys):
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
    assert "checkpoint 2 is damaged (model.large is not what was written" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"checkpoints cannot be kept in .*file"):
        Checkpoints(tmp_path / "file" / "checkpoints")


def test_a_run_goes_on_with_other_threads_but_not_with_other_data(tmp_path):
    kept = {"steps": 10, "data": {"threads": 2, "mixture": [{"folder": "a", "weight": 1.0}]}}
    # A start that came to nothing is no run.
    check_config(tmp_path / "config.json", {"steps": 10, "data": {"mixture": "elsewhere"}})
    check_config(tmp_path / "config.json", kept)
    (tmp_path / "checkpoints" / "100").mkdir(parents=True)
    check_config(tmp_path / "config.json", kept | {"data": kept["data"] | {"threads": 16}})
    other = [{"folder": "a", "weight": 2.0}]
    with pytest.raises(UserError, match=r"a run with data\.mixture = .*weight.*put the value back"):
        check_config(tmp_path / "config.json", kept | {"data": {"threads": 2, "mixture": other}})


class Wider(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.large = nnx.Param(jax.random.normal(rngs.params(), (300, 501)))
        self.half = nnx.Param(jax.random.normal(rngs.params(), (7,)).astype(jnp.bfloat16))


def test_arrays_of_another_shape_are_refused_in_our_own_words(tmp_path):
    """What Orbax has to say is the cause of the error, not a part of the sentence."""
    save_two(tmp_path / "checkpoints")
    other = jax.eval_shape(lambda: dataclasses.replace(state(0, 0), model=Wider(rngs=nnx.Rngs(0))))
    names = {f"model.{name}": leaf for name, leaf in model_files.flatten(other.model).items()}
    own_words = r"a file is (missing, )?damaged,? or .*another shape|of other arrays; put the"
    for load in (
        lambda: Checkpoints(tmp_path / "checkpoints").restore(other),
        lambda: load_weights(tmp_path / "checkpoints", names),
    ):
        with pytest.raises(UserError, match=own_words) as raised:
            load()
        assert "\n" not in str(raised.value) and "orbax" not in str(raised.value).lower()
