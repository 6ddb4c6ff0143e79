"""Grammar: which ids may fill a hole, when it ends, and how long it may get.

A span is static to the compiled loop, so an image span computes its logits over the image slice of
the head only, and never samples anything else.
"""

import dataclasses
from typing import Self

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from leon_jax.vocabulary import Vocabulary


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

    def bounds(self, vocabulary: Vocabulary) -> tuple[int, int]:
        """First and one-past-last id whose logits are computed."""
        return vocabulary.image_start, vocabulary.image_stop

    def allowed(self, vocabulary: Vocabulary, step: Int[Array, ""]) -> None:
        """None: every id within `bounds` may come at every step."""

    def ends(self, ids: Int[Array, "batch"]) -> Bool[Array, "batch"]:
        """Never: an image span ends by its length."""
        return jnp.zeros(ids.shape, bool)


@dataclasses.dataclass(frozen=True)
class TextSpan:
    """Text ids, ended by one of `stops` (not part of the answer) or by the length limit.

    Attributes:
      limit: most text ids.
      stops: ids that end the span: `<eoss>` for an infill; `</s>` or `<break>` at a document's end.
      least: a stop is not allowed before this many text ids.
      tokens: how many entries the text tokenizer has; ids of the text range beyond them mean
        nothing. None: as many as the range holds.

    Raises:
      ValueError: a limit is impossible, or there is no stop.
    """

    limit: int
    stops: tuple[int, ...]
    least: int = 1
    tokens: int | None = None

    def __post_init__(self):
        if not 0 <= self.least <= self.limit or self.limit < 1 or not self.stops:
            raise ValueError(
                f"a text span of {self.least} to {self.limit} tokens that stops at {self.stops}; "
                "it needs 0 <= least <= limit, limit >= 1 and a stop"
            )

    @classmethod
    def infill(cls, vocabulary: Vocabulary, limit: int, tokens: int | None = None) -> Self:
        """The answer of an infill, ended by `<eoss>`."""
        return cls(limit, (vocabulary.eoss,), tokens=tokens)

    @classmethod
    def causal(cls, vocabulary: Vocabulary, limit: int, tokens: int | None = None) -> Self:
        """The last part of a document, ended by `</s>` or `<break>`."""
        return cls(limit, (vocabulary.eos, vocabulary.break_id), tokens=tokens)

    def bounds(self, vocabulary: Vocabulary) -> tuple[int, int]:
        """First and one-past-last id whose logits are computed: the whole head."""
        return 0, vocabulary.size

    def allowed(self, vocabulary: Vocabulary, step: Int[Array, ""]) -> Bool[Array, "vocab"]:
        """True for text ids at every step, and for the stops from step `least` on."""
        text, stops = np.zeros((2, vocabulary.size), bool)
        text[vocabulary.text_start :][: self.tokens] = True
        stops[list(self.stops)] = True
        return jnp.asarray(text) | (jnp.asarray(stops) & (step >= self.least))

    def ends(self, ids: Int[Array, "batch"]) -> Bool[Array, "batch"]:
        """True where an id is one of the stops."""
        return (ids[:, None] == jnp.asarray(self.stops)[None, :]).any(axis=-1)


Span = ImageSpan | TextSpan
