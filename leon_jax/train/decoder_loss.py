"""Computes the decoder's loss and its gradient, optionally accumulated over microbatches.

These functions read no file, so `leon plan` can compile them.

Axes: b batch, t length, n microbatches.
"""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from leon_jax.models.decoder import Decoder
from leon_jax.ops.cross_entropy import chunked_cross_entropy
from leon_jax.ops.rotary import image_cells
from leon_jax.sharding import spec
from leon_jax.train.decoder_config import DecoderTraining
from leon_jax.vocabulary import Vocabulary

# The arrays of a batch; see `leon_jax.data.pipeline.make`.
BATCH_DTYPES = {
    "ids": jnp.int32,
    "targets": jnp.int32,
    "segment_ids": jnp.int32,
    "positions": jnp.int32,
    "weights": jnp.float32,
}


def gradients(
    config: DecoderTraining, model: Decoder, batch: dict[str, Array]
) -> tuple[Decoder, dict[str, Float[Array, ""]]]:
    """Returns the gradient of a batch's loss, and the metrics of `batch_loss`.

    With several microbatches, one is in memory at a time. Each part's loss is divided by the total
    weight of the whole batch, so the sum of the gradients is exactly the batch's gradient even if
    the parts have different weights.

    Args:
      config: the vocabulary, `loss_chunk`, `z_loss`, `head_exchange` and `microbatches` are used.
      model: the decoder.
      batch: see `leon_jax.data.pipeline.make`; its rows are a multiple of `microbatches`.

    Returns:
      A tree like `model`, and float32 scalars by name.
    """
    differentiate = jax.grad(
        functools.partial(
            batch_loss,
            vocabulary=config.vocabulary,
            chunk=config.loss_chunk,
            z_loss=config.z_loss,
            exchange=config.head_exchange,
        ),
        has_aux=True,
    )
    count = config.microbatches
    if count == 1:
        return differentiate(model, batch)
    totals = loss_totals(batch, config.vocabulary)

    def split(array):
        # Consecutive rows go to different parts, so that no row moves to another device.
        rows, length = array.shape
        parts = array.reshape(
            rows // count,
            count,
            length,
            out_sharding=jax.P(jax.typeof(array).sharding.spec[0], None, None),
        )
        return jnp.swapaxes(parts, 0, 1)

    def add(sums, part):
        return jax.tree.map(jnp.add, sums, differentiate(model, part, totals)), None

    parts = jax.tree.map(split, batch)
    first = jax.tree.map(lambda array: array[0], parts)
    shapes = jax.eval_shape(differentiate, model, first, totals)
    zeros = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, out_sharding=leaf.sharding), shapes
    )
    return jax.lax.scan(add, zeros, parts)[0]


def batch_loss(
    model: Decoder,
    batch: dict[str, Array],
    totals: dict[str, Float[Array, ""]] | None = None,
    *,
    vocabulary: Vocabulary,
    chunk: int,
    z_loss: float = 0.0,
    exchange: DTypeLike = "float32",
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Returns the weighted mean cross-entropy in nats per token, and metrics.

    Args:
      model: the decoder.
      batch: see `leon_jax.data.pipeline.make`.
      totals: the divisors, `loss_totals` of the whole batch if `batch` is a microbatch. Then the
        losses and metrics of the microbatches add up to those of the whole batch. None if `batch`
        is the whole batch.
      vocabulary: separates text tokens from image tokens.
      chunk, z_loss, exchange: see `chunked_cross_entropy`. Metrics include the z-loss.

    Returns:
      The loss, and the metrics `loss`, `loss_text` and `loss_image` (means over the targets of
      that kind; 0 if there are none) and `tokens` (number of targets without padding).
    """
    batch = {name: jax.reshard(array, spec("batch", "length")) for name, array in batch.items()}
    totals = loss_totals(batch, vocabulary) if totals is None else totals
    total, losses = _token_losses(model, batch, vocabulary, chunk, z_loss, exchange)
    metrics = {
        name: jnp.where(mask, losses, 0).sum() / jnp.maximum(totals[name], 1e-6)
        for name, mask in _target_masks(batch, vocabulary).items()
    }
    tokens = (batch["segment_ids"] > 0).sum().astype(jnp.float32)
    loss = total / jnp.maximum(totals["loss"], 1e-6)
    return loss, {**metrics, "loss": loss, "tokens": tokens}


def query_losses(
    model: Decoder, batch: dict[str, Array], *, vocabulary: Vocabulary, chunk: int
) -> dict[str, Float[Array, "b"]]:
    """Returns `image_loss` and `text_loss`: sums of weighted cross-entropies, in nats, by row.

    Args:
      model: the decoder.
      batch: see `leon_jax.data.pipeline.make`.
      vocabulary: separates text tokens from image tokens.
      chunk: see `chunked_cross_entropy`.
    """
    batch = {name: jax.reshard(array, spec("batch", "length")) for name, array in batch.items()}
    _, losses = _token_losses(model, batch, vocabulary, chunk)
    masks = _target_masks(batch, vocabulary)
    return {
        "image_loss": jnp.where(masks["loss_image"], losses, 0).sum(1),
        "text_loss": jnp.where(masks["loss_text"], losses, 0).sum(1),
    }


def _token_losses(
    model: Decoder,
    batch: dict[str, Array],
    vocabulary: Vocabulary,
    chunk: int,
    z_loss: float = 0.0,
    exchange: DTypeLike = "float32",
) -> tuple[Float[Array, ""], Float[Array, "b t"]]:
    """Returns the weighted cross-entropy: its sum, and the term of each target."""
    cells = None
    if model.config.form.positions == "rotary_2d":
        cells = image_cells(vocabulary.is_image(batch["ids"]))
    hidden = model(batch["ids"], batch["positions"], batch["segment_ids"], cells)
    return chunked_cross_entropy(
        hidden,
        model.head_rows,
        batch["targets"],
        batch["weights"],
        chunk=chunk,
        z_loss=z_loss,
        operands=model.operands,
        exchange=exchange,
    )


def loss_totals(batch: dict[str, Array], vocabulary: Vocabulary) -> dict[str, Float[Array, ""]]:
    """Returns the total weight of a batch's targets: `loss` (all), `loss_text`, `loss_image`."""
    return {
        name: jnp.where(mask, batch["weights"], 0).sum()
        for name, mask in _target_masks(batch, vocabulary).items()
    }


def _target_masks(batch, vocabulary):
    targets = batch["targets"]
    return {
        "loss": batch["weights"] > 0,
        "loss_text": vocabulary.is_text(targets),
        "loss_image": vocabulary.is_image(targets),
    }
