"""Our side of `benchmarks/train_step.py`: the compiled step of `leon train`, on random tokens."""

import argparse
import json
import pathlib
import time

import jax
import numpy as np
from safetensors.numpy import save_file

from benchmarks.shapes import OPTIMIZER, Shape
from benchmarks.turns import ROOT, serve
from leon_jax import sharding
from leon_jax.data.config import DataConfig
from leon_jax.models.decoder_config import DecoderConfig
from leon_jax.train import peak_flops
from leon_jax.train.decoder import DecoderProgram
from leon_jax.train.decoder_config import DecoderTraining
from leon_jax.train.optimizer import OptimizerConfig
from leon_jax.train.state import TrainState
from leon_jax.train.training_loop import skip_nonfinite
from leon_jax.vocabulary import Vocabulary
from tests.models.opt_weights import to_opt

SPECIALS, CODES, SENTINELS = 6, 64, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", help="JSON of a benchmarks.shapes.Shape")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="weights, batches")
    parser.add_argument(
        "--models", required=True, help="JSON of more fields of DecoderConfig, by name"
    )
    parser.add_argument("--training", default="{}", help="JSON of more fields of DecoderTraining")
    arguments = parser.parse_args()
    shape = Shape(**json.loads(arguments.shape))
    with jax.set_mesh(sharding.make_mesh()):
        side = Ours(shape, json.loads(arguments.models), json.loads(arguments.training))
        side.write(arguments.out)
        serve({"loss": side.loss, "steps": side.steps, "facts": side.facts})


class Ours:
    """A training state with random weights, the steps that change it, and their batches.

    Args:
      shape: shape of the model and of a batch.
      models: more fields of `DecoderConfig`, by the name of the step.
      training: more fields of `DecoderTraining`.
    """

    def __init__(self, shape: Shape, models: dict[str, dict], training: dict) -> None:
        self._shape = shape
        self._programs = {
            name: DecoderProgram(_config(shape, model, training)) for name, model in models.items()
        }
        self._first = next(iter(self._programs.values()))
        self._state = _random_state(self._first)
        leaves = jax.tree.leaves(self._state)
        # The structures differ, since a model holds its configuration.
        self._structures = {
            name: jax.tree.structure(jax.eval_shape(program.init, jax.random.key(0)))
            for name, program in self._programs.items()
        }
        rng = np.random.default_rng(1)
        # Ids start at 2, since OPT's embedding treats id 1 as padding.
        size = (4, shape.batch, shape.length + 1)
        self._ids = rng.integers(2, shape.vocab, size, np.int32)
        self._batches = [self._batch(ids) for ids in self._ids]
        self._steps = {
            name: jax.jit(skip_nonfinite(program.step), donate_argnums=0)
            .lower(jax.tree.unflatten(self._structures[name], leaves), self._batches[0])
            .compile()
            for name, program in self._programs.items()
        }
        self._step_count = 0

    def write(self, folder: pathlib.Path) -> None:
        """Writes the weights under OPT's names, and the batches, for the other side."""
        weights = to_opt(self._state.model)
        contiguous = {name: np.ascontiguousarray(array) for name, array in weights.items()}
        save_file(contiguous, folder / "weights.safetensors")
        save_file({"ids": self._ids.astype(np.int64)}, folder / "ids.safetensors")

    def steps(self, name: str, count: int) -> float:
        """Runs `count` steps; returns the seconds."""
        start, state = time.monotonic(), self._named(name)
        for _ in range(count):
            batch = self._batches[self._step_count % len(self._batches)]
            state, _ = self._steps[name](state, batch)
            self._step_count += 1
        self._state = jax.block_until_ready(state)
        return time.monotonic() - start

    def loss(self, name: str) -> float:
        """Returns the loss of the first batch, without an update."""
        program = self._programs[name]
        step = jax.jit(lambda state, batch: program.step(state, batch)[1]["loss"])
        return float(step(self._named(name), self._batches[0]))

    def facts(self) -> dict:
        devices = jax.devices()
        return {
            "name": f"leon_jax (JAX {jax.__version__})",
            "device": devices[0].device_kind,
            "devices": len(devices),
            "parameters": self._first.config.model.parameter_count(),
            "flops_per_token": self._first.flops_per_token,
            "peak": peak_flops.peak_flops(devices),
        }

    def _named(self, name: str) -> TrainState:
        """Returns the state in the structure of a step."""
        return jax.tree.unflatten(self._structures[name], jax.tree.leaves(self._state))

    def _batch(self, ids: np.ndarray) -> dict[str, jax.Array]:
        ones = np.ones(ids[:, 1:].shape, np.int32)
        arrays = {
            "ids": ids[:, :-1],
            "targets": ids[:, 1:],
            "segment_ids": ones,  # one document a row
            "positions": ones * np.arange(self._shape.length, dtype=np.int32),
            "weights": ones.astype(np.float32),
        }
        return jax.device_put(arrays, sharding.batch_sharding())


def _config(shape: Shape, model: dict, training: dict) -> DecoderTraining:
    text = shape.vocab - SPECIALS - CODES - SENTINELS
    text_file = ROOT / "leon_jax" / "weights" / "emoji" / "text.json"
    return DecoderTraining(
        model=DecoderConfig(
            vocab_size=shape.vocab, max_length=shape.length, layers=shape.layers,
            embed=shape.embed, heads=shape.heads, mlp=shape.mlp, **model,
        ),
        vocabulary=Vocabulary.compact(CODES, text, SENTINELS),
        optimizer=OptimizerConfig(total_steps=1, schedule="constant", **OPTIMIZER),
        batch_size=shape.batch,
        steps=1,
        data=DataConfig(text=str(text_file), image_shape=(8, 8), length=shape.length),
        **training,
    )  # fmt: skip


def _random_state(program: DecoderProgram) -> TrainState:
    """Returns a state with normal weights, std 0.02; initialised blocks would be the identity."""
    state = jax.jit(program.init)(jax.random.key(0))
    rng = np.random.default_rng(0)
    leaves, structure = jax.tree.flatten(state.model)
    random_leaves = [
        jax.device_put(0.02 * rng.standard_normal(leaf.shape, np.float32), leaf.sharding)
        for leaf in leaves
    ]
    state.model = jax.tree.unflatten(structure, random_leaves)
    return state


if __name__ == "__main__":
    main()
