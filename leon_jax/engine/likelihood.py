"""Computes log-likelihoods of token sequences in one forward pass, without a KV cache."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from leon_jax import sharding
from leon_jax.config import UserError
from leon_jax.engine.decode_loop import PaddedPrompts, round_up_rows
from leon_jax.engine.engine import Engine
from leon_jax.models.decoder import Decoder
from leon_jax.ops.cross_entropy import chunked_cross_entropy


def log_likelihoods(
    engine: Engine,
    sequences: Sequence[np.ndarray],
    weights: Sequence[np.ndarray] | None = None,
) -> np.ndarray:
    """Returns the weighted log-likelihood of each sequence, in nats.

    Args:
      engine: the engine with the decoder. At most `engine.slots` sequences are scored at once.
      sequences: int[n] ids each.
      weights: float[n] each. Entry t multiplies log p(ids[t] | ids[:t]). Entry 0 is not used,
        because nothing predicts the first id. None: 1 everywhere.

    Returns:
      float32[len(sequences)].

    Raises:
      UserError: a sequence is longer than the context.
      ValueError: a sequence is empty.
    """
    for sequence in sequences:
        check_sequence(engine, sequence)
    scores = [np.zeros(0, np.float32)]
    with jax.set_mesh(engine.mesh):
        for start in range(0, len(sequences), engine.slots):
            part = slice(start, start + engine.slots)
            part_weights = None if weights is None else weights[part]
            scores.append(_score_batch(engine, sequences[part], part_weights))
    return np.concatenate(scores)


def check_sequence(engine: Engine, ids: np.ndarray) -> None:
    """Checks that `log_likelihoods` can score a sequence.

    Args:
      engine: the engine with the decoder.
      ids: the sequence, int[n].

    Raises:
      UserError, ValueError: see `log_likelihoods`.
    """
    if not len(ids):
        raise ValueError("a sequence is empty; it must hold at least one id")
    if (extent := engine.extent(ids)) > engine.context:
        raise UserError(
            f"a sequence of {extent} positions is longer than the model's context, {engine.context}"
        )


def _score_batch(
    engine: Engine, sequences: Sequence[np.ndarray], weights: Sequence[np.ndarray] | None
) -> np.ndarray:
    """Returns the scores of 1 to `engine.slots` sequences; see `log_likelihoods`."""
    # The batch is padded to a power of two, so that few programs are compiled.
    rows = round_up_rows(1 << (len(sequences) - 1).bit_length())
    padded = [*sequences, *[sequences[-1]] * (rows - len(sequences))]
    prompts = engine.pad(padded)
    ids = prompts.ids
    # The hidden state at t predicts id t + 1.
    targets = np.zeros(ids.shape, np.int32)
    table = np.zeros(ids.shape, np.float32)
    for row, sequence in enumerate(sequences):
        targets[row, : len(sequence) - 1] = sequence[1:]
        table[row, : len(sequence) - 1] = 1 if weights is None else weights[row][1:]
    targets, table = (jax.device_put(array, ids.sharding) for array in (targets, table))
    scores = sharding.fetch(_score(engine.decoder, prompts, targets, table))
    return scores[: len(sequences)]


@jax.jit
def _score(
    decoder: Decoder,
    sequences: PaddedPrompts,
    targets: Int[Array, "batch length"],
    weights: Float[Array, "batch length"],
) -> Float[Array, "batch"]:
    """Returns the sum over t of weights[:, t] log p(targets[:, t] | ids[:, :t + 1])."""
    hidden = decoder(sequences.ids, sequences.positions, cells=sequences.cells)
    first, stop = decoder.config.head_ids
    # An id that the head has no row for is never predicted, so it is not scored.
    weights = jnp.where((targets >= first) & (targets < stop), weights, 0)
    rows = jnp.clip(targets - first, 0, stop - first - 1)
    _, losses = chunked_cross_entropy(hidden, decoder.head_rows, rows, weights)
    return -losses.sum(axis=1)
