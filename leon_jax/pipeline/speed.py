"""Measures how fast this machine multiplies matrices, to estimate how long a pipeline takes."""

import time

import jax
import jax.numpy as jnp

# Speed of the machine on which the durations of configs/own.py were measured.
REFERENCE_GFLOPS = 290.0
_SIDE = 1024


def relative_speed() -> float:
    """Returns the speed of all local devices, relative to the reference machine."""
    matrix = jnp.ones((_SIDE, _SIDE), jnp.float32)
    multiply = jax.jit(jnp.dot)
    multiply(matrix, matrix).block_until_ready()
    best = min(_seconds(multiply, matrix) for _ in range(5))
    gflops = 2 * _SIDE**3 / best / 1e9
    return gflops * jax.local_device_count() / REFERENCE_GFLOPS


def _seconds(multiply, matrix: jax.Array) -> float:
    start = time.perf_counter()
    multiply(matrix, matrix).block_until_ready()
    return time.perf_counter() - start
