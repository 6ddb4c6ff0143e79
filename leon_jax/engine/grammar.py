"""Grammars, which define the ids that a row may generate. They are evaluated on the device.

A grammar is a sequence of spans. Each row has its own grammar and its own position in it, so one
row may be inside an image while another row ends a text. A span defines which ids may come next,
how many, and what ends it:

    ImageSpan(n)     exactly n image ids
    TextSpan(n)      up to n text ids, then `close`, after a sampled stop or after n ids
    Forced(ids)      one id, without sampling; streams may get different ids, because their
                     sentinels may differ
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from leon_jax.vocabulary import Vocabulary

# Kinds of spans in `GrammarState.kind`.
DONE, FORCED, IMAGE, TEXT = range(4)


@dataclasses.dataclass(frozen=True)
class ImageSpan:
    """An image. It ends after `limit` ids, without a closing id.

    Attributes:
      limit: exact number of image ids, 1 or more.

    Raises:
      ValueError: `limit` is below 1.
    """

    limit: int

    def __post_init__(self):
        if self.limit < 1:
            raise ValueError(f"an image span of {self.limit} tokens; it must hold at least 1")


@dataclasses.dataclass(frozen=True)
class TextSpan:
    """A text. It ends when one of `stops` is sampled, or at the length limit.

    Attributes:
      limit: maximum number of text ids, 1 or more.
      stops: one or two ids that end the text: `<eoss>` for an infill; `</s>` and `<break>` at the
        end of a document.
      close: the id that is written after the text. It replaces a sampled stop. At the length limit
        it is forced, unless the text is the last span.
      min_tokens: a stop is not allowed before this number of text ids, 0..limit.
      final: a stop that ends the whole row, not only the text. None: no stop does.

    Raises:
      ValueError: `limit` or `min_tokens` is out of range, there are not one or two stops, or
        `final` is not a stop.
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
        """Returns an infill of up to `limit` text ids, which ends with `<eoss>`."""
        return cls(limit, (vocabulary.eoss,), vocabulary.eoss)

    @classmethod
    def causal(cls, vocabulary: Vocabulary, limit: int) -> "TextSpan":
        """Returns the last part of a document: up to `limit` text ids.

        A sampled `</s>` or `<break>` ends it; `</s>` is written in both cases.
        """
        return cls(limit, (vocabulary.eos, vocabulary.break_id), vocabulary.eos)


@dataclasses.dataclass(frozen=True)
class Forced:
    """One id that is not sampled.

    Attributes:
      ids: stream i gets `ids[i]`. If there are fewer ids than streams, the remaining streams get
        the last one.

    Raises:
      ValueError: `ids` is empty.
    """

    ids: tuple[int, ...]

    def __post_init__(self):
        if not self.ids:
            raise ValueError("a forced span needs an id")


Span = ImageSpan | TextSpan | Forced
Grammar = tuple[Span, ...]


class SpanOutput(NamedTuple):
    """The ids that a row generated for one span.

    Attributes:
      ids: int32[n], without the id that ended a text.
      log_probabilities: float32[n], log-probability of each id in nats under stream 0 alone,
        normalised over the ids that the grammar allows; 0 for a forced id. The value of the id that
        ended a text is left out.
      ended: False for a text of `limit` ids, which its length limit cut. True for every other span,
        even if it is not finished yet.
    """

    ids: np.ndarray
    log_probabilities: np.ndarray
    ended: bool


class CurrentSpan(NamedTuple):
    """The current span of each row; see the attributes of `GrammarState`."""

    kind: Int[Array, "group sample"]
    limit: Int[Array, "group sample"]
    min_tokens: Int[Array, "group sample"]
    stops: Int[Array, "group sample 2"]
    final: Int[Array, "group sample"]
    forced: Int[Array, "group sample streams"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GrammarState:
    """The grammars of all rows as arrays, and the position of each row in its grammar.

    Attributes:
      kind: int32[group, sample, spans]; `DONE` after the last span of a row.
      limit, min_tokens: int32[group, sample, spans]; see `TextSpan`.
      stops: int32[group, sample, spans, 2]; -1: no stop.
      final: int32[group, sample, spans]; -1: no such stop.
      forced: int32[group, sample, spans, streams], the ids of `Forced`, or `close` of a text.
      span: int32[group, sample], the index of the row's current span.
      used: int32[group, sample], the number of ids generated in the current span.
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
        """Returns the initial state of these grammars as NumPy arrays.

        Args:
          grammars: grammars by [group][sample], of at most `max_spans` spans each. A row with an
            empty grammar is finished.
          streams: number of streams; in a step, a row gets one id for each.
          max_spans: size of the axis of spans, without the last entry, which is always `DONE`.
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
        """The current span of each row."""

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
        """True for rows that are finished."""
        return self.current.kind == DONE

    def advance(
        self, sampled: Int[Array, "group sample"]
    ) -> tuple["GrammarState", Int[Array, "streams group sample"], Bool[Array, "group sample"]]:
        """Moves each row forward by one id.

        Args:
          sampled: the id sampled for each row. It is ignored if the grammar forces an id.

        Returns:
          The state after one more id; the id that each stream of a row gets; and True for rows
          whose id was sampled, False for rows whose id was forced. If a stop was sampled, the
          streams get `close`, and the third value is True. The ids of finished rows are undefined.
        """
        current = self.current
        is_text = current.kind == TEXT
        cut = is_text & (self.used >= current.limit)
        stopped = is_text & ~cut & (sampled[..., None] == current.stops).any(axis=-1)
        closing = (current.kind == FORCED) | cut | stopped
        written = jnp.where(closing[..., None], current.forced, sampled[..., None])
        used = self.used + 1
        # At its length limit, the last text of a row is not followed by a closing id.
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
        """Returns the state in which these rows are finished."""
        return dataclasses.replace(self, span=jnp.where(rows, self.kind.shape[2] - 1, self.span))


def max_new_tokens(grammar: Grammar) -> int:
    """Returns the maximum number of ids that a row with this grammar generates."""
    last = len(grammar) - 1
    return sum(
        1 if isinstance(span, Forced)
        else span.limit + (isinstance(span, TextSpan) and number < last)
        for number, span in enumerate(grammar)
    )  # fmt: skip


def split_output(
    grammar: Grammar, ids: np.ndarray, log_probabilities: np.ndarray, vocabulary: Vocabulary
) -> list[SpanOutput]:
    """Splits the generated ids of a row by span. Spans that it has not reached are left out.

    Args:
      grammar: the grammar of the row.
      ids, log_probabilities: all generated ids of the row, int32[n], and their log-probabilities,
        float32[n].
      vocabulary: the id layout, which separates text ids from the id that ended a text.

    Returns:
      One output for each span, in order. The last one may be incomplete, and a text may have no
      ids yet.
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
