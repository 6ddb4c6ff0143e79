"""The engine: prompts in, ids out, in one compiled program.

A prompt is one or more streams (conditional, unconditional, ...). All streams of all rows run in
one batch: prefill, then a loop that reads the logits, merges the streams (guidance), samples one id
a row within the grammar, and gives that id to every stream of the row.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from leon_jax import sharding
from leon_jax.config import UserError
from leon_jax.decode.cache import Cache
from leon_jax.decode.grammar import ImageSpan, Span
from leon_jax.decode.guidance import Guidance, Plain
from leon_jax.decode.sampling import Categorical, Sampler
from leon_jax.models.decoder import Decoder
from leon_jax.ops.cross_entropy import chunked_cross_entropy
from leon_jax.vocabulary import Vocabulary

# Far below any logit, yet finite: guidance may subtract two of them.
_FORBIDDEN = -1e30


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One row: its streams (int32[n] each, stream 0 conditional) and the seed of its draws."""

    streams: tuple[np.ndarray, ...]
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Answer:
    """What filled the span.

    Attributes:
      ids: int32[n], without the id that ended the span.
      log_probabilities: float32[n], of each id under stream 0 alone, within the grammar.
      ended: False if a text span was cut by its length limit.
    """

    ids: np.ndarray
    log_probabilities: np.ndarray
    ended: bool


class Engine:
    """Fills spans and scores sequences with one decoder.

    Prompts are padded to one of a few lengths, so that prompts of many lengths share a compiled
    program. A mesh must be set (`jax.set_mesh`).
    """

    def __init__(
        self,
        decoder: Decoder,
        vocabulary: Vocabulary,
        buckets: Sequence[int] | None = None,
    ):
        """Args:
        decoder: the model.
        vocabulary: its id layout.
        buckets: padded prompt lengths; by default 64, 128, 256, ... up to the model's context.
        """
        self.decoder, self.vocabulary = decoder, vocabulary
        self.context = context = decoder.config.max_length
        self._part_step = decoder.config.part_step
        if buckets is None:
            buckets = [64 << i for i in range(32) if 64 << i < context]
        self.buckets = sorted({*(bucket for bucket in buckets if bucket < context), context})

    def fill(
        self,
        prompts: Sequence[Prompt],
        span: Span,
        guidance: Guidance | None = None,
        sampler: Sampler | None = None,
    ) -> list[Answer]:
        """Continues every prompt with one span.

        Args:
          prompts: rows, of any lengths, each with `guidance.streams` streams.
          span: what may be written.
          guidance: how streams are merged; by default the one stream as it is.
          sampler: how an id is drawn; by default from the model's own distribution.

        Returns:
          One answer a row. A row's answer depends on its prompt and seed only, not on the batch.

        Raises:
          UserError: a prompt and the span together are longer than the context.
          ValueError: a prompt is empty or has another number of streams.
        """
        guidance = Plain() if guidance is None else guidance
        sampler = Categorical() if sampler is None else sampler
        if not prompts:
            return []
        for prompt in prompts:
            if len(prompt.streams) != guidance.streams:
                raise ValueError(
                    f"a prompt has {len(prompt.streams)} streams; guidance needs {guidance.streams}"
                )
            longest = max(map(self._extent, prompt.streams))
            if longest + span.limit > self.context:
                raise UserError(
                    f"the prompt of {longest} positions and an answer of up to {span.limit} need "
                    f"{longest + span.limit}; the model's context is {self.context}"
                )
        rows = _whole_rows(len(prompts))
        padded = [*prompts, *[prompts[-1]] * (rows - len(prompts))]
        # Stream-major: all rows of stream 0, then all rows of stream 1, ...
        sequences = [p.streams[s] for s in range(guidance.streams) for p in padded]
        ids, positions, lengths, extents = self._pad(sequences)
        seeds = np.array([prompt.seed % 2**32 for prompt in padded], np.uint32)
        tokens, scores, counts, ended = sharding.fetch(
            _fill(
                self.decoder,
                ids,
                positions,
                lengths,
                extents,
                seeds,
                guidance,
                sampler,
                span,
                self.vocabulary,
            )
        )
        return [
            Answer(tokens[row, : counts[row]], scores[row, : counts[row]], bool(ended[row]))
            for row in range(len(prompts))
        ]

    def score(
        self, sequences: Sequence[np.ndarray], weights: Sequence[np.ndarray] | None = None
    ) -> np.ndarray:
        """Weighted log-likelihood of each sequence, in nats.

        Args:
          sequences: int[n] ids each.
          weights: float[n] each; entry t multiplies log p(ids[t] | ids[:t]). Entry 0 is not used,
            for nothing predicts the first id. By default 1 everywhere.

        Returns:
          float32[rows].

        Raises:
          UserError: a sequence is longer than the context.
        """
        if not len(sequences):
            return np.zeros(0, np.float32)
        if (longest := max(map(self._extent, sequences))) > self.context:
            raise UserError(
                f"a sequence of {longest} positions is longer than the model's context, "
                f"{self.context}"
            )
        rows = _whole_rows(len(sequences))
        padded = [*sequences, *[sequences[-1]] * (rows - len(sequences))]
        ids, positions, _, _ = self._pad(padded)
        # The hidden state at t predicts id t + 1.
        targets = np.zeros(ids.shape, np.int32)
        table = np.zeros(ids.shape, np.float32)
        for row, sequence in enumerate(sequences):
            targets[row, : len(sequence) - 1] = sequence[1:]
            table[row, : len(sequence) - 1] = 1 if weights is None else weights[row][1:]
        targets, table = (jax.device_put(array, ids.sharding) for array in (targets, table))
        scores = sharding.fetch(_score(self.decoder, ids, positions, targets, table))
        return scores[: len(sequences)]

    def _extent(self, ids: np.ndarray) -> int:
        return self.vocabulary.extent(ids, self._part_step)

    def _pad(
        self, sequences: Sequence[np.ndarray]
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Tokens and positions int32[batch, bucket], padded on the right; int32[batch]: how many.

        The last is the position of an id that would follow each sequence.
        """
        lengths = np.array([len(sequence) for sequence in sequences], np.int32)
        if not lengths.all():
            raise ValueError("a prompt is empty; it must hold at least one id")
        bucket = next(bucket for bucket in self.buckets if bucket >= lengths.max())
        ids = np.full((len(sequences), bucket), self.vocabulary.pad, np.int32)
        positions = np.zeros_like(ids)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = sequence
            positions[row, : len(sequence)] = self.vocabulary.positions(sequence, self._part_step)
        extents = np.array([self._extent(sequence) for sequence in sequences], np.int32)
        mesh = jax.sharding.get_mesh()
        wide = jax.NamedSharding(mesh, sharding.spec("batch", "length"))
        narrow = jax.NamedSharding(mesh, sharding.spec("batch"))
        return (
            jax.device_put(ids, wide),
            jax.device_put(positions, wide),
            jax.device_put(lengths, narrow),
            jax.device_put(extents, narrow),
        )


def _whole_rows(rows: int) -> int:
    """`rows` rounded up so that the batch splits evenly over the mesh."""
    shape = jax.sharding.get_mesh().shape
    shards = shape.get("data", 1) * shape.get("fsdp", 1)
    return -(-rows // shards) * shards


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    """What the loop carries; batch = streams x rows."""

    hidden: Float[Array, "batch embed"]
    cache: Cache
    tokens: Int[Array, "rows limit"]
    scores: Float[Array, "rows limit"]
    counts: Int[Array, "rows"]
    done: Bool[Array, "rows"]


@functools.partial(jax.jit, static_argnames=("span", "vocabulary"))
def _fill(
    decoder: Decoder,
    ids: Int[Array, "batch length"],
    positions: Int[Array, "batch length"],
    lengths: Int[Array, "batch"],
    extents: Int[Array, "batch"],
    seeds: Int[Array, "rows"],
    guidance: Guidance,
    sampler: Sampler,
    span: Span,
    vocabulary: Vocabulary,
) -> tuple[Array, Array, Array, Array]:
    """Prefill and loop. Returns tokens, scores [rows, limit], counts and ended [rows]."""
    rows = seeds.shape[0]
    start, stop = span.bounds(vocabulary)
    draws = jax.vmap(jax.random.key)(seeds)
    head = decoder.head(start, stop)

    hidden, keys, values = decoder.prefill(ids, positions)
    last = jax.nn.one_hot(lengths - 1, ids.shape[1], dtype=hidden.dtype)
    last = jax.reshard(last, sharding.spec("batch", "length"))
    first = _State(
        hidden=jnp.einsum("btd,bt->bd", hidden, last, out_sharding=sharding.spec("batch", "embed")),
        cache=Cache.from_prefill(keys, values, lengths, span.limit),
        tokens=jnp.full((rows, span.limit), vocabulary.pad, jnp.int32),
        scores=jnp.zeros((rows, span.limit), jnp.float32),
        counts=jnp.zeros(rows, jnp.int32),
        done=jnp.zeros(rows, bool),
    )

    def unfinished(state: _State) -> Bool[Array, ""]:
        return (state.cache.step < span.limit) & ~state.done.all()

    def advance(state: _State) -> _State:
        step = state.cache.step
        logits = decoder.logits(state.hidden, head)
        # Every device holds all logits of a step: they are few, and rows and streams can then be
        # taken apart without regard to how the batch is split.
        logits = jax.reshard(logits, jax.P(None, None)).astype(jnp.float32)
        logits = logits.reshape(guidance.streams, rows, stop - start)
        allowed = span.allowed(vocabulary, step)
        if allowed is not None:
            logits = jnp.where(allowed, logits, _FORBIDDEN)
        merged = guidance(logits)
        if allowed is not None:
            merged = jnp.where(allowed, merged, -jnp.inf)
        choice = sampler(merged, jax.vmap(jax.random.fold_in, (0, None))(draws, step))
        likelihood = jax.nn.log_softmax(logits[0], axis=-1)
        score = jnp.take_along_axis(likelihood, choice[:, None], axis=-1)[:, 0]
        token = jnp.where(state.done, vocabulary.pad, choice + start)
        done = state.done | span.ends(token)
        every = jax.reshard(jnp.tile(token, guidance.streams), sharding.spec("batch"))
        hidden, keys, values = decoder.decode_step(
            every, extents + step, state.cache.keys, state.cache.values,
            state.cache.valid(),
        )  # fmt: skip
        return _State(
            hidden=hidden.astype(state.hidden.dtype),
            cache=state.cache.append(keys, values),
            tokens=state.tokens.at[:, step].set(token),
            scores=state.scores.at[:, step].set(score),
            counts=state.counts + ~done,
            done=done,
        )

    final = jax.lax.while_loop(unfinished, advance, first)
    ended = final.done | isinstance(span, ImageSpan)
    return final.tokens, final.scores, final.counts, ended


def fill_program(*arguments: object) -> jax.stages.Lowered:
    """What `Engine.fill` runs, lowered for arrays that may be abstract; arguments as `_fill`'s."""
    return _fill.lower(*arguments)


@jax.jit
def _score(
    decoder: Decoder,
    ids: Int[Array, "batch length"],
    positions: Int[Array, "batch length"],
    targets: Int[Array, "batch length"],
    weights: Float[Array, "batch length"],
) -> Float[Array, "batch"]:
    """Sum over t of weights[:, t] log p(targets[:, t] | ids[:, :t + 1])."""
    hidden = decoder(ids, positions)
    _, losses = chunked_cross_entropy(hidden, decoder.table[...], targets, weights)
    return -losses.sum(axis=1)
