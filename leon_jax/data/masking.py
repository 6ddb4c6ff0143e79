"""The CM3 objective: masks spans of a document, so that the model learns to infill them.

A document holds the retrieved documents first and the query last:

    </s> caption A <break> image A <break> caption Q <break> image Q </s>

Masking replaces spans by sentinels, numbered from the left. The spans follow the closing `</s>` in
the same order, each between its sentinel and `<eoss>`:

    </s> caption A <break> image A <break> <sentinel:0> <break> image Q </s>
        <sentinel:0> caption Q <eoss>

So `</s>` always ends the document, whether or not masked spans follow, and a document with
sentinels is encoded like any other document. At inference:

    captioning     </s> [docs <break>] <sentinel:0> <break> image </s> <sentinel:0>  -> <eoss>
    text to image  </s> [docs <break>] text <break>                                  -> image
    unconditional  </s> [docs <break>] <sentinel:0> <break>                          -> image
    infilling      </s> [docs <break>] parts with sentinels </s> <sentinel:0>        -> <eoss>,
                   then <sentinel:1> -> <eoss>, ... in order

A causal continuation of the last part ends with `</s>`, for an image after the fixed number of
image ids.

The following is as in metaseq's CM3Leon branch: the number of spans (Poisson(1), clamped to
0..sentinels - 1), uniform span ends, clipping a span to the segment that it overlaps most (so that
no span crosses `<break>`), and masking whole segments with some probability. There are two
differences. Metaseq masks blocks of a stream and truncates the source to fit the spans; here each
document is masked separately and nothing is truncated. Metaseq rejects overlapping spans one by
one and may return fewer spans; here the ends of all spans are sampled at once and paired in order,
which is the distribution of n uniform spans conditioned on being disjoint.

The `<mask>` and `<infill>` of the paper are the first and the second occurrence of one sentinel.
"""

import dataclasses
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float32, Int, Int32

from leon_jax.config import UserError
from leon_jax.vocabulary import Vocabulary

# Masking a span adds two sentinels and <eoss>.
TOKENS_PER_SPAN = 3

# How often spans are sampled again, if some lie outside all segments, before fewer are accepted.
_ATTEMPTS = 64


@dataclasses.dataclass(frozen=True)
class MaskingConfig:
    """Settings of `mask`.

    Attributes:
      spans: distribution of the number of spans: "poisson" samples Poisson(`rate`), "fixed" is
        always `count`, "fim" (fill in the middle) is always one.
      rate: mean of the Poisson distribution before clamping.
      count: number of spans for "fixed".
      clamp_min: minimum number of spans: 0 as in metaseq (37 % of documents stay causal), or 1 as
        in the CM3 paper.
      placement: where spans lie. "document" samples the ends uniformly over the document and clips
        a span to the segment that it overlaps most, so long segments get nearly all spans
        (metaseq). "segment" first samples a segment uniformly, so captions get as many spans as
        images.
      whole_segment: probability that whole segments are masked instead of spans. At 0 the model
        would see no prompts for captioning and unconditional generation.
      query_text: probability that the first masked whole segment is a text of the query, as in
        prompts for captioning and unconditional generation. Otherwise it is a uniform segment.
      sentinel_weight: loss weight of sentinels; 0 in the CM3 paper, 1 in CM3Leon.
      retrieved_weight: loss weight of retrieved documents; 1 in CM3Leon, 0.1 in RA-CM3.

    Raises:
      UserError: a probability, a weight or a count is out of range.
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
    """A half-open range of positions in the ids of a document."""

    start: int
    stop: int


class Masked(NamedTuple):
    """A masked document.

    Attributes:
      ids: the source with sentinels, then the tail with the masked spans.
      weights: loss weight of predicting each id; the first id is never predicted.
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
    max_added: int | None = None,
) -> Masked:
    """Masks random spans of a document.

    Args:
      ids: `</s> segment <break> segment ... </s>`.
      vocabulary: the id layout.
      config: settings of the objective.
      rng: source of all random numbers.
      query_start: position of the first id of the query; earlier segments were retrieved.
      max_added: maximum number of tokens that masking may add; None means no limit. It limits the
        number of spans.

    Raises:
      ValueError: the ids do not begin and end with `</s>`, or already hold sentinels.
    """
    ids = np.asarray(ids, np.int32)
    segments = find_segments(ids, vocabulary)
    count = sample_count(vocabulary, config, rng)
    if max_added is not None:
        count = min(count, max_added // TOKENS_PER_SPAN)
    spans = sample_spans(ids, segments, count, vocabulary, config, rng, query_start)
    return apply_spans(ids, spans, vocabulary, config, query_start)


def find_segments(ids: Int[np.ndarray, "length"], vocabulary: Vocabulary) -> list[Span]:
    """Returns the non-empty spans between `</s>` and `<break>`, left to right.

    Raises:
      ValueError: the ids do not begin and end with `</s>`, or already hold sentinels.
    """
    if len(ids) < 2 or ids[0] != vocabulary.eos or ids[-1] != vocabulary.eos:
        raise ValueError("a document to mask must begin and end with </s>")
    if vocabulary.is_sentinel(ids).any() or (ids == vocabulary.eoss).any():
        raise ValueError("the document holds <sentinel> or <eoss>, so it is already masked")
    borders = np.flatnonzero((ids == vocabulary.eos) | (ids == vocabulary.break_id))
    pairs = zip(borders[:-1] + 1, borders[1:], strict=True)
    return [Span(int(start), int(stop)) for start, stop in pairs if start < stop]


def sample_count(vocabulary: Vocabulary, config: MaskingConfig, rng: np.random.Generator) -> int:
    """Samples the number of spans to mask, clamped to clamp_min..sentinels - 1."""
    match config.spans:
        case "poisson":
            count = int(rng.poisson(config.rate))
        case "fixed":
            count = config.count
        case "fim":
            count = 1
    return min(max(count, config.clamp_min), vocabulary.sentinels - 1)


def sample_spans(
    ids: Int[np.ndarray, "length"],
    segments: list[Span],
    count: int,
    vocabulary: Vocabulary,
    config: MaskingConfig,
    rng: np.random.Generator,
    query_start: int,
) -> list[Span]:
    """Samples `count` disjoint spans, each inside one segment; fewer in tiny documents.

    The spans are sorted from left to right.
    """
    # Always sample these, so that a setting does not change the random numbers of other settings.
    whole, text, order = rng.random(), rng.random(), rng.permutation(len(segments))
    if count == 0 or not segments:
        return []
    if whole < config.whole_segment and count <= len(segments):
        shuffled = [segments[index] for index in order]
        texts = [
            span
            for span in shuffled
            if span.start >= query_start and vocabulary.is_text(ids[span.start])
        ]
        if texts and text < config.query_text:
            shuffled.remove(texts[0])
            shuffled.insert(0, texts[0])
        return sorted(shuffled[:count])
    sample = _over_document if config.placement == "document" else _over_segments
    for _ in range(_ATTEMPTS):
        spans = sample(ids, segments, count, rng)
        if len(spans) == count:
            break
    return spans


def apply_spans(
    ids: Int[np.ndarray, "length"],
    spans: list[Span],
    vocabulary: Vocabulary,
    config: MaskingConfig,
    query_start: int = 1,
) -> Masked:
    """Masks given spans of a document.

    Args:
      ids: `</s> segment <break> segment ... </s>`.
      spans: disjoint spans, left to right.
      vocabulary: the id layout.
      config: the loss weights.
      query_start: position of the first id of the query.
    """
    weights = np.ones(len(ids), np.float32)
    weights[:query_start] = config.retrieved_weight
    source, tail, end = [], [], 0
    for index, span in enumerate(spans):
        weight = weights[span.start]
        sentinel = _piece([vocabulary.sentinel(index)], weight * config.sentinel_weight)
        source += [(ids[end : span.start], weights[end : span.start]), sentinel]
        masked = (ids[span.start : span.stop], weights[span.start : span.stop])
        tail += [sentinel, masked, _piece([vocabulary.eoss], weight)]
        end = span.stop
    source.append((ids[end:], weights[end:]))
    pieces = source + tail
    return Masked(
        np.concatenate([piece_ids for piece_ids, _ in pieces]).astype(np.int32),
        np.concatenate([piece_weights for _, piece_weights in pieces]),
    )


def unmask(ids: Int[np.ndarray, "masked"], vocabulary: Vocabulary) -> Int32[np.ndarray, "length"]:
    """Restores the document from a masked one; this is the inverse of `mask`.

    Raises:
      ValueError: the ids are not a source in `</s>` followed by a complete tail.
    """
    ids = np.asarray(ids, np.int32)
    ends = np.flatnonzero(ids == vocabulary.eos)
    if len(ends) != 2 or ends[0] != 0:
        raise ValueError("a masked document is </s> source </s> tail, with exactly two </s>")
    source, tail = ids[: ends[1] + 1], ids[ends[1] + 1 :]
    pieces, end = [], 0
    for index, position in enumerate(np.flatnonzero(vocabulary.is_sentinel(source))):
        sentinel = vocabulary.sentinel(index)
        stops = np.flatnonzero(tail == vocabulary.eoss)
        if source[position] != sentinel or not len(tail) or tail[0] != sentinel or not len(stops):
            raise ValueError(f"the tail does not fill sentinel {index} of the source")
        pieces += [source[end:position], tail[1 : stops[0]]]
        tail, end = tail[stops[0] + 1 :], int(position) + 1
    if len(tail):
        raise ValueError(f"the tail has {len(tail)} ids after the span of the last sentinel")
    return np.concatenate([*pieces, source[end:]])


def _over_document(ids, segments, count, rng) -> list[Span]:
    """Samples ends uniformly and clips each span to the segment that it overlaps most."""
    if 2 * count > len(ids) - 1:
        count = (len(ids) - 1) // 2
    ends = np.sort(rng.choice(np.arange(1, len(ids)), 2 * count, replace=False)).reshape(-1, 2)
    spans = []
    for start, stop in ends.tolist():
        clipped = [Span(max(start, segment.start), min(stop, segment.stop)) for segment in segments]
        longest = max(clipped, key=lambda span: span.stop - span.start)
        if longest.start < longest.stop:
            spans.append(longest)
    return spans


def _over_segments(ids, segments, count, rng) -> list[Span]:
    """Samples a segment uniformly for each span, then the ends within the segment."""
    counts = np.bincount(rng.integers(len(segments), size=count), minlength=len(segments))
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
