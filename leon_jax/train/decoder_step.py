"""One update of the decoder: loss, gradient (in parts, if memory asks for it), optimizer.

A function of shapes and settings alone: it reads no file, so `leon_jax.plan.train` compiles it for
chips that are not there.

Axes: b batch, t length, n microbatches.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float

from leon_jax.models.decoder import Decoder, DecoderConfig
from leon_jax.ops.cross_entropy import chunked_cross_entropy
from leon_jax.sharding import spec
from leon_jax.train import optimizer
from leon_jax.train.decoder_config import DecoderTraining
from leon_jax.train.state import TrainState
from leon_jax.vocabulary import Vocabulary

# What a batch holds; see `leon_jax.data.pipeline.make`.
BATCH_DTYPES = {
    "ids": jnp.int32,
    "targets": jnp.int32,
    "segment_ids": jnp.int32,
    "positions": jnp.int32,
    "weights": jnp.float32,
}


def new_state(
    config: DecoderConfig,
    transformation: optax.GradientTransformation,
    model_key: jax.Array,
    run_key: jax.Array,
) -> TrainState:
    """A model with fresh weights and the optimizer's state for it; pure."""
    model = Decoder(config, rngs=nnx.Rngs(model_key))
    return TrainState(jnp.zeros((), jnp.int32), model, transformation.init(model), run_key)


def uneven(config: DecoderTraining, mesh: Sequence[int], microbatches: int) -> str:
    """What a mesh of (data, fsdp, context, tensor) cannot split evenly; "" if nothing."""
    data, fsdp, context, tensor = mesh
    model = config.model
    for name, size, parts, what in (
        ("batch_size", config.batch_size, data * fsdp * microbatches, "data x fsdp x microbatches"),
        ("data.length", config.data.length, context, "context"),
        ("model.embed", model.embed, fsdp, "fsdp"),
        ("model.heads", model.heads, tensor, "tensor"),
        ("model.mlp", model.mlp, tensor, "tensor"),
        ("model.vocab_size", model.vocab_size, tensor, "tensor"),
    ):
        if size % parts:
            return f"config.{name} is {size}; it must be a multiple of {what}, {parts}"
    return ""


def update(
    config: DecoderTraining,
    transformation: optax.GradientTransformation,
    state: TrainState,
    batch: dict[str, Array],
) -> tuple[TrainState, dict[str, Array]]:
    """The state after one batch, and metrics: those of `batch_loss`, `gradient_norm` and
    `learning_rate`.

    Args:
      config: see there.
      transformation: `optimizer.make(config.optimizer)`.
      state: its model is a `Decoder`.
      batch: see `leon_jax.data.pipeline.make`.
    """
    loss = functools.partial(
        batch_loss, vocabulary=config.vocabulary, chunk=config.loss_chunk, z_loss=config.z_loss
    )
    gradients, metrics = _gradients(loss, state.model, batch, config.microbatches)
    updates, opt_state = transformation.update(gradients, state.opt_state, state.model)
    model = optax.apply_updates(state.model, updates)
    metrics["gradient_norm"] = optax.tree.norm(gradients)
    metrics["learning_rate"] = optimizer.learning_rate(config.optimizer)(state.step)
    return TrainState(state.step + 1, model, opt_state, state.key), metrics


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
      vocabulary: tells text from picture tokens.
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


def _gradients(loss, model, batch, microbatches):
    """(gradients, metrics); with several microbatches one is in memory at a time.

    Parts are divided by the weights of the whole batch, so they add up to exactly the gradient of
    the whole, however unevenly weights fall on them.
    """
    differentiate = jax.grad(loss, has_aux=True)
    if microbatches == 1:
        return differentiate(model, batch)
    totals = loss_totals(batch, loss.keywords["vocabulary"])

    def cut(array):
        # Neighbouring rows go to different parts, so that every device keeps the rows it has.
        rows, length = array.shape
        parts = array.reshape(
            rows // microbatches,
            microbatches,
            length,
            out_sharding=jax.P(jax.typeof(array).sharding.spec[0], None, None),
        )
        return jnp.swapaxes(parts, 0, 1)

    def add(sums, part):
        return jax.tree.map(jnp.add, sums, differentiate(model, part, totals)), None

    parts = jax.tree.map(cut, batch)
    first = jax.tree.map(lambda array: array[0], parts)
    shapes = jax.eval_shape(differentiate, model, first, totals)
    zeros = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, out_sharding=leaf.sharding), shapes
    )
    return jax.lax.scan(add, zeros, parts)[0]
