"""Splash attention, interpreted, on meshes; test_attention.py runs this in a separate process."""

import functools

import jax
import numpy as np

from leon_jax import sharding
from leon_jax.ops.attention import splash, xla
from leon_jax.sharding import spec

MESHES = [(2, 1, 2, 2), (1, 1, 4, 2)]

rng = np.random.default_rng(0)
# Four heads of queries and of the cotangent, two of keys and values.
inputs = [rng.normal(size=(2, 512, heads, 64)).astype(np.float32) for heads in (4, 2, 2, 4)]
segments = np.repeat([[1] * 200 + [2] * 300 + [0] * 12], 2, axis=0).astype(np.int32)


def compute(implementation, shape):
    """Returns the attention of the same arrays on a mesh, and its gradients."""
    with jax.set_mesh(sharding.make_mesh(shape, jax.devices()[: np.prod(shape)])):
        *arrays, cotangent = (
            jax.device_put(x, spec("batch", "length", "heads", "head_dim")) for x in inputs
        )
        segment_ids = jax.device_put(segments, spec("batch", "length"))

        def loss(q, k, v):
            attended = implementation(q, k, v, segment_ids=segment_ids)
            return (attended * cotangent).sum(), attended

        (_, attended), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(
            *arrays
        )
        assert attended.sharding == arrays[0].sharding, attended.sharding
        return [np.asarray(x) for x in (attended, *gradients)]


reference = compute(xla, (1, 1, 1, 1))
for shape in MESHES:
    results = compute(functools.partial(splash, interpret=True), shape)
    for expected, result in zip(reference, results, strict=True):
        np.testing.assert_allclose(expected, result, atol=2e-4)
    print(shape, "equal")
