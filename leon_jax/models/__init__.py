"""Flax NNX modules, without input or output.

Every file of leon_jax that imports flax also imports this package, so that flax's mode is set
before a module is made.
"""

import flax

# Modules are plain pytrees (tree mode), so raw jax.jit, jax.grad and jax.lax.scan apply to them.
# `nnx.set_graph_mode` would set it for the importing thread alone.
flax.config.update("nnx_graph_mode", False)
flax.config.update("nnx_graph_updates", False)
