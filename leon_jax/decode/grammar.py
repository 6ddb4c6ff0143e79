"""Grammar: what a row may write, as a little program that runs on the device.

A script is a sequence of spans. Each row has its own and stands at its own place in it, so one row
may be inside a picture while another closes a text. A span decides which ids may come next, how
many, and what ends it:

    ImageSpan(n)     exactly n image ids
    TextSpan(n)      up to n text ids; where the model draws a stop, or n are there, `close` follows
    Forced(id)       this id (one for each stream, for streams may count sentinels differently)
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from leon_jax.vocabulary import Vocabulary

DONE, FORCED, IMAGE, TEXT = range(4)


@dataclasses.dataclass(frozen=True)
class ImageSpan:
    """A picture: exactly `limit` image ids, and nothing to end it.

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
      limit: most text ids.
      stops: ids that end the span, two at most: `<eoss>` for an infill; `</s>` or `<break>` at a
        document's end.
      close: the id that follows the text whichever way it ended, if the row goes on.
      least: a stop is not allowed before this many text ids.
      final: a stop that ends the whole row, and not the span alone.

    Raises:
      ValueError: a limit is impossible, there is no stop or too many, or `final` is none of them.
    """

    limit: int
    stops: tuple[int, ...]
    close: int
    least: int = 1
    final: int | None = None

    def __post_init__(self):
        if self.final is not None and self.final not in self.stops:
            raise ValueError(f"{self.final} ends the row but is no stop of {self.stops}")
        if not 0 <= self.least <= self.limit or self.limit < 1 or not 0 < len(self.stops) < 3:
            raise ValueError(
                f"a text span of {self.least} to {self.limit} tokens that stops at {self.stops}; "
                "it needs 0 <= least <= limit, limit >= 1 and one stop or two"
            )

    @classmethod
    def infill(cls, vocabulary: Vocabulary, limit: int) -> "TextSpan":
        """The answer of an infill, ended by `<eoss>`."""
        return cls(limit, (vocabulary.eoss,), vocabulary.eoss)

    @classmethod
    def causal(cls, vocabulary: Vocabulary, limit: int) -> "TextSpan":
        """The last part of a document, ended by `</s>` or `<break>`."""
        return cls(limit, (vocabulary.eos, vocabulary.break_id), vocabulary.eos)


@dataclasses.dataclass(frozen=True)
class Forced:
    """One id that is not drawn; of several, stream i takes the i-th.

    Raises:
      ValueError: there is none.
    """

    ids: tuple[int, ...]

    def __post_init__(self):
        if not self.ids:
            raise ValueError("a forced span needs an id")


Span = ImageSpan | TextSpan | Forced
Script = tuple[Span, ...]


class Part(NamedTuple):
    """What a row wrote into one span.

    Attributes:
      ids: int32[n]; those of a text without what ended it.
      log_probabilities: float32[n], of each id under stream 0 alone, within the grammar; that of
        what ended a text is not among them.
      ended: False if a text was cut by its length limit.
    """

    ids: np.ndarray
    log_probabilities: np.ndarray
    ended: bool


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """The scripts of all rows as arrays, and where each row stands.

    Attributes:
      kind, limit, least: int32[group, sample, spans]; after its last span a row is `DONE`.
      stops: int32[group, sample, spans, 2], -1 for none; `final`: likewise, but one.
      forced: int32[group, sample, spans, streams]: the id of `Forced`, `close` of a text.
      place: int32[group, sample], the span a row is in.
      used: int32[group, sample], how many ids of it are written.
    """

    kind: Int[Array, "group sample spans"]
    limit: Int[Array, "group sample spans"]
    least: Int[Array, "group sample spans"]
    stops: Int[Array, "group sample spans 2"]
    final: Int[Array, "group sample spans"]
    forced: Int[Array, "group sample spans streams"]
    place: Int[Array, "group sample"]
    used: Int[Array, "group sample"]

    @property
    def now(self) -> "Now":
        """The span that each row is in."""

        def at(array: Array) -> Array:
            index = self.place.reshape(self.place.shape + (1,) * (array.ndim - 2))
            return jnp.take_along_axis(array, index, axis=2)[:, :, 0]

        return Now(
            at(self.kind), at(self.limit), at(self.least), at(self.stops), at(self.final),
            at(self.forced), self.used,
        )  # fmt: skip

    @property
    def done(self) -> Bool[Array, "group sample"]:
        """Which rows have nothing left to write."""
        return self.now.kind == DONE

    def advance(
        self, drawn: Int[Array, "group sample"]
    ) -> tuple["Rows", Int[Array, "streams group sample"], Bool[Array, "group sample"]]:
        """What each row writes if these ids were drawn for it.

        Returns:
          The rows one id further; the id that each stream is given; and whether it was drawn.
        """
        now = self.now
        text = now.kind == TEXT
        cut = text & (now.used >= now.limit)
        stopped = text & ~cut & (drawn[..., None] == now.stops).any(axis=-1)
        closing = (now.kind == FORCED) | cut | stopped
        written = jnp.where(closing[..., None], now.forced, drawn[..., None])
        used = now.used + 1
        # The last text of a row needs no id to close it.
        last = jnp.take_along_axis(self.kind, (self.place + 1)[..., None], axis=2)[..., 0] == DONE
        full = (used >= now.limit) & ((now.kind == IMAGE) | (text & last))
        over = closing | full
        place = jnp.where(over, self.place + 1, self.place)
        place = jnp.where(stopped & (drawn == now.final), self.kind.shape[2] - 1, place)
        place = jnp.where(now.kind == DONE, self.place, place)
        rows = dataclasses.replace(self, place=place, used=jnp.where(over, 0, used))
        return rows, jnp.moveaxis(written, -1, 0), ~(cut | (now.kind == FORCED))


class Now(NamedTuple):
    """One span a row; see `Rows`."""

    kind: Int[Array, "group sample"]
    limit: Int[Array, "group sample"]
    least: Int[Array, "group sample"]
    stops: Int[Array, "group sample 2"]
    final: Int[Array, "group sample"]
    forced: Int[Array, "group sample streams"]
    used: Int[Array, "group sample"]


def rows_of(scripts: Sequence[Sequence[Script]], streams: int, spans: int) -> Rows:
    """The scripts of [group][sample] as NumPy arrays; an empty script is done at once.

    Args:
      scripts: of at most `spans` spans each.
      streams: how many ids a step gives to a row.
      spans: how many places an array has; one more holds `DONE`.
    """
    shape = (len(scripts), len(scripts[0]), spans + 1)
    kind, limit, least = (np.zeros(shape, np.int32) for _ in range(3))
    stops, final = np.full((*shape, 2), -1, np.int32), np.full(shape, -1, np.int32)
    forced = np.zeros((*shape, streams), np.int32)
    for group, samples in enumerate(scripts):
        for sample, script in enumerate(samples):
            for place, span in enumerate(script):
                at = group, sample, place
                match span:
                    case ImageSpan():
                        kind[at], limit[at] = IMAGE, span.limit
                    case TextSpan():
                        kind[at], limit[at], least[at] = TEXT, span.limit, span.least
                        stops[at][: len(span.stops)] = span.stops
                        final[at] = -1 if span.final is None else span.final
                        forced[at] = span.close
                    case Forced():
                        kind[at], limit[at] = FORCED, 1
                        forced[at] = [*span.ids, *[span.ids[-1]] * streams][:streams]
    zero = np.zeros(shape[:2], np.int32)
    arrays: Any = kind, limit, least, stops, final, forced, zero, zero.copy()
    return Rows(*arrays)


def longest(script: Script) -> int:
    """How many ids a row may write at most."""
    last = len(script) - 1
    return sum(
        1 if isinstance(span, Forced)
        else span.limit + (isinstance(span, TextSpan) and place < last)
        for place, span in enumerate(script)
    )  # fmt: skip


def read(
    script: Script, ids: np.ndarray, log_probabilities: np.ndarray, vocabulary: Vocabulary
) -> list[Part]:
    """What a row wrote, span by span; spans that it did not reach are left out.

    Args:
      script: of the row.
      ids, log_probabilities: int32[n] and float32[n], all that it wrote.
      vocabulary: tells text from what ended it.
    """
    parts, at = [], 0
    for place, span in enumerate(script):
        if at >= len(ids) and not isinstance(span, TextSpan):
            break
        size, ended = 1, True
        if isinstance(span, ImageSpan):
            size = span.limit
        elif isinstance(span, TextSpan):
            other = np.flatnonzero(~vocabulary.is_text(ids[at : at + span.limit]))
            size = int(other[0]) if len(other) else min(span.limit, len(ids) - at)
            ended = size < span.limit
        parts.append(Part(ids[at : at + size], log_probabilities[at : at + size], ended))
        at += size + (isinstance(span, TextSpan) and at + size < len(ids))
        if isinstance(span, TextSpan) and at >= len(ids) and place < len(script) - 1:
            break
    return parts
