"""A decoder on meshes of several devices; test_decoder.py and test_forms.py start this.

The argument is the name of a form (`tests/models/forms.py`); without it, the form is CM3Leon's.
"""

import dataclasses
import sys

import jax
import numpy as np
from flax import nnx

from leon_jax import sharding
from leon_jax.engine.kv_cache import KVCache, valid_slots
from leon_jax.models.decoder import Decoder
from leon_jax.ops.cross_entropy import chunked_cross_entropy
from tests.models import forms

CONFIG = forms.config(*sys.argv[1:] or ["cm3leon"], remat="full")
# Of eight devices for the form of CM3Leon; for the others one of sixteen, which splits every axis.
MESHES = [(2, 2, 2, 2)] if sys.argv[1:] else [(1, 8, 1, 1), (2, 2, 1, 2), (1, 2, 2, 2)]


def randomise(model):
    """Replaces all weights by random ones, because identity blocks would hide errors."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jax.device_put(
            rng.normal(0, 0.3, leaf.shape).astype(np.float32), leaf.sharding
        ),
        model,
    )


def compute(shape, config):
    rng = np.random.default_rng(0)
    ids, targets = rng.integers(0, 48, (2, 8, 16)).astype(np.int32)
    segments = np.repeat([[1] * 6 + [2] * 10], 8, axis=0).astype(np.int32)
    cells = forms.cells(ids)
    targets %= config.head_rows  # the rows of the head
    weights = (segments > 1).astype(np.float32)
    mesh = sharding.make_mesh(shape, jax.devices()[: np.prod(shape)])
    with jax.set_mesh(mesh):
        model = randomise(jax.jit(lambda: Decoder(config, rngs=nnx.Rngs(0)))())

        def loss(model):
            hidden = model(ids, None, segments, cells)
            rows = model.head_rows
            total, losses = chunked_cross_entropy(
                hidden, rows, targets, weights, chunk=5, operands=model.operands
            )
            return total / weights.sum(), (
                losses,
                model.logits(hidden),
                model.logits(hidden, model.head(4, 15)),
            )

        def decode(model):
            _, keys, values = model.prefill(ids[:, :8], None, cells[:, :8])
            cache = KVCache.empty(config, 8, 2, 9, 4)
            cache = cache.insert(np.arange(8), keys, values, np.full(8, 8, np.int32))
            valid = valid_slots(4, np.int32(0), np.zeros((8, 2), np.int32))
            tokens = np.stack([ids[:, 8], ids[:, 0]], axis=-1)[None]
            positions = np.full(tokens.shape, 8, np.int32)
            return model.decode_step(
                tokens, positions, [cache.prompt()], [cache.output(valid)],
                np.stack([cells[:, 8]] * 2, axis=-1)[None],
            )  # fmt: skip

        results = jax.jit(lambda m: (jax.grad(loss, has_aux=True)(m), decode(m)))(model)
        gradients = results[0][0]
        for leaf, weight in zip(jax.tree.leaves(gradients), jax.tree.leaves(model), strict=True):
            assert leaf.sharding == weight.sharding, (leaf.sharding, weight.sharding)
        return [np.asarray(leaf) for leaf in jax.tree.leaves(results)]


exact = compute((1, 1, 1, 1), CONFIG)
for shape in MESHES:
    for expected, result in zip(exact, compute(shape, CONFIG), strict=True):
        # The gradient of a bias of the keys is rounding error alone.
        atol = 1e-4 * np.abs(expected).max() + 1e-8
        np.testing.assert_allclose(expected, result, rtol=1e-4, atol=atol)
    print(shape, "equal")

if not sys.argv[1:]:
    # Sums in another order round some operands to the next bfloat16 number. So meshes may differ
    # as much as rounding does.
    rounded = dataclasses.replace(CONFIG, products="bfloat16")
    reference = compute((1, 1, 1, 1), rounded)
    for shape in MESHES:
        for number, result in enumerate(compute(shape, rounded)):
            error = np.linalg.norm(reference[number] - exact[number])
            difference = np.linalg.norm(result - reference[number])
            allowed = 1.5 * error + 1e-4 * np.linalg.norm(exact[number])
            assert difference <= allowed, (shape, number, difference, error)
        print(shape, "rounded equal")
