"""CM3 masking: it is invertible, never crosses <break>, and has the documented distributions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from leon_jax.config import UserError
from leon_jax.data.masking import MaskingConfig, Span, apply_spans, find_segments, mask, unmask
from leon_jax.vocabulary import Vocabulary

VOCABULARY = Vocabulary.compact(image_codes=16, text_tokens=32, sentinels=8)
EOS, BREAK, EOSS = VOCABULARY.eos, VOCABULARY.break_id, VOCABULARY.eoss
S0, S1 = VOCABULARY.sentinel(0), VOCABULARY.sentinel(1)
TEXT, IMAGE = VOCABULARY.text_start, VOCABULARY.image_start


def document(*segments):
    """Ids of a document; a segment is (modality, length) and has consecutive ids."""
    ids = [EOS]
    for index, (modality, length) in enumerate(segments):
        start, size = (TEXT, 32) if modality == "text" else (IMAGE, 16)
        ids += [BREAK] if index else []
        ids += [start + i % size for i in range(length)]
    return np.array([*ids, EOS], np.int32)


PAIR = document(("text", 4), ("image", 9))

documents = st.lists(
    st.tuples(st.sampled_from(["text", "image"]), st.integers(0, 12)), min_size=1, max_size=6
).map(lambda segments: document(*segments))

configs = st.builds(
    MaskingConfig,
    spans=st.sampled_from(["poisson", "fixed", "fim"]),
    rate=st.sampled_from([0.0, 1.0, 4.0]),
    count=st.integers(0, 9),
    clamp_min=st.sampled_from([0, 1]),
    placement=st.sampled_from(["document", "segment"]),
    whole_segment=st.sampled_from([0.0, 0.5, 1.0]),
    query_text=st.sampled_from([0.0, 0.5, 1.0]),
)


def infills(ids):
    """The spans in the tail of a masked document."""
    tail = ids[np.flatnonzero(ids == EOS)[1] + 1 :]
    contents = np.split(tail, np.flatnonzero(tail == EOSS) + 1)
    assert len(contents[-1]) == 0
    return [content[1:-1] for content in contents[:-1]]


@settings(max_examples=300, deadline=None)
@given(documents, configs, st.integers(0, 2**32))
def test_masking_is_invertible_and_deterministic_with_spans_inside_segments(ids, config, seed):
    masked = mask(ids, VOCABULARY, config, np.random.default_rng(seed))
    np.testing.assert_array_equal(unmask(masked.ids, VOCABULARY), ids)
    again = mask(ids, VOCABULARY, config, np.random.default_rng(seed))
    np.testing.assert_array_equal(masked.ids, again.ids)
    assert masked.ids.dtype == np.int32 and masked.weights.dtype == np.float32
    assert masked.ids.shape == masked.weights.shape
    spans = infills(masked.ids)
    assert len(masked.ids) == len(ids) + 3 * len(spans)
    assert len(spans) <= VOCABULARY.sentinels - 1
    for span in spans:
        assert len(span) > 0 and not np.isin(span, [BREAK, EOS]).any()


@settings(max_examples=100, deadline=None)
@given(documents, configs, st.integers(0, 2**32), st.integers(0, 12))
def test_masking_adds_at_most_max_added_tokens(ids, config, seed, max_added):
    masked = mask(ids, VOCABULARY, config, np.random.default_rng(seed), max_added=max_added)
    assert len(masked.ids) <= len(ids) + max_added


def test_the_layout_of_a_masked_document():
    """The example of the module's docstring, with weights for sentinels and retrieved ids."""
    config = MaskingConfig(sentinel_weight=0.0, retrieved_weight=0.25)
    ids = document(("text", 2), ("image", 3), ("text", 2), ("image", 3))
    masked = apply_spans(ids, [Span(4, 6), Span(8, 10)], VOCABULARY, config, query_start=8)
    a, b, p, q, r = TEXT, TEXT + 1, IMAGE, IMAGE + 1, IMAGE + 2
    expected = [
        (EOS, 0.25), (a, 0.25), (b, 0.25), (BREAK, 0.25), (S0, 0), (r, 0.25), (BREAK, 0.25),
        (S1, 0), (BREAK, 1), (p, 1), (q, 1), (r, 1), (EOS, 1),
        (S0, 0), (p, 0.25), (q, 0.25), (EOSS, 0.25), (S1, 0), (a, 1), (b, 1), (EOSS, 1),
    ]  # fmt: skip
    assert masked.ids.tolist() == [token for token, _ in expected]
    np.testing.assert_allclose(masked.weights, [weight for _, weight in expected])


def test_all_weights_are_1_by_default():
    masked = mask(PAIR, VOCABULARY, MaskingConfig(), np.random.default_rng(0), query_start=5)
    assert (masked.weights == 1).all()


def count_spans(config, ids, samples=4000, query_start=1):
    rng = np.random.default_rng(0)
    return [
        len(infills(mask(ids, VOCABULARY, config, rng, query_start=query_start).ids))
        for _ in range(samples)
    ]


@pytest.mark.parametrize("placement", ["document", "segment"])
@pytest.mark.parametrize("clamp_min", [0, 1])
@pytest.mark.parametrize("whole_segment", [0.0, 0.5])
def test_the_number_of_spans_is_clamped_poisson(placement, clamp_min, whole_segment):
    config = MaskingConfig(
        rate=2.0, clamp_min=clamp_min, placement=placement, whole_segment=whole_segment
    )
    counts = count_spans(config, document(("text", 300), ("image", 300)))
    top = VOCABULARY.sentinels - 1
    poisson = stats.poisson(2.0)
    probabilities = poisson.pmf(np.arange(top + 1))
    probabilities[top] = poisson.sf(top - 1)
    if clamp_min:
        probabilities[1] += probabilities[0]
        probabilities[0] = 0
    seen = np.bincount(counts, minlength=top + 1)
    assert seen[probabilities == 0].sum() == 0
    expected = probabilities * len(counts)
    possible = expected > 0
    assert stats.chisquare(seen[possible], expected[possible]).pvalue > 1e-3


def test_fixed_and_fim_set_the_number_of_spans():
    ids = document(("text", 100), ("image", 100))
    assert set(count_spans(MaskingConfig(spans="fixed", count=3), ids, 200)) == {3}
    assert set(count_spans(MaskingConfig(spans="fim"), ids, 200)) == {1}


def test_span_ends_are_uniform_when_one_span_lies_in_one_segment():
    """Start and end are the order statistics of two uniform samples without replacement."""
    ids, config = document(("image", 15)), MaskingConfig(spans="fim", whole_segment=0.0)
    rng = np.random.default_rng(0)
    lengths = [len(infills(mask(ids, VOCABULARY, config, rng).ids)[0]) for _ in range(4000)]
    expected = np.arange(15, 0, -1) / 120  # 16 borders: 16 - n of 120 pairs are n apart
    seen = np.bincount(lengths, minlength=16)[1:]
    assert stats.chisquare(seen, expected * 4000).pvalue > 1e-3


def test_a_span_across_a_break_is_clipped_to_the_segment_it_overlaps_most():
    """With spans over the document, short captions get few of them."""
    ids, rng = document(("text", 4), ("image", 16)), np.random.default_rng(0)
    by_document = MaskingConfig(spans="fim", whole_segment=0.0)
    by_segment = MaskingConfig(spans="fim", whole_segment=0.0, placement="segment")

    def text_share(config):
        spans = [infills(mask(ids, VOCABULARY, config, rng).ids)[0] for _ in range(2000)]
        return np.mean([VOCABULARY.is_text(span[0]) for span in spans])

    # Spans over the document: of the 210 pairs of ends in 1..21, those that overlap the text most.
    pairs = [(i, j) for i in range(1, 22) for j in range(i + 1, 22)]
    overlap = [(min(j, 5) - min(i, 5), max(j, 6) - max(i, 6)) for i, j in pairs]
    overlap = [(text, image) for text, image in overlap if text or image]
    share = np.mean([text >= image for text, image in overlap])
    assert abs(text_share(by_document) - share) < 0.03
    assert abs(text_share(by_segment) - 0.5) < 0.04


def test_masking_creates_captioning_and_unconditional_prompts():
    """One whole segment is masked: the text of the query or a uniform one of four segments."""
    ids = document(("text", 4), ("image", 9), ("text", 5), ("image", 9))
    query_start = len(document(("text", 4), ("image", 9)))
    config = MaskingConfig(spans="fim", whole_segment=1.0, query_text=0.5)
    rng = np.random.default_rng(0)
    start, hits, images = ids[:query_start].tolist(), 0, 0
    for _ in range(4000):
        masked = mask(ids, VOCABULARY, config, rng, query_start=query_start).ids.tolist()
        hits += masked[: query_start + 2] == [*start, S0, BREAK]
        images += masked[-12:] == [EOS, S0, *range(IMAGE, IMAGE + 9), EOSS]
    assert stats.binomtest(hits, 4000, 0.5 + 0.5 / 4).pvalue > 1e-3
    assert stats.binomtest(images, 4000, 0.5 * 2 / 4).pvalue > 1e-3


def test_segments_are_not_empty_and_exclude_breaks():
    ids = np.array([EOS, TEXT, BREAK, BREAK, IMAGE, IMAGE, EOS], np.int32)
    assert find_segments(ids, VOCABULARY) == [Span(1, 2), Span(4, 6)]


@pytest.mark.parametrize(
    "ids",
    [[], [EOS], [TEXT, EOS], [EOS, TEXT], [EOS, S0, EOS], [EOS, EOSS, EOS]],
)
def test_masking_invalid_ids_raises_an_error(ids):
    with pytest.raises(ValueError):
        mask(np.array(ids, np.int32), VOCABULARY, MaskingConfig(), np.random.default_rng(0))


@pytest.mark.parametrize(
    "ids",
    [
        [EOS, TEXT],
        [EOS, S0, EOS],
        [EOS, S0, EOS, S0, TEXT],
        [EOS, S1, EOS, S1, TEXT, EOSS],
        [EOS, TEXT, EOS, S0, TEXT, EOSS],
        [EOS, S0, EOS, S0, TEXT, EOSS, TEXT],
    ],
)
def test_unmasking_invalid_ids_raises_an_error(ids):
    with pytest.raises(ValueError):
        unmask(np.array(ids, np.int32), VOCABULARY)


def test_invalid_settings_raise_an_error():
    with pytest.raises(UserError, match=r"whole_segment is 1\.5"):
        MaskingConfig(whole_segment=1.5)
    with pytest.raises(UserError, match="clamp_min is 2"):
        MaskingConfig(clamp_min=2)
    with pytest.raises(UserError, match="rate is -1"):
        MaskingConfig(rate=-1)
