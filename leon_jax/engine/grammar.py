"""Grammar: which ids a row may generate. It runs on the device.

A grammar is a sequence of spans. Each row has its own grammar and its own position in it, so one
row may be inside an image while another one ends a text. A span decides which ids may come next,
how many, and what ends it:

    ImageSpan(n)     exactly n image ids
    TextSpan(n)      up to n text ids, then `close`: after a stop was sampled, or after n ids
    Forced(id)       this id; streams may get different ids, for their sentinels may differ
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from leon_jax.vocabulary import Vocabulary

# Kinds of spans on the device.
DONE, FORCED, IMAGE, TEXT = range(4)


@dataclasses.dataclass(frozen=True)
class ImageSpan:
    """An image: exactly `limit` image ids. No id ends it.

    Raises:
      ValueError: limit is below 1.
    """

    limit: int

    def __post_init__(self):
        if self.limit < 1:
            raise ValueError(f"an image span of {self.limit} tokens; it must hold at least 1")


@dataclasses.dataclass(frozen=True)
class TextSpan:
    """Text ids, ended by one of `stops` or by the length limit.

    Attributes:
      limit: the most text ids.
      stops: one or two ids that end the span: `<eoss>` for an infill; `</s>` or `<break>` at the
        end of a document.
      close: the id that follows the text however it ended, if the row continues.
      min_tokens: a stop is not allowed before this many text ids.
      final: a stop that ends the whole row instead of the span alone.

    Raises:
      ValueError: a limit is impossible, there is no stop or too many, or `final` is not a stop.
    """

    limit: int
    stops: tuple[int, ...]
    close: int
    min_tokens: int = 1
    final: int | None = None

    def __post_init__(self):
        if self.final is not None and self.final not in self.stops:
            raise ValueError(f"final is {self.final}; it must be one of the stops {self.stops}")
        if not 0 <= self.min_tokens <= self.limit or self.limit < 1:
            raise ValueError(
                f"a text span of {self.min_tokens} to {self.limit} tokens; "
                "it needs 0 <= min_tokens <= limit and limit >= 1"
            )
        if not 0 < len(self.stops) < 3:
            raise ValueError(f"stops are {self.stops}; a text span needs one or two")

    @classmethod
    def infill(cls, vocabulary: Vocabulary, limit: int) -> "TextSpan":
        """The text of an infill, ended by `<eoss>`."""
        return cls(limit, (vocabulary.eoss,), vocabulary.eoss)

    @classmethod
    def causal(cls, vocabulary: Vocabulary, limit: int) -> "TextSpan":
        """The last part of a document, ended by `</s>` or `<break>`."""
        return cls(limit, (vocabulary.eos, vocabulary.break_id), vocabulary.eos)


@dataclasses.dataclass(frozen=True)
class Forced:
    """One id that is not sampled. Of several ids, stream i gets the i-th.

    Raises:
      ValueError: there is no id.
    """

    ids: tuple[int, ...]

    def __post_init__(self):
        if not self.ids:
            raise ValueError("a forced span needs an id")


Span = ImageSpan | TextSpan | Forced
Grammar = tuple[Span, ...]


class SpanOutput(NamedTuple):
    """What a row generated for one span.

    Attributes:
      ids: int32[n]; those of a text without the id that ended it.
      log_probabilities: float32[n], of each id under stream 0 alone, within the grammar. That of
        the id that ended a text is left out.
      ended: False if a text was cut by its length limit.
    """

    ids: np.ndarray
    log_probabilities: np.ndarray
    ended: bool


class CurrentSpan(NamedTuple):
    """The span that each row is in; see `GrammarState`."""

    kind: Int[Array, "group sample"]
    limit: Int[Array, "group sample"]
    min_tokens: Int[Array, "group sample"]
    stops: Int[Array, "group sample 2"]
    final: Int[Array, "group sample"]
    forced: Int[Array, "group sample streams"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GrammarState:
    """The grammars of all rows as arrays, and the position of each row.

    Attributes:
      kind, limit, min_tokens: int32[group, sample, spans]; a row past its last span is `DONE`.
      stops: int32[group, sample, spans, 2], -1 for none.
      final: int32[group, sample, spans], -1 for none.
      forced: int32[group, sample, spans, streams]: the ids of `Forced`, or `close` of a text.
      span: int32[group, sample], the index of the span that a row is in.
      used: int32[group, sample], how many ids of this span are generated.
    """

    kind: Int[Array, "group sample spans"]
    limit: Int[Array, "group sample spans"]
    min_tokens: Int[Array, "group sample spans"]
    stops: Int[Array, "group sample spans 2"]
    final: Int[Array, "group sample spans"]
    forced: Int[Array, "group sample spans streams"]
    span: Int[Array, "group sample"]
    used: Int[Array, "group sample"]

    @classmethod
    def of(
        cls, grammars: Sequence[Sequence[Grammar]], streams: int, max_spans: int
    ) -> "GrammarState":
        """The grammars of [group][sample] as NumPy arrays. An empty grammar is done at once.

        Args:
          grammars: of at most `max_spans` spans each.
          streams: how many ids a row is given in a step.
          max_spans: the size of the axis of spans, without the one that holds `DONE`.
        """
        shape = (len(grammars), len(grammars[0]), max_spans + 1)
        kind, limit, min_tokens = (np.zeros(shape, np.int32) for _ in range(3))
        stops, final = np.full((*shape, 2), -1, np.int32), np.full(shape, -1, np.int32)
        forced = np.zeros((*shape, streams), np.int32)
        for group, samples in enumerate(grammars):
            for sample, grammar in enumerate(samples):
                for number, span in enumerate(grammar):
                    at = group, sample, number
                    match span:
                        case ImageSpan():
                            kind[at], limit[at] = IMAGE, span.limit
                        case TextSpan():
                            kind[at], limit[at] = TEXT, span.limit
                            min_tokens[at] = span.min_tokens
                            stops[at][: len(span.stops)] = span.stops
                            final[at] = -1 if span.final is None else span.final
                            forced[at] = span.close
                        case Forced():
                            kind[at], limit[at] = FORCED, 1
                            forced[at] = [*span.ids, *[span.ids[-1]] * streams][:streams]
        zeros = np.zeros(shape[:2], np.int32)
        arrays: Any = kind, limit, min_tokens, stops, final, forced, zeros, zeros.copy()
        return cls(*arrays)

    @property
    def current(self) -> CurrentSpan:
        """The span that each row is in."""

        def take(array: Array) -> Array:
            index = self.span.reshape(self.span.shape + (1,) * (array.ndim - 2))
            return jnp.take_along_axis(array, index, axis=2)[:, :, 0]

        return CurrentSpan(
            *map(
                take,
                (self.kind, self.limit, self.min_tokens, self.stops, self.final, self.forced),
            )
        )

    @property
    def done(self) -> Bool[Array, "group sample"]:
        """Which rows have nothing left to generate."""
        return self.current.kind == DONE

    def advance(
        self, sampled: Int[Array, "group sample"]
    ) -> tuple["GrammarState", Int[Array, "streams group sample"], Bool[Array, "group sample"]]:
        """What each row generates if these ids were sampled for it.

        Returns:
          The state after one more id; the id that each stream is given; and whether the id was
          sampled (otherwise it was forced).
        """
        current = self.current
        is_text = current.kind == TEXT
        cut = is_text & (self.used >= current.limit)
        stopped = is_text & ~cut & (sampled[..., None] == current.stops).any(axis=-1)
        closing = (current.kind == FORCED) | cut | stopped
        written = jnp.where(closing[..., None], current.forced, sampled[..., None])
        used = self.used + 1
        # The last text of a row needs no id that closes it.
        following = jnp.take_along_axis(self.kind, (self.span + 1)[..., None], axis=2)[..., 0]
        is_full = (used >= current.limit) & (
            (current.kind == IMAGE) | (is_text & (following == DONE))
        )
        is_over = closing | is_full
        span = jnp.where(is_over, self.span + 1, self.span)
        span = jnp.where(stopped & (sampled == current.final), self.kind.shape[2] - 1, span)
        span = jnp.where(current.kind == DONE, self.span, span)
        state = dataclasses.replace(self, span=span, used=jnp.where(is_over, 0, used))
        return state, jnp.moveaxis(written, -1, 0), ~(cut | (current.kind == FORCED))

    def finish(self, rows: Bool[Array, "group sample"]) -> "GrammarState":
        """The state with these rows done."""
        return dataclasses.replace(self, span=jnp.where(rows, self.kind.shape[2] - 1, self.span))


def max_new_tokens(grammar: Grammar) -> int:
    """The most ids that a row with this grammar generates."""
    last = len(grammar) - 1
    return sum(
        1 if isinstance(span, Forced)
        else span.limit + (isinstance(span, TextSpan) and number < last)
        for number, span in enumerate(grammar)
    )  # fmt: skip


def split_output(
    grammar: Grammar, ids: np.ndarray, log_probabilities: np.ndarray, vocabulary: Vocabulary
) -> list[SpanOutput]:
    """What a row generated, by span. Spans that it has not reached are left out.

    Args:
      grammar: of the row.
      ids, log_probabilities: int32[n] and float32[n], all ids of the row.
      vocabulary: tells text from the id that ended it.
    """
    outputs, start = [], 0
    for number, span in enumerate(grammar):
        if start >= len(ids) and not isinstance(span, TextSpan):
            break
        size, ended = 1, True
        if isinstance(span, ImageSpan):
            size = span.limit
        elif isinstance(span, TextSpan):
            others = np.flatnonzero(~vocabulary.is_text(ids[start : start + span.limit]))
            size = int(others[0]) if len(others) else min(span.limit, len(ids) - start)
            ended = size < span.limit
        stop = start + size
        outputs.append(SpanOutput(ids[start:stop], log_probabilities[start:stop], ended))
        start = stop + (isinstance(span, TextSpan) and stop < len(ids))
        if isinstance(span, TextSpan) and start >= len(ids) and number < len(grammar) - 1:
            break
    return outputs
