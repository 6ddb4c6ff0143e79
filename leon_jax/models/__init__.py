"""Flax NNX modules."""

from flax import nnx

# Modules are plain pytrees (tree mode), so raw jax.jit, jax.grad and jax.lax.scan apply to them.
nnx.set_graph_mode(False)
nnx.set_graph_updates(False)
