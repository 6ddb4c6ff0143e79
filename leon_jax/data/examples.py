"""One training example: a query behind its retrieved documents, as ids, masked.

    index -> (retrieved documents, query) -> token ids -> CM3 masking -> (ids, targets, weights)

An example is one document to the model,

    </s> retrieved <break> retrieved <break> query </s>

and a function of (seed, index of the example) alone, so examples can be made in any order, by any
number of threads, and again after a restart.
"""

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Float64, Int32

from leon_jax.config import UserError
from leon_jax.data.masking import TOKENS_PER_SPAN, Masked, MaskingConfig, mask
from leon_jax.documents import Document, Source
from leon_jax.vocabulary import Vocabulary

# (rng, index of the query, how many) -> indices of at most so many documents to put before it.
Neighbours = Callable[[np.random.Generator, int, int], Sequence[int]]

# (index, variant) -> a document as that variant shows it; variant 0 is the document itself.
Variant = Callable[[int, int], Document]


class Encoder(Protocol):
    """Documents to ids, for example `leon_jax.tokenizers.documents.DocumentTokenizer`."""

    vocabulary: Vocabulary

    def encode(self, document: Document) -> Int32[np.ndarray, "length"]: ...


@dataclasses.dataclass(frozen=True)
class Part:
    """Documents to make examples of, and how; a mixture has several.

    Attributes:
      source: the documents.
      name: what error messages call them; may be empty.
      weight: how many examples come from here, relative to the other parts of the mixture.
      retrieved: probabilities of 0, 1, 2, ... retrieved documents; (1.0,) turns retrieval off.
      neighbours: which documents to put before a query; None: none.
      balance: how often each document is a query, relative to the others; then queries are drawn
        with replacement. None: every document once an epoch.
      variant: the documents in variants of their pictures; None: only as they are.
      variants: of how many variants one is drawn for an example with retrieved documents, the same
        for all of them; 1 takes every picture as it is.
      plain_variants: of how many, counted from the first, for an example without: those that
        change no colours, which nothing in such an example could tell.
      unchanged: probability that an example takes its pictures as they are instead of drawing.

    Raises:
      UserError: there are no documents, or a value is out of range or does not fit them.
    """

    source: Source
    name: str = ""
    weight: float = 1.0
    retrieved: tuple[float, ...] = (1.0,)
    neighbours: Neighbours | None = None
    balance: Float64[np.ndarray, "documents"] | None = None
    variant: Variant | None = None
    variants: int = 1
    plain_variants: int = 1
    unchanged: float = 0.0

    def __post_init__(self) -> None:
        if len(self.source) == 0:
            raise UserError(
                "the training data is empty; prepare a folder with at least one document"
            )
        if not self.weight > 0:
            raise UserError(f"weight is {self.weight}; it must be above 0")
        if not self.retrieved or min(self.retrieved) < 0 or abs(sum(self.retrieved) - 1) > 1e-6:
            raise UserError(f"retrieved is {self.retrieved}; probabilities must sum to 1")
        for name in ("variants", "plain_variants"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.unchanged <= 1:
            raise UserError(f"unchanged is {self.unchanged}; it must be between 0 and 1")
        if self.plain_variants > self.variants:
            raise UserError(
                f"plain_variants is {self.plain_variants}; it must be at most variants, "
                f"{self.variants}"
            )
        if self.variant is None and self.variants > 1:
            raise UserError(f"variants is {self.variants}, but the data holds none")
        if self.balance is not None and len(self.balance) != len(self.source):
            raise UserError(
                f"{len(self.balance)} weights were given for {len(self.source)} documents"
            )


@dataclasses.dataclass(frozen=True)
class Room:
    """How long an example may be; retrieved documents are left out to keep within it.

    Attributes:
      tokens: of a row, which holds all ids of an example but the last.
      positions: that an example may take.
      part_step: see `leon_jax.vocabulary.Vocabulary.positions`.
      spare_spans: an example keeps room for this many masked spans; more only where it fits.
    """

    tokens: int = sys.maxsize
    positions: int = sys.maxsize
    part_step: int = 1
    spare_spans: int = 4


class Joined(NamedTuple):
    """A query behind its retrieved documents.

    Attributes:
      ids: `</s> retrieved <break> ... query </s>`.
      query_start: position of the query's first id.
    """

    ids: Int32[np.ndarray, "length"]
    query_start: int


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


@dataclasses.dataclass(frozen=True)
class MakeExample:
    """(index, rng) -> one example, as dict(ids, targets, weights, positions).

    `targets[t]` is the id after `ids[t]`, and `weights[t]` the weight of predicting it.

    Raises:
      UserError: when called: a document cannot be read or encoded, or is too long alone. Anything
        else that goes wrong is raised as it is, with notes that name the documents.
    """

    part: Part
    encoder: Encoder
    masking: MaskingConfig
    room: Room = Room()

    def __call__(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        part, index = self.part, int(index)
        if part.balance is not None:
            index = int(np.searchsorted(self._cumulative, rng.random(), side="right"))
            index = min(index, len(part.balance) - 1)
        try:
            masked, positions = self._make(index, rng)
        except Exception as error:
            error.add_note(f"while making an example of {self._name(index)}")
            raise
        return {
            "ids": masked.ids[:-1],
            "targets": masked.ids[1:],
            "weights": masked.weights[1:],
            "positions": positions,
        }

    def _make(
        self, index: int, rng: np.random.Generator
    ) -> tuple[Masked, Int32[np.ndarray, "masked-1"]]:
        """The masked example whose query is document `index`, and the positions of its inputs."""
        part, room, vocabulary = self.part, self.room, self.encoder.vocabulary
        number = int(rng.choice(len(part.retrieved), p=part.retrieved))
        found: Sequence[int] = ()
        if number and part.neighbours is not None:
            found = part.neighbours(rng, index, number)[:number]
        variants = part.variants if len(found) else part.plain_variants
        variant = 0
        if variants > 1 and rng.random() >= part.unchanged:
            variant = int(rng.integers(variants))
        # A row holds ids[:-1] as inputs and ids[1:] as targets: one id more than its length.
        longest = room.tokens + 1
        query = self._encode(index, variant)
        if len(query) > longest:
            raise UserError(
                f"{self._name(index)} has {len(query)} tokens, but a row holds {longest}; raise "
                "data.length, or prepare the data with a smaller max_tokens"
            )
        retrieved = [self._encode(int(i), variant) for i in found]
        spare = TOKENS_PER_SPAN * room.spare_spans
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
            positions = vocabulary.positions(masked.ids[:-1], room.part_step)
            if positions[-1] < room.positions:
                return masked, positions
            if not retrieved:
                raise UserError(
                    f"{self._name(index)} takes {positions[-1] + 1} positions; the model has "
                    f"{room.positions}, so raise its max_length"
                )
            retrieved.pop()

    def _encode(self, index: int, variant: int) -> Int32[np.ndarray, "length"]:
        part = self.part
        try:
            document = part.variant(index, variant) if part.variant else part.source[index]
            return self.encoder.encode(document)
        except UserError as error:
            raise UserError(f"{self._name(index)}: {error}") from error
        except Exception as error:
            error.add_note(f"while reading {self._name(index)}")
            raise

    def _name(self, index: int) -> str:
        shown = f"document {index}"
        with contextlib.suppress(Exception):  # it may be the one that cannot be read
            if provenance := self.part.source[index].provenance:
                shown += f" ({provenance.key})"
        return shown + (f" of {self.part.name}" if self.part.name else "")

    @functools.cached_property
    def _cumulative(self) -> Float64[np.ndarray, "documents"]:
        assert self.part.balance is not None
        return np.cumsum(self.part.balance) / np.sum(self.part.balance)
