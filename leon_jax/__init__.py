"""leon_jax: the open CM3Leon, one transformer that reads and writes text and images."""

from flax import nnx

# Modules are plain pytrees (tree mode), so raw jax.jit, jax.grad and jax.lax.scan apply to them.
nnx.set_graph_mode(False)
nnx.set_graph_updates(False)

__version__ = "0.1.0"
