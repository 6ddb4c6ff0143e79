"""Flax NNX modules. They read and write no files.

Every file of leon_jax that imports flax also imports this package, so that flax's mode is set
before a module is created.
"""

import flax

# Modules are plain pytrees (tree mode), so raw jax.jit, jax.grad and jax.lax.scan apply to them.
# `nnx.set_graph_mode` would set the mode only for the importing thread.
flax.config.update("nnx_graph_mode", False)
flax.config.update("nnx_graph_updates", False)
