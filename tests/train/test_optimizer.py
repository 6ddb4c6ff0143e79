"""The optimizer: Muon's updates, and the average of the weights."""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from leon_jax import sharding, weight_files
from leon_jax.config import UserError
from leon_jax.models.decoder import Decoder
from leon_jax.models.decoder_config import DecoderConfig, Form
from leon_jax.train import optimizer, training_loop
from leon_jax.train.decoder import _MATRICES, _decays
from leon_jax.train.optimizer import OptimizerConfig
from tests import simulated_devices
from tests.train.test_training_loop import ToyConfig, ToyProgram

SETTINGS = OptimizerConfig(learning_rate=1e-2, total_steps=100, clip_norm=0.0)
SIZES = DecoderConfig(64, 64, 2, 64, 8, 64, form=Form(mlp="swiglu", norm_scale=True))


def decoder() -> Decoder:
    return Decoder(SIZES, rngs=nnx.Rngs(0))


def gradients(model: Decoder) -> Decoder:
    """Returns random numbers of the shapes of the weights."""
    random = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: jax.device_put(
            random.normal(size=leaf.shape).astype(np.float32), jax.typeof(leaf).sharding.spec
        ),
        model,
    )


def update(settings: OptimizerConfig) -> dict[str, np.ndarray]:
    """Returns the first update of a decoder, by the names of its arrays."""
    transformation = optimizer.make(settings, _decays, _MATRICES)

    @jax.jit
    def first() -> Decoder:
        model = decoder()
        return transformation.update(gradients(model), transformation.init(model), model)[0]

    return {name: np.asarray(leaf) for name, leaf in weight_files.flatten(first()).items()}


@pytest.fixture(autouse=True)
def one_device():
    with jax.set_mesh(sharding.make_mesh((1, 1, 1, 1), jax.devices()[:1])):
        yield


def test_muon_orthogonalises_the_matrices_of_the_layers_and_updates_the_rest_as_adamw_does():
    muon = update(dataclasses.replace(SETTINGS, kind="muon", weight_decay=0.0))
    adamw = optax.nadamw(SETTINGS.learning_rate, SETTINGS.beta1, SETTINGS.beta2, weight_decay=0.0)
    model = decoder()
    expected = weight_files.flatten(adamw.update(gradients(model), adamw.init(model), model)[0])
    matrices = set(_MATRICES) & set(muon)
    assert len(matrices) == 7
    for name, values in muon.items():
        if name not in matrices:
            np.testing.assert_allclose(values, expected[name], 1e-5, 1e-8, err_msg=name)
            continue
        rows = 2 if name == "blocks.out" else 1
        for layer in values:
            matrix = layer.reshape(np.prod(layer.shape[:rows]), -1)
            singular = np.linalg.svd(matrix, compute_uv=False)
            # Five Newton-Schulz steps bring all but the smallest to about the same value.
            assert np.quantile(singular, 0.05) > 0.5 * singular.max(), name
            # The size of an update is about that of AdamW's.
            assert np.sqrt(np.square(matrix).mean()) == pytest.approx(0.2 * 1e-2, rel=0.3), name


def test_muon_needs_matrices_and_an_average_a_rate_below_one():
    with pytest.raises(UserError, match=r'config\.optimizer\.kind is "muon"; it is for decoders'):
        optimizer.make(OptimizerConfig(1e-2, 100, kind="muon"))
    with pytest.raises(ValueError, match="average is 1; it must be at least 0 and below 1"):
        OptimizerConfig(1e-2, 100, average=1)


def test_the_average_follows_its_formula_and_changes_no_update():
    plain = optimizer.make(SETTINGS)
    averaging = optimizer.make(dataclasses.replace(SETTINGS, average=0.3))
    model = {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(3)}
    states = [plain.init(model), averaging.init(model)]
    models, expected = [model, model], model
    for step in range(1, 6):
        gradients = jax.tree.map(lambda leaf, s=step: jnp.sin(leaf + s), model)
        for number, transformation in enumerate((plain, averaging)):
            updates, states[number] = transformation.update(
                gradients, states[number], models[number]
            )
            models[number] = optax.apply_updates(models[number], updates)
        jax.tree.map(np.testing.assert_array_equal, *models)
        rate = min(0.3, (1 + step) / (10 + step))
        expected = jax.tree.map(
            lambda old, new, r=rate: r * old + (1 - r) * new, expected, models[0]
        )
    average = states[1][-1].weights
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), average, expected)
    assert float(jnp.abs(average["w"] - models[1]["w"]).max()) > 1e-3


class AveragingProgram(ToyProgram):
    def __init__(self, config: ToyConfig):
        super().__init__(config)
        self.optimizer = optimizer.make(OptimizerConfig(0.05, 100, average=0.9))
        self.sampled = []

    def samples(self, state):
        self.sampled.append(np.asarray(state.model.kernel))
        return {}


def test_a_run_samples_and_exports_the_average(tmp_path):
    program = AveragingProgram(ToyConfig(12))
    loop = training_loop.LoopConfig(log_every=3, save_every=4, sample_every=12)
    state = training_loop.run(program, loop, tmp_path / "once")
    average = np.asarray(optimizer.averaged(state).model.kernel)
    assert np.abs(average - np.asarray(state.model.kernel)).max() > 1e-3
    path = tmp_path / "once" / "export" / "toy.safetensors"
    np.testing.assert_array_equal(weight_files.load(path, "toy")[0]["kernel"], average)
    np.testing.assert_array_equal(program.sampled[-1], average)
    # The average is part of the checkpoint.
    training_loop.run(AveragingProgram(ToyConfig(8)), loop, tmp_path / "twice")
    training_loop.run(AveragingProgram(ToyConfig(12)), loop, tmp_path / "twice")
    again = weight_files.load(tmp_path / "twice" / "export" / "toy.safetensors", "toy")[0]
    np.testing.assert_array_equal(again["kernel"], average)


MESHES = [(1, 1, 1, 1), (8, 1, 1, 1), (1, 8, 1, 1), (1, 1, 1, 8), (2, 2, 1, 2)]
ON_MESHES = """
import json, jax, numpy as np
from leon_jax import sharding
from tests.train import test_optimizer as tests

results = []
for mesh in tests.MESHES:
    with jax.set_mesh(sharding.make_mesh(mesh, jax.devices()[:np.prod(mesh)])):
        arrays = tests.update(tests.OptimizerConfig(1e-2, 100, kind="muon", average=0.9))
        results.append({name: float(np.abs(array).sum()) for name, array in arrays.items()})
print(json.dumps(results))
"""


def test_muon_does_not_depend_on_the_mesh():
    result = subprocess.run(
        [sys.executable, "-c", ON_MESHES],
        env=simulated_devices.environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    one, *others = json.loads(result.stdout)
    for other in others:
        assert other == pytest.approx(one, rel=1e-4)
