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
from leon_jax.data.config import DEFAULTS, MixtureComponent
from leon_jax.data.masking import TOKENS_PER_SPAN, Masked, MaskingConfig, mask
from leon_jax.documents import Document, Source
from leon_jax.vocabulary import Vocabulary

# (rng, index of the query, how many) -> indices of at most so many documents to put before it.
Neighbours = Callable[[np.random.Generator, int, int], Sequence[int]]

# (index, variant) -> a document as that variant shows it; variant 0 is the document itself.
Variant = Callable[[int, int], Document]


class DocumentEncoder(Protocol):
    """Documents to ids, for example `leon_jax.tokenizers.documents.DocumentTokenizer`."""

    vocabulary: Vocabulary

    def encode(self, document: Document) -> Int32[np.ndarray, "length"]: ...


@dataclasses.dataclass(frozen=True)
class Component:
    """A component of a mixture, opened: documents, and how examples are made of them.

    Attributes:
      settings: what the configuration says; where it has None, `DEFAULTS` counts.
      source: the documents.
      neighbours: which documents to put before a query; None: none.
      query_weights: how often each document is a query, relative to the others; then queries are
        drawn with replacement. None: every document once an epoch.
      variant: the documents in variants of their images; None: only as they are.
      plain_variants: from how many variants, counted from the first, one is chosen for an example
        without retrieved documents: those that change no colours, which nothing in such an example
        could tell.

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
        assert settings.variants is not None, "it is filled"
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
            raise UserError(f"variants is {settings.variants}, but the data holds none")
        if self.query_weights is not None and len(self.query_weights) != len(self.source):
            raise UserError(
                f"{len(self.query_weights)} weights were given for {len(self.source)} documents"
            )

    @property
    def name(self) -> str:
        """What error messages call the documents."""
        return f"{self.settings.folder} ({self.settings.split})"


# An example keeps tokens free for so many masked spans; more are masked only where they fit.
SPARE_SPANS = 4


@dataclasses.dataclass(frozen=True)
class Limits:
    """How long an example may be; retrieved documents are left out to keep within it.

    Attributes:
      tokens: of a row, which holds all ids of an example but the last.
      positions: that an example may take.
      part_step: see `leon_jax.vocabulary.Vocabulary.positions`.
    """

    tokens: int = sys.maxsize
    positions: int = sys.maxsize
    part_step: int = 1


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
        component, limits, vocabulary = self.component, self.limits, self.encoder.vocabulary
        settings = component.settings
        assert settings.retrieved is not None, "a component's settings are filled"
        assert settings.variants is not None and settings.unchanged is not None
        number = int(rng.choice(len(settings.retrieved), p=settings.retrieved))
        neighbours: Sequence[int] = ()
        if number and component.neighbours is not None:
            neighbours = component.neighbours(rng, index, number)[:number]
        variants = settings.variants if len(neighbours) else component.plain_variants
        variant = 0
        if variants > 1 and rng.random() >= settings.unchanged:
            variant = int(rng.integers(variants))
        # A row holds ids[:-1] as inputs and ids[1:] as targets: one id more than its length.
        longest = limits.tokens + 1
        query = self._encode(index, variant)
        if len(query) > longest:
            raise UserError(
                f"{self._name(index)} has {len(query)} tokens, but a row holds {longest}; raise "
                "data.length, or prepare the data with a smaller max_tokens"
            )
        retrieved = [self._encode(int(i), variant) for i in neighbours]
        spare = TOKENS_PER_SPAN * SPARE_SPANS
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
        shown = f"document {index}"
        with contextlib.suppress(Exception):  # it may be the one that cannot be read
            if provenance := self.component.source[index].provenance:
                shown += f" ({provenance.key})"
        return f"{shown} of {self.component.name}"

    @functools.cached_property
    def _cumulative(self) -> Float64[np.ndarray, "documents"]:
        weights = self.component.query_weights
        assert weights is not None
        return np.cumsum(weights) / np.sum(weights)
