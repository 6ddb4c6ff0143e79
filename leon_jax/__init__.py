"""leon_jax: an open CM3Leon in JAX. One transformer reads and writes text and images."""

__version__ = "0.1.0"
