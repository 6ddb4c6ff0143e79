"""Run by test_attention.py in a process of its own: splash attention, interpreted, on meshes."""

import functools
import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np

from leon_jax import sharding
from leon_jax.ops.attention import splash, xla
from leon_jax.sharding import spec

MESHES = [(2, 1, 2, 2), (1, 1, 4, 2)]

rng = np.random.default_rng(0)
inputs = [rng.normal(size=(2, 512, 2, 64)).astype(np.float32) for _ in range(4)]
segments = np.repeat([[1] * 200 + [2] * 300 + [0] * 12], 2, axis=0).astype(np.int32)


def compute(implementation, shape):
    """(attention, its gradients) of the same arrays, laid out over a mesh."""
    with jax.set_mesh(sharding.make_mesh(shape, jax.devices()[: np.prod(shape)])):
        *arrays, pull = (
            jax.device_put(x, spec("batch", "length", "heads", "head_dim")) for x in inputs
        )
        own = jax.device_put(segments, spec("batch", "length"))

        def pulled(q, k, v):
            attended = implementation(q, k, v, segment_ids=own)
            return (attended * pull).sum(), attended

        (_, attended), gradients = jax.jit(jax.value_and_grad(pulled, (0, 1, 2), has_aux=True))(
            *arrays
        )
        assert attended.sharding == arrays[0].sharding, attended.sharding
        return [np.asarray(x) for x in (attended, *gradients)]


reference = compute(xla, (1, 1, 1, 1))
for shape in MESHES:
    found = compute(functools.partial(splash, interpret=True), shape)
    for one, other in zip(reference, found, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-4)
    print(shape, "equal")
