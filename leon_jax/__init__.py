"""leon_jax: the open CM3Leon, one transformer that reads and writes text and images."""

__version__ = "0.1.0"
