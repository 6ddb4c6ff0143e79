"""Our side of `benchmarks/decode.py`: the engine of `leon generate`, with random weights."""

import argparse
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from benchmarks.shapes import Shape
from benchmarks.turns import serve
from leon_jax import sharding
from leon_jax.engine.engine import Engine, Sample, TokenRequest
from leon_jax.engine.grammar import ImageSpan
from leon_jax.engine.guidance import ClassifierFree, Plain
from leon_jax.engine.samplers import Greedy
from leon_jax.engine.sampling_params import SamplingParams
from leon_jax.engine.scheduler import generate
from leon_jax.models.decoder import Decoder
from leon_jax.models.decoder_config import DecoderConfig
from leon_jax.models.weight_conversion import unstack
from leon_jax.vocabulary import Vocabulary
from tests.models.opt_weights import to_opt

OTHERS = 6 + 2 + 8  # other ids than image codes: specials, <eoss>, <break>, sentinels, texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", help="JSON of a benchmarks.shapes.Shape")
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--prompt", type=int, required=True, help="tokens")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="weights, prompts")
    arguments = parser.parse_args()
    with jax.set_mesh(sharding.make_mesh()):
        side = Ours(Shape(**json.loads(arguments.shape)), arguments.dtype, arguments.prompt)
        side.write(arguments.out)
        serve({"run": side.run, "facts": side.facts})


class Ours:
    """An engine and its prompts; each completion is one image of `new` ids."""

    def __init__(self, shape: Shape, dtype: str, prompt: int) -> None:
        config = DecoderConfig(
            vocab_size=shape.vocab, max_length=prompt + shape.length, layers=shape.layers,
            embed=shape.embed, heads=shape.heads, mlp=shape.mlp, dtype=dtype,
        )  # fmt: skip
        model = jax.jit(lambda: Decoder(config, rngs=nnx.Rngs(0)))()
        rng = np.random.default_rng(0)
        leaves, structure = jax.tree.flatten(model)
        # Newly initialised blocks would be the identity.
        random_leaves = [
            jax.device_put(0.02 * rng.standard_normal(leaf.shape, np.float32), leaf.sharding)
            for leaf in leaves
        ]
        self._model = jax.tree.unflatten(structure, random_leaves)
        vocabulary = Vocabulary.compact(shape.vocab - OTHERS, 4, 4 + 2)
        self._vocabulary, self._config = vocabulary, config
        self._engine = Engine(unstack(self._model), vocabulary, buckets=(prompt,))
        # Prompts of image ids, as in prompts with retrieved documents.
        low, high = vocabulary.image_start, vocabulary.image_stop
        self._ids = rng.integers(low, high, (64, prompt)).astype(np.int32)
        self._unconditional = rng.integers(low, high, prompt).astype(np.int32)

    def write(self, folder: pathlib.Path) -> None:
        """Writes the weights under OPT's names, and the prompts, for the other side."""
        weights = to_opt(self._model)
        contiguous = {name: np.ascontiguousarray(array) for name, array in weights.items()}
        save_file(contiguous, folder / "weights.safetensors")
        ids = {
            "ids": self._ids.astype(np.int64),
            "unconditional": self._unconditional.astype(np.int64),
        }
        save_file(ids, folder / "prompts.safetensors")

    def run(self, batch: int, new: int, guidance: float) -> list:
        """Generates `new` greedy ids for each of `batch` prompts; returns seconds and ids."""
        params = SamplingParams(Plain() if guidance == 1 else ClassifierFree(guidance), Greedy())
        requests = [
            TokenRequest(
                (self._ids[row], self._unconditional), (ImageSpan(new),), (Sample(0, params),)
            )
            for row in range(batch)
        ]
        start = time.monotonic()
        outputs = generate(self._engine, requests)
        seconds = time.monotonic() - start
        return [seconds, [spans[0].ids.tolist() for (spans,) in outputs]]

    def facts(self) -> dict:
        devices = jax.devices()
        return {
            "name": f"leon_jax (JAX {jax.__version__})",
            "device": devices[0].device_kind,
            "devices": len(devices),
            "parameters": self._config.parameter_count(),
            "images": [self._vocabulary.image_start, self._vocabulary.image_stop],
            "bandwidth": bandwidth(),
        }


def bandwidth() -> float:
    """Measures the memory bandwidth in bytes per second: the faster of a sum and a product."""
    data = jax.random.uniform(jax.random.key(0), (2**14, 2**14))
    best = 0.0
    for read in (jax.jit(jnp.sum), jax.jit(lambda data: data[0] @ data)):
        for _ in range(6):  # the first compiles
            start = time.monotonic()
            read(data).block_until_ready()
            best = max(best, data.nbytes / (time.monotonic() - start))
    return best


if __name__ == "__main__":
    main()
