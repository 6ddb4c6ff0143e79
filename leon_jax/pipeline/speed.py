"""Measures how fast this machine trains, to estimate how long a pipeline takes."""

import time

import jax
import jax.numpy as jnp

# Seconds that `_layer` takes on the machine on which the durations of configs/own.py were measured:
# two cores of an AMD EPYC with AVX512-BF16.
REFERENCE_SECONDS = 0.023
# Images, side in pixels and channels, as in the largest layers of the small image tokenizer.
_IMAGES, _SIDE, _CHANNELS = 16, 64, 32


def relative_speed() -> float:
    """Returns the speed of all local devices, relative to the reference machine.

    The sample is a convolution and its gradient. The products alone would mislead, because much
    of a training step on a CPU is limited by the memory.
    """
    images = jnp.ones((_IMAGES, _SIDE, _SIDE, _CHANNELS), jnp.float32)
    kernel = jnp.ones((3, 3, _CHANNELS, _CHANNELS), jnp.float32)
    jax.block_until_ready(_layer(images, kernel))
    best = min(_seconds(images, kernel) for _ in range(8))
    return REFERENCE_SECONDS / best * jax.local_device_count()


@jax.jit
def _layer(images: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients of a convolution with an activation, [n, h, w, c] and [3, 3, c, c]."""

    def loss(images: jax.Array, kernel: jax.Array) -> jax.Array:
        numbers = ("NHWC", "HWIO", "NHWC")
        result = jax.lax.conv_general_dilated(
            images, kernel, (1, 1), "SAME", dimension_numbers=numbers
        )
        return jax.nn.silu(result).sum()

    return jax.grad(loss, argnums=(0, 1))(images, kernel)


def _seconds(images: jax.Array, kernel: jax.Array) -> float:
    start = time.perf_counter()
    jax.block_until_ready(_layer(images, kernel))
    return time.perf_counter() - start
