"""The CM3 objective: a document becomes an infilling instance of itself, or stays as it is.

A document of ids, retrieved documents first and the query last, is

    </s> caption A <break> picture A <break> caption Q <break> picture Q </s>

Masking replaces spans by sentinels, counted from the left, and appends the spans in the same order
after the closing `</s>`, each between its sentinel and `<eoss>`:

    </s> caption A <break> picture A <break> <sentinel:0> <break> picture Q </s>
        <sentinel:0> caption Q <eoss>

`</s>` therefore always means "the document, with its holes, is complete", whether or not a tail
follows, and a document with holes is encoded exactly like any other document. At inference:

    captioning       </s> [docs <break>] <sentinel:0> <break> picture </s> <sentinel:0>  -> <eoss>
    text to picture  </s> [docs <break>] text <break>                                    -> picture
    unconditional    </s> [docs <break>] <sentinel:0> <break>                            -> picture
    infilling        </s> [docs <break>] parts with sentinels </s> <sentinel:0>          -> <eoss>,
                     then <sentinel:1> -> <eoss>, ... in order

A causal continuation of the last part ends in `</s>` (text) or after the fixed number of image ids
and `</s>` (picture).

What follows metaseq's CM3Leon branch: the number of spans (Poisson(1), clamped to
0..sentinels - 1), uniform span ends, a span clipped to the one segment it overlaps most (so that
none crosses `<break>`), whole segments with some probability. What differs: metaseq masks blocks
cut from a stream and truncates the source to make room; here every document is masked by itself
and nothing is truncated. Metaseq rejects overlapping spans one by one and may end with fewer; here
the ends of all spans are drawn at once and paired in order, which is the law of n uniform spans
given that they are disjoint.

In the paper, `<mask>` and `<infill>` are the first and the second use of one sentinel.
"""

import dataclasses
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float32, Int, Int32

from leon_jax.config import UserError
from leon_jax.vocabulary import Vocabulary

# Masking one span adds its two sentinels and <eoss>, and one token is never lost.
TOKENS_PER_SPAN = 3

# How often spans that miss every segment are drawn again before their number is reduced.
_ATTEMPTS = 64


@dataclasses.dataclass(frozen=True)
class MaskingConfig:
    """Settings of `mask`.

    Attributes:
      spans: how many spans: "poisson" draws Poisson(`rate`), "fixed" always takes `count`, "fim"
        (fill in the middle) always one.
      rate: mean of the Poisson distribution before clamping.
      count: the number of spans of "fixed".
      clamp_min: 0 as in metaseq (37 % of documents stay causal), 1 as in the CM3 paper.
      placement: where a span lies: "document" draws its ends uniformly over the document and clips
        it to the segment it overlaps most, so long segments get nearly all spans (metaseq);
        "segment" first picks a segment, all alike, so captions get as many spans as pictures.
      whole_segment: probability that a masked document loses whole segments instead of spans.
        Without it the model would meet neither captioning nor unconditional prompts.
      query_text: probability that the first whole segment is a text of the query, which is what
        both captioning and unconditional generation need; otherwise any segment, all alike.
      sentinel_weight: loss weight of sentinels; 0 in the CM3 paper, 1 in CM3Leon.
      retrieved_weight: loss weight of retrieved documents; 1 in CM3Leon, 0.1 in RA-CM3.

    Raises:
      UserError: a probability or weight out of range, or an impossible count.
    """

    spans: Literal["poisson", "fixed", "fim"] = "poisson"
    rate: float = 1.0
    count: int = 1
    clamp_min: int = 0
    placement: Literal["document", "segment"] = "document"
    whole_segment: float = 0.5
    query_text: float = 0.5
    sentinel_weight: float = 1.0
    retrieved_weight: float = 1.0

    def __post_init__(self):
        for name in ("whole_segment", "query_text"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be between 0 and 1")
        for name in ("rate", "count", "sentinel_weight", "retrieved_weight"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must not be negative")
        if self.clamp_min not in (0, 1):
            raise UserError(f"clamp_min is {self.clamp_min}; it must be 0 or 1")


class Span(NamedTuple):
    """Half-open range of positions of a document's ids."""

    start: int
    stop: int


class Masked(NamedTuple):
    """An infilling instance.

    Attributes:
      ids: the source with sentinels, then the tail.
      weights: loss weight of *predicting* each id; the first is never predicted.
    """

    ids: Int32[np.ndarray, "masked"]
    weights: Float32[np.ndarray, "masked"]


def mask(
    ids: Int[np.ndarray, "length"],
    vocabulary: Vocabulary,
    config: MaskingConfig,
    rng: np.random.Generator,
    *,
    query_start: int = 1,
    room: int | None = None,
) -> Masked:
    """One random infilling instance of a document.

    Args:
      ids: `</s> segment <break> segment ... </s>`.
      vocabulary: the id layout.
      config: the objective's settings.
      rng: where all randomness comes from.
      query_start: position of the query's first id; what lies before it was retrieved.
      room: how many tokens longer the instance may be; None: no limit. Fewer spans are masked
        where it is short.

    Raises:
      ValueError: the ids do not begin and end with `</s>`, or already hold sentinels.
    """
    ids = np.asarray(ids, np.int32)
    segments = find_segments(ids, vocabulary)
    number = draw_number(vocabulary, config, rng)
    if room is not None:
        number = min(number, room // TOKENS_PER_SPAN)
    spans = draw_spans(ids, segments, number, vocabulary, config, rng, query_start)
    return apply_spans(ids, spans, vocabulary, config, query_start)


def find_segments(ids: Int[np.ndarray, "length"], vocabulary: Vocabulary) -> list[Span]:
    """The non-empty stretches between `</s>` and `<break>`, left to right.

    Raises:
      ValueError: the ids do not begin and end with `</s>`, or already hold sentinels.
    """
    if len(ids) < 2 or ids[0] != vocabulary.eos or ids[-1] != vocabulary.eos:
        raise ValueError("a document to mask must begin and end with </s>")
    if vocabulary.is_sentinel(ids).any() or (ids == vocabulary.eoss).any():
        raise ValueError("the document holds <sentinel> or <eoss>: it was masked before")
    borders = np.flatnonzero((ids == vocabulary.eos) | (ids == vocabulary.break_id))
    pairs = zip(borders[:-1] + 1, borders[1:], strict=True)
    return [Span(int(start), int(stop)) for start, stop in pairs if start < stop]


def draw_number(vocabulary: Vocabulary, config: MaskingConfig, rng: np.random.Generator) -> int:
    """How many spans to mask, clamped to clamp_min..sentinels - 1."""
    match config.spans:
        case "poisson":
            number = int(rng.poisson(config.rate))
        case "fixed":
            number = config.count
        case "fim":
            number = 1
    return min(max(number, config.clamp_min), vocabulary.sentinels - 1)


def draw_spans(
    ids: Int[np.ndarray, "length"],
    segments: list[Span],
    number: int,
    vocabulary: Vocabulary,
    config: MaskingConfig,
    rng: np.random.Generator,
    query_start: int,
) -> list[Span]:
    """`number` disjoint spans, each inside one segment, left to right; fewer in tiny documents."""
    # Three random numbers are drawn whatever the outcome, so settings do not shift one another.
    whole, text, order = rng.random(), rng.random(), rng.permutation(len(segments))
    if number == 0 or not segments:
        return []
    if whole < config.whole_segment and number <= len(segments):
        chosen = [segments[i] for i in order]
        texts = [
            span
            for span in chosen
            if span.start >= query_start and vocabulary.is_text(ids[span.start])
        ]
        if texts and text < config.query_text:
            chosen.remove(texts[0])
            chosen.insert(0, texts[0])
        return sorted(chosen[:number])
    draw = _over_document if config.placement == "document" else _over_segments
    for _ in range(_ATTEMPTS):
        spans = draw(ids, segments, number, rng)
        if len(spans) == number:
            break
    return spans


def apply_spans(
    ids: Int[np.ndarray, "length"],
    spans: list[Span],
    vocabulary: Vocabulary,
    config: MaskingConfig,
    query_start: int = 1,
) -> Masked:
    """Source and tail for given spans (disjoint, left to right), with loss weights."""
    own = np.ones(len(ids), np.float32)
    own[:query_start] = config.retrieved_weight
    source, tail, end = [], [], 0
    for index, span in enumerate(spans):
        weight = own[span.start]
        sentinel = _piece([vocabulary.sentinel(index)], weight * config.sentinel_weight)
        source += [(ids[end : span.start], own[end : span.start]), sentinel]
        inside = (ids[span.start : span.stop], own[span.start : span.stop])
        tail += [sentinel, inside, _piece([vocabulary.eoss], weight)]
        end = span.stop
    source.append((ids[end:], own[end:]))
    pieces = source + tail
    return Masked(
        np.concatenate([ids for ids, _ in pieces]).astype(np.int32),
        np.concatenate([weights for _, weights in pieces]),
    )


def unmask(ids: Int[np.ndarray, "masked"], vocabulary: Vocabulary) -> Int32[np.ndarray, "length"]:
    """The document whose infilling instance this is; the inverse of `mask`.

    Raises:
      ValueError: the ids are not a source in `</s>` followed by a complete tail.
    """
    ids = np.asarray(ids, np.int32)
    ends = np.flatnonzero(ids == vocabulary.eos)
    if len(ends) != 2 or ends[0] != 0:
        raise ValueError("an infilling instance is </s> source </s> tail; it has exactly two </s>")
    source, tail = ids[: ends[1] + 1], ids[ends[1] + 1 :]
    pieces, end = [], 0
    for index, hole in enumerate(np.flatnonzero(vocabulary.is_sentinel(source))):
        sentinel = vocabulary.sentinel(index)
        stops = np.flatnonzero(tail == vocabulary.eoss)
        if source[hole] != sentinel or len(tail) == 0 or tail[0] != sentinel or len(stops) == 0:
            raise ValueError(f"hole {index} of the source is not filled by the tail")
        pieces += [source[end:hole], tail[1 : stops[0]]]
        tail, end = tail[stops[0] + 1 :], int(hole) + 1
    if len(tail):
        raise ValueError(f"the tail holds {len(tail)} ids more than the source has holes for")
    return np.concatenate([*pieces, source[end:]])


def _over_document(ids, segments, number, rng) -> list[Span]:
    """Ends uniform over the document, each span clipped to the segment it overlaps most."""
    if 2 * number > len(ids) - 1:
        number = (len(ids) - 1) // 2
    ends = np.sort(rng.choice(np.arange(1, len(ids)), 2 * number, replace=False)).reshape(-1, 2)
    spans = []
    for start, stop in ends.tolist():
        clipped = [Span(max(start, s.start), min(stop, s.stop)) for s in segments]
        best = max(clipped, key=lambda span: span.stop - span.start)
        if best.start < best.stop:
            spans.append(best)
    return spans


def _over_segments(ids, segments, number, rng) -> list[Span]:
    """Each span in a segment of its own draw, all segments alike."""
    counts = np.bincount(rng.integers(len(segments), size=number), minlength=len(segments))
    spans = []
    for segment, count in zip(segments, counts.tolist(), strict=True):
        size = segment.stop - segment.start
        count = min(count, (size + 1) // 2)
        if count == 0:
            continue
        ends = rng.choice(np.arange(segment.start, segment.stop + 1), 2 * count, replace=False)
        spans += [Span(*pair) for pair in np.sort(ends).reshape(-1, 2).tolist()]
    return spans


def _piece(ids: list[int], weight: float):
    return np.array(ids, np.int32), np.full(len(ids), weight, np.float32)
