"""The model shapes of the training and decoding benchmarks."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Shape:
    """The shape of a decoder and of a batch.

    Attributes:
      vocab, embed, layers, heads, mlp: as in `leon_jax.models.decoder.DecoderConfig`.
      length: tokens in a row.
      batch: rows of a batch on a CPU.
    """

    vocab: int
    embed: int
    layers: int
    heads: int
    mlp: int
    length: int
    batch: int


SHAPES = {
    "tiny": Shape(4096, 64, 2, 4, 256, 128, 2),  # for a quick check
    "10m": Shape(16384, 256, 8, 4, 1024, 1024, 8),
    "125m": Shape(50272, 768, 12, 12, 3072, 1024, 2),  # OPT-125m
}
# AdamW settings of both sides.
OPTIMIZER = {
    "learning_rate": 1e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1,
    "clip_norm": 1.0,
}  # fmt: skip
