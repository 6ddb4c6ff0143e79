"""The selection rules of CM3Leon. Each test fails if its rule is left out."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leon_jax.config import UserError
from leon_jax.documents import Document, Image, Provenance, Text
from leon_jax.retrieval.neighbour_selection import (
    SelectionConfig,
    drop_tokens,
    find_neighbours,
    sample_neighbours,
    select,
    select_diverse,
    text_and_pixels,
)
from leon_jax.retrieval.vector_index import VectorIndex


class Words:
    """A tokenizer with one token for each word."""

    def __init__(self):
        self.words = []

    def encode(self, text):
        for word in text.split():
            if word not in self.words:
                self.words.append(word)
        return [self.words.index(word) for word in text.split()]

    def decode(self, ids):
        return " ".join(self.words[i] for i in ids)


def at(*degrees):
    """Unit vectors in the plane, one for each angle."""
    radians = np.deg2rad(np.array(degrees))
    return np.stack([np.cos(radians), np.sin(radians)], 1).astype(np.float32)


def index_of(rows):
    return VectorIndex([rows])


NO_LIMIT = SelectionConfig(per_modality=2, near_copy_query=2, near_copy_document=2, query_dropout=0)


def test_relevance_the_best_scoring_documents_are_selected_in_order():
    index = index_of(at(50, 10, 90, 30))
    assert select(at(0)[0], index, 3, NO_LIMIT) == [1, 3, 0]


def test_diversity_a_near_copy_of_the_query_is_skipped():
    index, query = index_of(at(1, 40, 60)), at(0)[0]
    config = dataclasses.replace(NO_LIMIT, near_copy_query=0.99)
    assert select(query, index, 1, config, document=query) == [1]
    assert select(query, index, 1, NO_LIMIT, document=query) == [0]
    # The query may be a part of the document. Only the whole document is compared.
    assert select(at(40)[0], index, 2, config, document=query) == [1, 2]
    assert select(query, index, 1, config) == [0]


def test_diversity_a_near_copy_of_a_chosen_document_is_skipped():
    index = index_of(at(30, 31, -60))
    config = SelectionConfig(per_modality=2, near_copy_document=0.99)
    assert select(at(0)[0], index, 2, config) == [0, 2]
    assert select(at(0)[0], index, 2, NO_LIMIT) == [0, 1]


def test_the_thresholds_are_clips_by_default():
    index, query = index_of(at(20, 30)), at(0)[0]  # cosines 0.94 and 0.87, 0.98 with each other
    assert select(query, index, 2, document=query) == [1]
    assert select(query, index, 2) == [0]


def test_excluded_ids_and_missing_candidates_are_never_chosen():
    embeddings = at(10, 20, 30)
    assert select(at(0)[0], index_of(embeddings), 3, NO_LIMIT, exclude=[1]) == [0, 2]
    ids = np.array([2, -1], np.int32)
    assert select_diverse(ids, embeddings[ids], 2, NO_LIMIT) == [0]


def test_k_of_zero_selects_no_documents():
    assert select(at(0)[0], index_of(at(10)), 0) == []


def neighbours(queries, rows, config, **arguments):
    return find_neighbours(queries, index_of(rows), config, **arguments)


def test_a_table_has_the_best_documents_of_each_query_and_their_scores():
    ids, scores = neighbours(at(45, 85), at(45, 55, 65, 75, 85), NO_LIMIT)
    assert ids.tolist() == [[0, 1], [4, 3]]
    assert ids.dtype == np.int32 and scores.dtype == np.float32
    np.testing.assert_allclose(scores, np.cos(np.deg2rad([[0, 10], [0, 10]])), atol=1e-6)


def test_a_document_is_never_its_own_neighbour():
    rows = at(10, 20, 30)
    ids, _ = neighbours(rows, rows, NO_LIMIT, query_ids=np.arange(3))
    assert (ids != np.arange(3)[:, None]).all() and (ids >= 0).all()
    ids, _ = neighbours(rows, rows, NO_LIMIT, query_ids=np.array([-1, 1, -1]))
    assert ids[:, 0].tolist() == [0, 0, 2]


def test_a_document_outside_the_keep_mask_is_never_a_neighbour():
    ids, _ = neighbours(at(0), at(0, 10, 20, 30), NO_LIMIT, keep=np.array([0, 1, 0, 1], bool))
    assert ids.tolist() == [[1, 3]]


def test_near_copies_of_the_query_document_are_skipped_even_if_its_part_is_far_from_them():
    rows, config = at(10, 70), dataclasses.replace(NO_LIMIT, near_copy_query=0.9)
    ids, _ = neighbours(at(50, 50), rows, config, documents=at(5, 40))
    assert ids.tolist() == [[1, -1], [1, 0]]
    assert neighbours(at(50), rows, config)[0].tolist() == [[1, 0]]
    assert neighbours(at(50), rows, NO_LIMIT, documents=at(5))[0].tolist() == [[1, 0]]


def test_with_clip_scores_neither_the_image_nor_another_caption_of_it_is_selected():
    # CLIP scores parts of one document about 0.3, and captions of one image about 0.8.
    image, caption = np.array([1, 0, 0, 0.0]), np.array([0.3, 0.954, 0, 0])
    other = np.array([0.3, 0.749, 0.59, 0])
    stranger = np.array([0.6, 0.1, 0, 0.79])

    def document(text):
        return ((text + image) / np.linalg.norm(text + image)).astype(np.float32)

    rows = np.stack([document(caption), document(other), stranger])
    assert rows[0] @ rows[1] > 0.9 > (rows @ np.stack([image, caption], 1)).max()
    rows = rows.astype(np.float32)
    for part in (image, caption):
        ids, _ = neighbours(
            part[None], rows, SelectionConfig(2), documents=rows[:1], query_ids=np.array([0])
        )
        assert ids.tolist() == [[2, -1]]


def test_with_too_few_different_documents_the_row_ends_in_minus_one():
    config = dataclasses.replace(NO_LIMIT, near_copy_document=0.99)
    ids, scores = neighbours(at(50), at(10, 11), config)
    assert ids.tolist() == [[1, -1]]
    assert np.isneginf(scores[0, 1])


def test_a_query_of_zeros_has_no_neighbours():
    queries = np.concatenate([at(0), np.zeros((1, 2), np.float32), at(90)])
    ids, scores = neighbours(queries, at(0, 90), NO_LIMIT, query_ids=np.array([0, 1, 1]))
    assert ids.tolist() == [[1, -1], [-1, -1], [0, -1]]
    assert np.isneginf(scores[1]).all()
    ids, _ = neighbours(np.zeros((2, 2), np.float32), at(0, 90), NO_LIMIT)
    assert (ids == -1).all()


@st.composite
def collections(draw):
    """Rows in clusters, with duplicates and sources, and a configuration of the selection."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    centres = rng.normal(size=(6, 8))
    rows = centres[rng.integers(0, 6, 60)] + rng.normal(
        0, draw(st.sampled_from([0.1, 0.5])), (60, 8)
    )
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    rows[rng.integers(0, 60, 20)] = rows[rng.integers(0, 60, 20)]
    config = SelectionConfig(
        per_modality=draw(st.sampled_from([2, 20])),
        candidates=draw(st.sampled_from([20, 64])),
        near_copy_query=draw(st.sampled_from([0.6, 0.95, 2.0])),
        near_copy_document=draw(st.sampled_from([0.5, 0.9, 2.0])),
        alternate_sources=draw(st.booleans()),
    )
    query_ids = rng.integers(-1, 60, 9).astype(np.int32)
    return (
        rows.astype(np.float16),
        config,
        rows[rng.integers(0, 60, 9)].astype(np.float32),
        query_ids,
        rng.integers(0, 3, 60),
        rng.random(60) < 0.8,
    )


@settings(max_examples=60, deadline=None)
@given(collections())
def test_many_queries_have_the_neighbours_of_each_query_alone(case):
    rows, config, documents, query_ids, sources, keep = case
    index, queries = index_of(rows), rows[:9].astype(np.float32)
    ids, scores = find_neighbours(
        queries, index, config,
        documents=documents, query_ids=query_ids, sources=sources, keep=keep,
    )  # fmt: skip
    candidate_scores, candidates = index.search(
        queries, config.candidates, exclude=query_ids, keep=keep
    )
    for row in range(9):
        chosen = select_diverse(
            candidates[row], index.take(candidates[row]), config.per_modality, config,
            documents[row], source_of=lambda row_id: str(sources[row_id]),
        )  # fmt: skip
        missing = config.per_modality - len(chosen)
        assert ids[row].tolist() == [*candidates[row][chosen], *[-1] * missing]
        expected = [*candidate_scores[row][chosen], *[-np.inf] * missing]
        np.testing.assert_array_equal(scores[row], expected)
    is_neighbour = ids >= 0
    assert keep[ids[is_neighbour]].all() and (ids != query_ids[:, None])[is_neighbour].all()
    copies = np.einsum("qad,qd->qa", index.take(ids), documents)
    assert (copies[is_neighbour] <= config.near_copy_query + 1e-6).all()
    alike = np.einsum("qad,qbd->qab", index.take(ids), index.take(ids))
    alike[:, np.arange(config.per_modality), np.arange(config.per_modality)] = 0
    assert (alike <= config.near_copy_document + 1e-6).all()


@settings(max_examples=30, deadline=None)
@given(collections())
def test_the_choice_of_twenty_begins_with_the_choice_of_two(case):
    rows, config, documents, query_ids, sources, keep = case
    queries = rows[:9].astype(np.float32)
    twenty, two = (
        neighbours(
            queries, rows, dataclasses.replace(config, per_modality=number),
            documents=documents, query_ids=query_ids, sources=sources, keep=keep,
        )
        for number in (20, 2)
    )  # fmt: skip
    np.testing.assert_array_equal(twenty[0][:, :2], two[0])
    np.testing.assert_array_equal(twenty[1][:, :2], two[1])


def test_the_candidates_may_come_from_an_approximate_search():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(500, 16))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)
    queries, ids = rows[:50].astype(np.float32), {}
    for recall in (1.0, 0.95):
        config = dataclasses.replace(NO_LIMIT, per_modality=20, recall=recall)
        ids[recall] = neighbours(queries, rows, config)[0]
    same = [len(set(a) & set(b)) for a, b in zip(*ids.values(), strict=True)]
    assert np.mean(same) > 19


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"query_ids": np.arange(2)}, r"query_ids is \[2\]; 3 queries need one id each"),
        ({"sources": np.arange(2)}, "2 sources were given for the 4 documents"),
        ({}, "no sources were given for the 4 documents"),
        ({"sources": np.zeros(4), "keep": np.ones(3, bool)}, r"keep is bool\[3\]"),
    ],
)
def test_arguments_that_do_not_fit_are_rejected(arguments, message):
    config = dataclasses.replace(NO_LIMIT, alternate_sources=True)
    with pytest.raises(UserError, match=message):
        neighbours(at(1, 2, 3), at(1, 2, 3, 4), config, **arguments)


def test_query_dropout_drops_a_fifth_of_the_tokens_but_never_all():
    rng, words = np.random.default_rng(0), Words()
    text = " ".join(str(i) for i in range(10_000))
    remaining = drop_tokens(text, words, 0.2, rng).split()
    assert len(remaining) == pytest.approx(8000, abs=150)
    assert remaining == sorted(remaining, key=int)
    assert all(drop_tokens("1 2", words, 0.99, rng) in ("1", "2", "1 2") for _ in range(50))
    assert drop_tokens("", words, 0.5, rng) == ""
    assert drop_tokens("1 2 3", words, 0.0, rng) == "1 2 3"


def test_up_to_three_distinct_neighbours_are_sampled_in_random_order():
    by_text, by_image = np.array([4, 7], np.int32), np.array([7, 9], np.int32)
    samples = [
        tuple(sample_neighbours(np.random.default_rng(seed), by_text, by_image, 2))
        for seed in range(60)
    ]
    assert set(samples) == {(4, 7), (7, 4), (4, 9), (9, 4), (7, 9), (9, 7)}
    everything = sample_neighbours(np.random.default_rng(0), by_text, by_image, 3)
    assert sorted(everything) == [4, 7, 9]
    nothing = np.array([-1, -1], np.int32)
    assert sample_neighbours(np.random.default_rng(0), nothing, nothing, 3) == []
    assert sample_neighbours(np.random.default_rng(0), by_text, nothing, 0) == []


def test_only_the_best_of_a_longer_table_are_sampled():
    long, short = np.arange(20, dtype=np.int32), np.arange(2, dtype=np.int32)
    for seed in range(5):
        sample, expected = (
            sample_neighbours(np.random.default_rng(seed), ids, ids + 20, 3, per_modality)
            for ids, per_modality in ((long, 2), (short, None))
        )
        assert sample == expected
    everything = sample_neighbours(np.random.default_rng(0), long, long + 20, 40)
    assert sorted(everything) == list(range(40))


def test_the_text_and_the_pixels_of_a_document():
    pixels = np.zeros((2, 2, 3), np.uint8)
    document = Document(
        (Text("a"), Image(pixels=pixels), Text("b")), Provenance("key", "there", "CC0-1.0", "me")
    )
    text, image = text_and_pixels(document)
    assert text == "a b" and image.shape == pixels.shape
    with pytest.raises(UserError, match="needs both text and an image"):
        text_and_pixels(Document((Text("1"),)))


@pytest.mark.parametrize(
    "arguments", [{"per_modality": 0}, {"candidates": 1}, {"query_dropout": 1.0}, {"recall": 0.0}]
)
def test_invalid_settings_are_rejected(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        SelectionConfig(**arguments)


def test_sources_take_turns():
    index = index_of(at(0, 10, 20, 30, 40, 50))

    def sources_of(rows):
        return dict(zip(rows, ("AAAABC"[row] for row in rows), strict=True))

    config = dataclasses.replace(NO_LIMIT, alternate_sources=True)
    query = at(0)[0]
    assert select(query, index, 5, config, sources_of=sources_of) == [0, 4, 5, 1, 2]
    assert select(query, index, 3, NO_LIMIT, sources_of=sources_of) == [0, 1, 2]
    # A skipped near copy does not count as a turn of its source.
    config = dataclasses.replace(config, near_copy_document=0.98)  # 10 degrees are 0.985
    assert select(query, index, 5, config, sources_of=sources_of) == [0, 4, 2]
