"""The decoder's loss and its gradient, in parts if memory asks for it.

Functions of shapes and settings alone: they read no file.

Axes: b batch, t length, n microbatches.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from leon_jax.models.decoder import Decoder
from leon_jax.ops.cross_entropy import chunked_cross_entropy
from leon_jax.sharding import spec
from leon_jax.train.decoder_config import DecoderTraining
from leon_jax.vocabulary import Vocabulary

# What a batch holds; see `leon_jax.data.pipeline.make`.
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
    """The gradient of a batch's loss, and the metrics of `batch_loss`.

    With several microbatches one is in memory at a time. Parts are divided by the weights of the
    whole batch, so they add up to exactly the gradient of the whole, however unevenly weights fall
    on them.

    Args:
      config: gives the vocabulary, `loss_chunk`, `z_loss` and `microbatches`.
      model: the decoder.
      batch: see `leon_jax.data.pipeline.make`; its rows are a multiple of the microbatches.

    Returns:
      A tree like `model`, and float32 scalars by name.
    """
    differentiate = jax.grad(
        functools.partial(
            batch_loss,
            vocabulary=config.vocabulary,
            chunk=config.loss_chunk,
            z_loss=config.z_loss,
        ),
        has_aux=True,
    )
    count = config.microbatches
    if count == 1:
        return differentiate(model, batch)
    totals = loss_totals(batch, config.vocabulary)

    def split(array):
        # Neighbouring rows go to different parts, so that every device keeps the rows it has.
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
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Weighted mean cross-entropy in nats a token, and metrics.

    Args:
      model: the decoder.
      batch: see `leon_jax.data.pipeline.make`.
      totals: what to divide by, `loss_totals` of the whole batch of which `batch` is a part; then
        results of the parts add up to those of the whole. None: the batch is whole.
      vocabulary: tells text from image tokens.
      chunk, z_loss: see `chunked_cross_entropy`. Metrics leave the z-loss in.

    Returns:
      The loss; `loss`, `loss_text`, `loss_image` (means over the targets of that kind, 0 where a
      batch has none) and `tokens` (targets that are no padding).
    """
    batch = {name: jax.reshard(array, spec("batch", "length")) for name, array in batch.items()}
    totals = loss_totals(batch, vocabulary) if totals is None else totals
    hidden = model(batch["ids"], batch["positions"], batch["segment_ids"])
    total, losses = chunked_cross_entropy(
        hidden, model.table[...], batch["targets"], batch["weights"], chunk=chunk, z_loss=z_loss
    )
    metrics = {
        name: jnp.where(chosen, losses, 0).sum() / jnp.maximum(totals[name], 1e-6)
        for name, chosen in _kinds(batch, vocabulary).items()
    }
    tokens = (batch["segment_ids"] > 0).sum().astype(jnp.float32)
    loss = total / jnp.maximum(totals["loss"], 1e-6)
    return loss, {**metrics, "loss": loss, "tokens": tokens}


def loss_totals(batch: dict[str, Array], vocabulary: Vocabulary) -> dict[str, Float[Array, ""]]:
    """The weights of a batch's targets, summed by kind: `loss` (all), `loss_text`, `loss_image`."""
    return {
        name: jnp.where(chosen, batch["weights"], 0).sum()
        for name, chosen in _kinds(batch, vocabulary).items()
    }


def _kinds(batch, vocabulary):
    targets = batch["targets"]
    return {
        "loss": batch["weights"] > 0,
        "loss_text": vocabulary.is_text(targets),
        "loss_image": vocabulary.is_image(targets),
    }
