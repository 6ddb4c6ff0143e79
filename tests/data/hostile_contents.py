"""Contents of hostile records for all formats; each has at most one error."""

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np

from tests.data.hostile_images import HOSTILE, USED, good

VALID = frozenset({USED})
NOT_UTF8 = frozenset({"not_utf8"})
MISSING = frozenset({"missing_field"})
UNREADABLE = frozenset({"unreadable_record"})
UNREADABLE_SHARD = frozenset({"unreadable_shard"})
UNSAFE = frozenset({"unsafe_name"})
RECORD_TOO_LARGE = frozenset({"record_too_large"})
NO_TEXT = frozenset({"no_text"})
TOO_LONG = frozenset({"text_too_long", "too_many_tokens"})

# The key of a record, or None if it is undetermined, and the acceptable outcomes: reasons, and
# `USED` if the record may be used.
Expected = tuple[str | None, frozenset[str]]


@dataclasses.dataclass(frozen=True)
class Content:
    """A caption (bytes if it is not valid Unicode), an image, a licence and expected outcomes."""

    text: str | bytes | None
    image: bytes | None
    licence: str | None
    expected: frozenset[str]


_TEXTS: list[tuple[str | bytes | None, frozenset[str]]] = [
    (None, MISSING),
    ("", NO_TEXT),
    (" \n\t\u3000", NO_TEXT),
    ("word " * 4_000, TOO_LONG),
    ("\U0001f408" * 60_000, TOO_LONG),
    ("a cat\0with a zero {}", VALID),
    ("\u202eright to left \u0627\u0644\u0642\u0637 {}", VALID),
    ("\U0001f469\u200d\U0001f680\ufe0f and \ufeff a mark {}", VALID),
    ("</s> <break> <image> {}", VALID),
    (b"\xff\xfe cat", NOT_UTF8),
    (b"an overlong \xc0\xaf", NOT_UTF8),
    (b"a surrogate \xed\xa0\x80", NOT_UTF8),
    (b"cut within \xf0\x9f\x90", NOT_UTF8),
    # Latin-1, as in older tables.
    ("el niño y la cigüeña".encode("latin-1"), NOT_UTF8),
]
_LICENCES: list[tuple[str | None, frozenset[str]]] = [
    (None, VALID),
    ("", VALID),
    ("CC0-1.0", VALID),
    ("all rights reserved!", frozenset({"licence_unknown"})),
    ("?", frozenset({"licence_unknown"})),
    ("CC-BY-NC-4.0", frozenset({"licence_not_allowed"})),
]


def caption(rng: np.random.Generator) -> str:
    """A valid and unique caption."""
    return f"a grey cat, number {rng.integers(2**62)}"


def contents(rng: np.random.Generator) -> Iterator[Content]:
    """Yields endless contents, also valid ones. The first two rounds have 5 MB captions."""
    for round_number in itertools.count():
        for make, expected in HOSTILE.values():
            yield Content(caption(rng), make(rng), "CC-BY-4.0", expected)
        for text, expected in _TEXTS:
            if isinstance(text, str):
                text = text.replace("{}", caption(rng))
            yield Content(text, good(rng), "CC-BY-4.0", expected)
        for licence, expected in _LICENCES:
            yield Content(caption(rng), good(rng), licence, expected)
        yield Content(caption(rng), None, "CC-BY-4.0", MISSING)
        if round_number < 2:
            yield Content("meow " * 2**20, good(rng), "CC-BY-4.0", RECORD_TOO_LARGE)
