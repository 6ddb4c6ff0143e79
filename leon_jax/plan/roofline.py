"""Arithmetic and memory traffic of the decoder, counted from its shape.

XLA's own count takes the body of a loop once, so it cannot be used for layers that are scanned.
Only matrix products are counted (their operands and results, for traffic), and the optimizer's
state: what is left out makes a step slower, so a bound stays a bound.

Letters: E embed, F mlp, V vocab, T length.
"""

import dataclasses

from leon_jax.engine.kv_cache import CacheDtype
from leon_jax.models.decoder import DecoderConfig
from leon_jax.models.inference_weights import WeightType
from leon_jax.ops.attention import BLOCKS


@dataclasses.dataclass(frozen=True)
class Work:
    """What a program must at least do; sums over all devices or one device's part.

    Attributes:
      flops: operations that are executed.
      hbm_bytes: bytes read from and written to device memory.
    """

    flops: float
    hbm_bytes: float


def training_flops(config: DecoderConfig, length: int) -> float:
    """Operations executed for a token of a training step, those computed again included.

    `DecoderConfig.flops_per_token` is what a step needs; beyond it are
      - scores, computed again by flash attention's backward pass (1 of 4 products more);
      - blocks of scores on the diagonal, half of which is masked;
      - what the remat policy gives up.
    """
    weights = _layer_weights(config)
    block = next((size for size in BLOCKS if length % size == 0), 0)
    # Two products forward, QK^T and AV, at half of T^2 each, and what the diagonal adds.
    forward = 2 * config.layers * (length + block) * config.embed
    attention = forward * (1 + 2.5 + (config.remat in ("dots", "full")))
    # The last product of a layer is never needed again: nothing but the next layer reads it.
    again = weights - config.layers * config.mlp * config.embed if _recomputes(config) else 0
    return 2 * (3 * weights + again) + attention + 6 * config.vocab_size * config.embed


def training_work(
    config: DecoderConfig,
    length: int,
    tokens: int,
    state_bytes: float,
    fsdp: int,
    tensor: int,
    microbatches: int = 1,
    loss_chunk: int = 2048,
) -> Work:
    """One device's part of a training step.

    Args:
      config: the model.
      length: tokens of a row.
      tokens: of a device, all microbatches together; `tensor` devices share them.
      state_bytes: parameters and optimizer state that the device holds.
      fsdp, tensor: sizes of these mesh axes.
      microbatches: each gathers and reads the weights anew.
      loss_chunk: tokens after which the gradient of the table is read and written.
    """
    flops = training_flops(config, length) * tokens / tensor
    # Read and written by the optimizer, and gradients as large as parameters (a third of it).
    traffic = state_bytes * (2 + 2 / 3)
    weights = _layer_weights(config)
    again = _recomputes(config)
    # bfloat16 weights: read by each forward pass and for one of the two products backward; a gather
    # writes them once for the forward and once for the backward pass.
    traffic += 2 * weights / tensor * (2 + again + (2 if fsdp > 1 else 0)) * microbatches
    # Operands and results of a token: queries, keys, values and output 2 E each, MLP E + F twice,
    # of which the second is not computed again.
    once = 10 * config.embed + 2 * config.mlp
    operands = 3 * once + again * (once - config.embed - config.mlp)
    # Logits are written and read in float32, their slopes in bfloat16 by two products.
    logits = (2 * 4 + 3 * 2) * config.vocab_size / tensor
    logits += 2 * 4 * config.vocab_size * config.embed / tensor / loss_chunk
    return Work(flops, traffic + tokens * (2 * config.layers * operands / tensor + logits))


def prefill_work(config: DecoderConfig, length: float, rows: float, tensor: int) -> Work:
    """One device's part of reading prompts of `length` tokens.

    Args:
      config: the model.
      length: of a prompt, padding included.
      rows: of a device, streams included.
      tensor: size of this mesh axis.
    """
    weights, tokens = _layer_weights(config), rows * length
    flops = 2 * weights * tokens + 2 * config.layers * length * config.embed * tokens
    cache = 2 * config.layers * config.embed * tokens
    return Work(flops / tensor, _width(config) * (weights + cache) / tensor)


def decode_work(
    config: DecoderConfig,
    slots: float,
    ids: int,
    rows: float,
    tensor: int,
    weights: WeightType | None = None,
    kept: CacheDtype = "compute",
) -> Work:
    """One device's part of writing one more token in each row.

    Args:
      config: the model.
      slots: of the cache, all of which are read; of several streams, on average.
      ids: how many may follow; every device holds the rows of the table that score them.
      rows: of a device, streams included.
      tensor: size of this mesh axis.
      weights: what the layers' weights are kept in; None: the compute dtype.
      kept: what the cache is kept in.
    """
    layers, head = _layer_weights(config), ids * config.embed
    attention = 4 * config.layers * slots * config.embed
    cache = 2 * config.layers * config.embed * slots
    flops = rows * ((2 * layers + attention) / tensor + 2 * head)
    width = {None: _width(config), "float32": 4, "bfloat16": 2, "int8": 1}[weights]
    # In 8 bits a scale of four bytes stands beside each key and value of a head.
    cached = 1 + 4 / config.head_dim if kept == "int8" else _width(config)
    read = (width * layers + cached * rows * cache) / tensor
    return Work(flops, read + _width(config) * head)


def _layer_weights(config: DecoderConfig) -> int:
    """Weights of all layers."""
    return config.layers * (4 * config.embed**2 + 2 * config.embed * config.mlp)


def _width(config: DecoderConfig) -> int:
    """Bytes of a weight as products read it."""
    return 2 if config.dtype == "bfloat16" else 4


def _recomputes(config: DecoderConfig) -> bool:
    """Whether products with weights are computed again in the backward pass."""
    return config.remat in ("attention", "full")
