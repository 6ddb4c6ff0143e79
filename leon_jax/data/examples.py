"""Builds training examples: retrieved documents and a query, as masked token ids.

    index -> (retrieved documents, query) -> token ids -> CM3 masking -> (ids, targets, weights)

To the model an example is one document:

    </s> retrieved <break> retrieved <break> query </s>

An example is a function of the seed and its index, so examples can be built in any order, by any
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
from leon_jax.data.config import DEFAULTS, MixtureComponent
from leon_jax.data.masking import TOKENS_PER_SPAN, Masked, MaskingConfig, mask
from leon_jax.documents import Document, Source
from leon_jax.vocabulary import Vocabulary

# (rng, index of the query, count) -> indices of at most `count` documents to put before the query.
Neighbours = Callable[[np.random.Generator, int, int], Sequence[int]]

# (index, variant) -> the document with its image in that variant; variant 0 is unchanged.
Variant = Callable[[int, int], Document]


class DocumentEncoder(Protocol):
    """Encodes documents as ids, for example `leon_jax.tokenizers.documents.DocumentTokenizer`."""

    vocabulary: Vocabulary

    def encode(self, document: Document) -> Int32[np.ndarray, "length"]: ...


@dataclasses.dataclass(frozen=True)
class Component:
    """An open component of a mixture: its documents, and how they become examples.

    Attributes:
      settings: the configuration; `DEFAULTS` replace values that are None.
      source: the documents.
      neighbours: returns the documents to put before a query; None disables retrieval.
      query_weights: sampling weights of the documents as queries, with replacement. None takes
        every document once per epoch.
      variant: returns documents in variants of their images; None if there are no variants.
      plain_variants: an example without retrieved documents uses one of this many first
        variants. These change no colours, because such an example has no context that shows a
        colour change.

    Raises:
      UserError: there are no documents, or a value does not fit them.
    """

    settings: MixtureComponent
    source: Source
    neighbours: Neighbours | None = None
    query_weights: Float64[np.ndarray, "documents"] | None = None
    variant: Variant | None = None
    plain_variants: int = 1

    def __post_init__(self) -> None:
        settings = self.settings.filled(DEFAULTS)
        object.__setattr__(self, "settings", settings)
        assert settings.variants is not None, "`filled` sets it"
        if len(self.source) == 0:
            raise UserError(
                "the training data is empty; prepare a folder with at least one document"
            )
        if not 1 <= self.plain_variants <= settings.variants:
            raise UserError(
                f"plain_variants is {self.plain_variants}; it must be at least 1 and at most "
                f"variants, {settings.variants}"
            )
        if self.variant is None and settings.variants > 1:
            raise UserError(f"variants is {settings.variants}, but the data has no variants")
        if self.query_weights is not None and len(self.query_weights) != len(self.source):
            raise UserError(
                f"query_weights has {len(self.query_weights)} weights for {len(self.source)} "
                "documents; it must have one weight per document"
            )

    @property
    def name(self) -> str:
        """The name of the documents in error messages."""
        return f"{self.settings.folder} ({self.settings.split})"


# An example reserves tokens for this many masked spans; more spans are masked only if they fit.
RESERVED_SPANS = 4


@dataclasses.dataclass(frozen=True)
class Limits:
    """Maximum size of an example; retrieved documents that do not fit are left out.

    Attributes:
      tokens: number of tokens of a row, which holds all ids of an example except the last.
      positions: number of positions.
      part_step: see `leon_jax.vocabulary.Vocabulary.positions`.
    """

    tokens: int = sys.maxsize
    positions: int = sys.maxsize
    part_step: int = 1


class Joined(NamedTuple):
    """The ids of retrieved documents and a query.

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
    max_length: int | None = None,
) -> Joined:
    """Puts retrieved documents before a query.

    Args:
      query, retrieved: encoded documents, each `</s> ... </s>`.
      vocabulary: the id layout.
      max_length: maximum length of the result; None means no limit. Retrieved documents that do
        not fit are dropped, the last first. A query is never shortened.
    """
    retrieved = list(retrieved)
    while retrieved and max_length is not None:
        # A retrieved document loses its two </s> and gains one <break>.
        if len(query) + sum(len(ids) - 1 for ids in retrieved) <= max_length:
            break
        retrieved.pop()
    pieces = [query[:1]]
    for ids in retrieved:
        pieces += [ids[1:-1], np.array([vocabulary.break_id], np.int32)]
    query_start = sum(len(piece) for piece in pieces)
    return Joined(np.concatenate([*pieces, query[1:]]).astype(np.int32), query_start)


@dataclasses.dataclass(frozen=True)
class MakeExample:
    """Builds the example of an index: (index, rng) -> dict(ids, targets, weights, positions).

    All arrays have the shape [length]. `targets[t]` is the id after `ids[t]`, and `weights[t]` is
    the loss weight of `targets[t]`.

    A call raises `UserError` if a document cannot be read or encoded, or if a query alone is too
    long. Any other exception passes through with a note that names the document.
    """

    component: Component
    encoder: DocumentEncoder
    masking: MaskingConfig
    limits: Limits = Limits()

    def __call__(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        weights, index = self.component.query_weights, int(index)
        if weights is not None:
            index = int(np.searchsorted(self._cumulative, rng.random(), side="right"))
            index = min(index, len(weights) - 1)
        try:
            masked, positions = self._make(index, rng)
        except Exception as error:
            error.add_note(f"while building an example of {self._name(index)}")
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
        """Returns the masked example with document `index` as query, and its input positions."""
        component, limits, vocabulary = self.component, self.limits, self.encoder.vocabulary
        settings = component.settings
        assert settings.retrieved is not None, "the settings of a component have no None"
        assert settings.variants is not None and settings.unchanged is not None
        count = int(rng.choice(len(settings.retrieved), p=settings.retrieved))
        neighbours: Sequence[int] = ()
        if count and component.neighbours is not None:
            neighbours = component.neighbours(rng, index, count)[:count]
        variants = settings.variants if len(neighbours) else component.plain_variants
        variant = 0
        if variants > 1 and rng.random() >= settings.unchanged:
            variant = int(rng.integers(variants))
        # A row holds ids[:-1] as inputs and ids[1:] as targets, so one id more than its length.
        max_length = limits.tokens + 1
        query = self._encode(index, variant)
        if len(query) > max_length:
            raise UserError(
                f"{self._name(index)} has {len(query)} tokens, but a row holds {max_length}; raise "
                "data.length, or prepare the data with a smaller max_tokens"
            )
        retrieved = [self._encode(int(i), variant) for i in neighbours]
        reserved = TOKENS_PER_SPAN * RESERVED_SPANS
        while True:
            ids, query_start = join(query, retrieved, vocabulary, max_length - reserved)
            masked = mask(
                ids,
                vocabulary,
                self.masking,
                rng,
                query_start=query_start,
                max_added=max_length - len(ids),
            )
            positions = vocabulary.positions(masked.ids[:-1], limits.part_step)
            if positions[-1] < limits.positions:
                return masked, positions
            if not retrieved:
                raise UserError(
                    f"{self._name(index)} takes {positions[-1] + 1} positions; the model has "
                    f"{limits.positions}, so raise its max_length"
                )
            retrieved.pop()

    def _encode(self, index: int, variant: int) -> Int32[np.ndarray, "length"]:
        component = self.component
        try:
            if component.variant is not None:
                return self.encoder.encode(component.variant(index, variant))
            return self.encoder.encode(component.source[index])
        except UserError as error:
            raise UserError(f"{self._name(index)}: {error}") from error
        except Exception as error:
            error.add_note(f"while reading {self._name(index)}")
            raise

    def _name(self, index: int) -> str:
        name = f"document {index}"
        with contextlib.suppress(Exception):  # this may be the document that cannot be read
            if provenance := self.component.source[index].provenance:
                name += f" ({provenance.key})"
        return f"{name} of {self.component.name}"

    @functools.cached_property
    def _cumulative(self) -> Float64[np.ndarray, "documents"]:
        weights = self.component.query_weights
        assert weights is not None
        return np.cumsum(weights) / np.sum(weights)
