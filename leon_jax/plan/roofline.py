"""Counts the arithmetic and memory traffic of the decoder from its shape.

XLA's own analysis counts the body of a loop once, which is wrong for scanned layers. Only matrix
products and the optimizer's state are counted; for traffic, the operands and results of the
products. Everything else would only add time, so the results are lower bounds.

Letters: E embed, K width of all keys, F mlp, V vocab, T length.
"""

import dataclasses

from leon_jax.engine.kv_cache import CacheDtype
from leon_jax.models.decoder_config import DecoderConfig
from leon_jax.models.weight_conversion import WeightType
from leon_jax.ops.attention import BLOCKS


@dataclasses.dataclass(frozen=True)
class Work:
    """The least work of a program, of one device or of all devices.

    Attributes:
      flops: executed floating-point operations.
      hbm_bytes: bytes read from and written to device memory.
    """

    flops: float
    hbm_bytes: float


def training_flops(config: DecoderConfig, length: int) -> float:
    """Returns the executed operations per token of a training step, with recomputation.

    In addition to `DecoderConfig.flops_per_token` it counts
      - scores that flash attention recomputes in its backward pass (1 product more for 4);
      - the masked half of the score blocks on the diagonal;
      - what the remat policy recomputes.
    """
    weights = config.product_weights()
    block = next((size for size in BLOCKS if length % size == 0), 0)
    # Two forward products, QK^T and AV, at half of T^2 each, and the diagonal blocks.
    forward = 2 * config.layers * (length + block) * config.embed
    attention = forward * (1 + 2.5 + (config.remat in ("dots", "full")))
    # The last product of a layer is never recomputed, since only the next layer reads its result.
    recomputed = weights - config.layers * config.mlp * config.embed if _recomputes(config) else 0
    return 2 * (3 * weights + recomputed) + attention + 6 * config.head_rows * config.embed


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
    """Returns one device's work in a training step.

    Args:
      config: the model.
      length: tokens in a row.
      tokens: tokens per device in all microbatches; `tensor` devices share the same tokens.
      state_bytes: bytes of parameters and optimizer state on the device.
      fsdp, tensor: sizes of these mesh axes.
      microbatches: number of microbatches; each gathers and reads all weights.
      loss_chunk: tokens per chunk of the loss; each chunk reads and writes the table's gradient.
    """
    flops = training_flops(config, length) * tokens / tensor
    # The optimizer reads and writes its state, and gradients as large as the parameters (a third).
    traffic = state_bytes * (2 + 2 / 3)
    weights = config.product_weights()
    recomputes = _recomputes(config)
    # bfloat16 weights are read by each forward pass and by one of the two backward products. With
    # FSDP a gather writes them once for the forward and once for the backward pass.
    traffic += 2 * weights / tensor * (2 + recomputes + (2 if fsdp > 1 else 0)) * microbatches
    # Operands and results per token: queries and output 2 E each, keys and values E + K each, each
    # product of the MLP E + F, of which the last is not recomputed.
    mlp_products = 3 if config.form.mlp == "swiglu" else 2
    forward_operands = 6 * config.embed + 2 * _key_width(config)
    forward_operands += mlp_products * (config.embed + config.mlp)
    operands = 3 * forward_operands + recomputes * (forward_operands - config.embed - config.mlp)
    # Logits are written and read in float32, their gradients in bfloat16 by two products.
    logits = (2 * 4 + 3 * 2) * config.head_rows / tensor
    logits += 2 * 4 * config.head_rows * config.embed / tensor / loss_chunk
    return Work(flops, traffic + tokens * (2 * config.layers * operands / tensor + logits))


def prefill_work(config: DecoderConfig, length: float, rows: float, tensor: int) -> Work:
    """Returns one device's work in a prefill.

    Args:
      config: the model.
      length: tokens in a prompt with padding.
      rows: rows per device, over all streams.
      tensor: size of this mesh axis.
    """
    weights, tokens = config.product_weights(), rows * length
    flops = 2 * weights * tokens + 2 * config.layers * length * config.embed * tokens
    cache = 2 * config.layers * _key_width(config) * tokens
    return Work(flops / tensor, _width(config) * (weights + cache) / tensor)


def decode_work(
    config: DecoderConfig,
    slots: float,
    ids: int,
    rows: float,
    tensor: int,
    weights: WeightType | None = None,
    cache_dtype: CacheDtype = "compute",
) -> Work:
    """Returns one device's work in a decode step.

    Args:
      config: the model.
      slots: cache slots of a row, all of which are read; the mean over streams.
      ids: number of ids that may follow; each device holds the rows of the table that score them.
      rows: rows per device, over all streams.
      tensor: size of this mesh axis.
      weights: dtype of the layers' weights; None is the compute dtype.
      cache_dtype: dtype of the cache.
    """
    layers, head = config.product_weights(), ids * config.embed
    attention = 4 * config.layers * slots * config.embed
    cache = 2 * config.layers * _key_width(config) * slots
    flops = rows * ((2 * layers + attention) / tensor + 2 * head)
    width = {None: _width(config), "float32": 4, "bfloat16": 2, "int8": 1}[weights]
    # An int8 cache also has a scale of four bytes for each head's key and value.
    cache_width = 1 + 4 / config.head_dim if cache_dtype == "int8" else _width(config)
    traffic = (width * layers + cache_width * rows * cache) / tensor
    return Work(flops, traffic + _width(config) * head)


def _key_width(config: DecoderConfig) -> int:
    """Returns the width of the keys of all heads, which is that of the values, too."""
    return config.key_heads * config.head_dim


def _width(config: DecoderConfig) -> int:
    """Returns the bytes of a weight in the compute dtype."""
    return 2 if config.dtype == "bfloat16" else 4


def _recomputes(config: DecoderConfig) -> bool:
    """Returns whether the backward pass recomputes products with weights."""
    return config.remat in ("attention", "full")
