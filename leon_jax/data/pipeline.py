"""Decoder training data: documents and their neighbours become packed, masked token rows.

    index -> (retrieved documents, query) -> token ids -> CM3 masking -> (ids, targets, weights)
          -> packing into rows -> batches

One document here is a query with its retrieved documents in front,

    </s> retrieved <break> retrieved <break> query </s>

and is never cut, neither by masking nor by packing: retrieved documents that do not fit the row are
left out. (The original cuts its token stream into blocks, pictures included.) In a packed row every
document has its own segment id (from 1; 0 is padding) and positions of its own, so the model meets
documents in training exactly as it meets prompts.

Everything random is a function of (seed, index of the example), so an iterator resumes exactly.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import grain
import numpy as np
from jaxtyping import Float64, Int32

from leon_jax.config import UserError
from leon_jax.data.masking import TOKENS_PER_SPAN, MaskingConfig, mask
from leon_jax.documents import Document, Source
from leon_jax.vocabulary import Vocabulary

# (rng, index of the query, how many) -> indices of at most so many documents to put before it.
Neighbours = Callable[[np.random.Generator, int, int], Sequence[int]]

# Encoded documents kept in memory; a query is met once an epoch, but neighbours repeat.
_CACHED_DOCUMENTS = 16384


class Encoder(Protocol):
    """Documents to ids, for example `leon_jax.tokenizers.documents.DocumentTokenizer`."""

    vocabulary: Vocabulary

    def encode(self, document: Document) -> Int32[np.ndarray, "length"]: ...


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    """Settings of `make`.

    Attributes:
      length: tokens of a row.
      max_positions: how many positions a document may take; by default as many as a row has.
      part_step: see `leon_jax.vocabulary.Vocabulary.positions`.
      batch_size: rows of a batch (of this process).
      seed: decides order, neighbours and masks.
      retrieved: probabilities of 0, 1, 2, ... retrieved documents; (1.0,) turns retrieval off.
      spare_spans: a document keeps room for this many masked spans; more only where it fits.
      packing_bins: rows that are filled side by side, in batches; more bins pad less, and cost
        a longer replay after a restart.
      threads: threads that read documents ahead; 0 reads them when they are needed.
      variants: of how many variants of the pictures (see `make`) one is drawn for an example with
        retrieved documents, the same for all of them; 1 takes every picture as it is.
      plain_variants: of how many, counted from the first, for an example without: those that
        change no colours, which nothing in such an example could tell.
      unchanged: probability that an example takes its pictures as they are instead of drawing.
    """

    length: int
    batch_size: int
    seed: int = 0
    retrieved: tuple[float, ...] = (1.0,)
    spare_spans: int = 4
    packing_bins: int = 4
    threads: int = 2
    variants: int = 1
    plain_variants: int = 1
    unchanged: float = 0.0
    max_positions: int | None = None
    part_step: int = 1

    def __post_init__(self):
        if not self.retrieved or min(self.retrieved) < 0 or abs(sum(self.retrieved) - 1) > 1e-6:
            raise UserError(f"retrieved is {self.retrieved}; probabilities must sum to 1")
        for name in (
            "length", "batch_size", "packing_bins", "variants", "plain_variants", "part_step"
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.unchanged <= 1:
            raise UserError(f"unchanged is {self.unchanged}; it must be between 0 and 1")
        if self.plain_variants > self.variants:
            raise UserError(
                f"plain_variants is {self.plain_variants}; it must be at most variants, "
                f"{self.variants}"
            )


# (index, variant) -> a document as that variant shows it; variant 0 is the document itself.
Variant = Callable[[int, int], Document]


class Joined(NamedTuple):
    """A query behind its retrieved documents.

    Attributes:
      ids: `</s> retrieved <break> ... query </s>`.
      query_start: position of the query's first id.
    """

    ids: Int32[np.ndarray, "length"]
    query_start: int


def make(
    source: Source,
    encoder: Encoder,
    config: PipelineConfig,
    masking: MaskingConfig,
    *,
    neighbours: Neighbours | None = None,
    weights: Float64[np.ndarray, "documents"] | None = None,
    variant: Variant | None = None,
    shard: tuple[int, int] = (0, 1),
) -> grain.IterDataset:
    """Endless batches, shuffled anew every epoch, with an iterator that can be checkpointed.

    Args:
      source: the documents.
      encoder: documents to ids.
      config: sizes and probabilities.
      masking: the CM3 objective.
      neighbours: which documents to put before a query; None: none.
      weights: how often each document is a query, relative to the others; then queries are drawn
        with replacement. None: every document once an epoch.
      variant: the documents of `source` in `config.variants` variants; None: only as they are.
      shard: (index, count) of this process; processes read disjoint parts of one order.

    Returns:
      dict(ids, targets, segment_ids, positions: int32[batch_size, length],
      weights: float32[batch_size, length]). `targets[t]` is the id after `ids[t]` in the same
      document; `weights` is 0 where there is none.

    Raises:
      UserError: the source is empty, or (while iterating) a document alone exceeds a row.
    """
    if len(source) == 0:
        raise UserError("the training data is empty; prepare a folder with at least one document")
    if variant is None and config.variants > 1:
        raise UserError(f"variants is {config.variants}, but the data holds none")
    if weights is not None and len(weights) != len(source):
        raise UserError(f"{len(weights)} weights were given for {len(source)} documents")
    build = _Example(source, encoder, config, masking, neighbours, weights, variant)
    examples = (
        grain.MapDataset.range(len(source))
        .seed(config.seed % 2**32)
        .shuffle()
        .repeat()
        .slice(slice(*_part(shard)))
        .random_map(build, seed=(config.seed + 1) % 2**32)
        .to_iter_dataset(
            grain.ReadOptions(
                num_threads=config.threads, prefetch_buffer_size=8 * max(config.threads, 1)
            )
        )
    )
    pad, names = encoder.vocabulary.pad, ("ids", "targets", "weights", "positions")
    packed = grain.experimental.BestFitPackIterDataset(
        examples,
        length_struct=dict.fromkeys(names, config.length),
        num_packing_bins=config.batch_size * config.packing_bins,
        seed=config.seed % 2**32,
        padding_struct={"ids": pad, "targets": pad, "weights": 0, "positions": 0},
    )
    return packed.map(_row).batch(config.batch_size, drop_remainder=True)


def join(
    query: Int32[np.ndarray, "query"],
    retrieved: Sequence[Int32[np.ndarray, "retrieved"]],
    vocabulary: Vocabulary,
    room: int | None = None,
) -> Joined:
    """Puts retrieved documents before a query; all are `</s> ... </s>`.

    Args:
      query, retrieved: encoded documents.
      vocabulary: the id layout.
      room: the longest result; retrieved documents are dropped from the last on to meet it (a
        query that alone is longer stays as it is). None: no limit.
    """
    retrieved = list(retrieved)
    while retrieved and room is not None:
        # Joining drops the two </s> of a retrieved document and adds one <break>.
        if len(query) + sum(len(ids) - 1 for ids in retrieved) <= room:
            break
        retrieved.pop()
    pieces = [query[:1]]
    for ids in retrieved:
        pieces += [ids[1:-1], np.array([vocabulary.break_id], np.int32)]
    query_start = sum(len(piece) for piece in pieces)
    return Joined(np.concatenate([*pieces, query[1:]]).astype(np.int32), query_start)


@dataclasses.dataclass
class _Example:
    """index, rng -> dict(ids, targets, weights, positions) of one document."""

    source: Source
    encoder: Encoder
    config: PipelineConfig
    masking: MaskingConfig
    neighbours: Neighbours | None
    weights: np.ndarray | None = None
    variant: Variant | None = None

    def __post_init__(self):
        def encode(index: int, variant: int) -> Int32[np.ndarray, "length"]:
            shown = self.variant(index, variant) if self.variant else self.source[index]
            return self.encoder.encode(shown)

        self._encode = functools.lru_cache(_CACHED_DOCUMENTS)(encode)
        if self.weights is not None:
            self._cumulative = np.cumsum(self.weights) / np.sum(self.weights)

    def __call__(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        index, vocabulary = int(index), self.encoder.vocabulary
        if self.weights is not None:
            index = int(np.searchsorted(self._cumulative, rng.random(), side="right"))
            index = min(index, len(self.weights) - 1)
        number = int(rng.choice(len(self.config.retrieved), p=self.config.retrieved))
        found = []
        if number and self.neighbours is not None:
            found = list(self.neighbours(rng, index, number))[:number]
        variants = self.config.variants if found else self.config.plain_variants
        variant = 0
        if variants > 1 and rng.random() >= self.config.unchanged:
            variant = int(rng.integers(variants))
        # A row holds ids[:-1] as inputs and ids[1:] as targets: one id more than its length.
        longest = self.config.length + 1
        query = self._encode(index, variant)
        if len(query) > longest:
            raise UserError(
                f"document {index} has {len(query)} tokens, but a row holds {longest}; raise "
                "data.length or shorten the document"
            )
        retrieved = [self._encode(int(i), variant) for i in found]
        spare = TOKENS_PER_SPAN * self.config.spare_spans
        while True:
            ids, query_start = join(query, retrieved, vocabulary, longest - spare)
            masked = mask(
                ids,
                vocabulary,
                self.masking,
                rng,
                query_start=query_start,
                room=longest - len(ids),
            )
            positions = vocabulary.positions(masked.ids[:-1], self.config.part_step)
            if positions[-1] < (self.config.max_positions or longest):
                break
            if not retrieved:
                raise UserError(
                    f"document {index} takes {positions[-1] + 1} positions; the model has "
                    f"{self.config.max_positions or longest - 1}, so raise its max_length"
                )
            retrieved.pop()
        return {
            "ids": masked.ids[:-1],
            "targets": masked.ids[1:],
            "weights": masked.weights[1:],
            "positions": positions,
        }


def _part(shard: tuple[int, int]) -> tuple[int, None, int]:
    index, count = shard
    if not 0 <= index < count:
        raise UserError(f"shard is {shard}; the index must be between 0 and the count")
    return index, None, count


def _row(packed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {
        "ids": packed["ids"].astype(np.int32),
        "targets": packed["targets"].astype(np.int32),
        "weights": packed["weights"].astype(np.float32),
        "segment_ids": packed["ids_segment_ids"].astype(np.int32),
        "positions": packed["positions"].astype(np.int32),
    }
