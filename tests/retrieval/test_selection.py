"""CM3Leon's rules of selection; each test fails if its rule is left out."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leon_jax.config import UserError
from leon_jax.documents import Document, Image, Provenance, Text
from leon_jax.retrieval.selection import (
    SelectionConfig,
    diverse,
    drop_tokens,
    find_neighbours,
    parts,
    sample_neighbours,
    select,
)
from leon_jax.retrieval.vector_index import VectorIndex


class Words:
    """A tokenizer with a token for each word."""

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
    """Unit vectors of the plane, one a row."""
    radians = np.deg2rad(np.array(degrees))
    return np.stack([np.cos(radians), np.sin(radians)], 1).astype(np.float32)


def one(rows):
    return VectorIndex([rows])


NO_LIMIT = SelectionConfig(per_modality=2, near_copy_query=2, near_copy_document=2, query_dropout=0)


def test_relevance_the_best_scoring_documents_are_selected_in_order():
    bank = one(at(50, 10, 90, 30))
    assert select(at(0)[0], bank, 3, NO_LIMIT) == [1, 3, 0]


def test_diversity_a_near_copy_of_the_query_is_skipped():
    bank, query = one(at(1, 40, 60)), at(0)[0]
    config = dataclasses.replace(NO_LIMIT, near_copy_query=0.99)
    assert select(query, bank, 1, config, document=query) == [1]
    assert select(query, bank, 1, NO_LIMIT, document=query) == [0]
    # What asks may be a part, which is near to the document that it is a part of or to none.
    assert select(at(40)[0], bank, 2, config, document=query) == [1, 2]
    assert select(query, bank, 1, config) == [0]


def test_diversity_a_near_copy_of_a_chosen_document_is_skipped():
    bank = one(at(30, 31, -60))
    config = SelectionConfig(per_modality=2, near_copy_document=0.99)
    assert select(at(0)[0], bank, 2, config) == [0, 2]
    assert select(at(0)[0], bank, 2, NO_LIMIT) == [0, 1]


def test_the_thresholds_are_clips_by_default():
    bank, query = one(at(20, 30)), at(0)[0]  # cosines 0.94 and 0.87, 0.98 with each other
    assert select(query, bank, 2, document=query) == [1]
    assert select(query, bank, 2) == [0]


def test_excluded_ids_and_missing_candidates_are_never_chosen():
    embeddings = at(10, 20, 30)
    assert select(at(0)[0], one(embeddings), 3, NO_LIMIT, exclude=[1]) == [0, 2]
    ids = np.array([2, -1], np.int32)
    assert diverse(ids, embeddings[ids], 2, NO_LIMIT) == [0]


def test_no_documents_are_selected_where_none_are_wanted():
    assert select(at(0)[0], one(at(10)), 0) == []


def neighbours(queries, rows, config, **arguments):
    return find_neighbours(queries, one(rows), config, **arguments)


def test_a_table_has_the_best_of_each_query_and_their_scores():
    ids, scores = neighbours(at(45, 85), at(45, 55, 65, 75, 85), NO_LIMIT)
    assert ids.tolist() == [[0, 1], [4, 3]]
    assert ids.dtype == np.int32 and scores.dtype == np.float32
    np.testing.assert_allclose(scores, np.cos(np.deg2rad([[0, 10], [0, 10]])), atol=1e-6)


def test_a_document_is_never_its_own_neighbour():
    rows = at(10, 20, 30)
    ids, _ = neighbours(rows, rows, NO_LIMIT, own=np.arange(3))
    assert (ids != np.arange(3)[:, None]).all() and (ids >= 0).all()
    ids, _ = neighbours(rows, rows, NO_LIMIT, own=np.array([-1, 1, -1]))
    assert ids[:, 0].tolist() == [0, 0, 2]


def test_a_document_that_is_not_kept_is_never_a_neighbour():
    ids, _ = neighbours(at(0), at(0, 10, 20, 30), NO_LIMIT, keep=np.array([0, 1, 0, 1], bool))
    assert ids.tolist() == [[1, 3]]


def test_near_copies_of_the_document_that_asks_are_skipped_though_its_part_is_far_from_them():
    rows, config = at(10, 70), dataclasses.replace(NO_LIMIT, near_copy_query=0.9)
    ids, _ = neighbours(at(50, 50), rows, config, documents=at(5, 40))
    assert ids.tolist() == [[1, -1], [1, 0]]
    assert neighbours(at(50), rows, config)[0].tolist() == [[1, 0]]
    assert neighbours(at(50), rows, NO_LIMIT, documents=at(5))[0].tolist() == [[1, 0]]


def test_clip_finds_neither_the_picture_nor_another_caption_of_it():
    # As CLIP places them: parts of one document score about 0.3, captions of one picture 0.8.
    picture, caption = np.array([1, 0, 0, 0.0]), np.array([0.3, 0.954, 0, 0])
    other = np.array([0.3, 0.749, 0.59, 0])
    stranger = np.array([0.6, 0.1, 0, 0.79])

    def document(text, image):
        return ((text + image) / np.linalg.norm(text + image)).astype(np.float32)

    bank = np.stack([document(caption, picture), document(other, picture), stranger])
    assert bank[0] @ bank[1] > 0.9 > (bank @ np.stack([picture, caption], 1)).max()
    bank = bank.astype(np.float32)
    for part in (picture, caption):
        ids, _ = neighbours(
            part[None], bank, SelectionConfig(2), documents=bank[:1], own=np.array([0])
        )
        assert ids.tolist() == [[2, -1]]


def test_where_too_few_differ_the_row_ends_in_minus_one():
    config = dataclasses.replace(NO_LIMIT, near_copy_document=0.99)
    ids, scores = neighbours(at(50), at(10, 11), config)
    assert ids.tolist() == [[1, -1]]
    assert np.isneginf(scores[0, 1])


def test_a_query_of_zeros_finds_nothing():
    queries = np.concatenate([at(0), np.zeros((1, 2), np.float32), at(90)])
    ids, scores = neighbours(queries, at(0, 90), NO_LIMIT, own=np.array([0, 1, 1]))
    assert ids.tolist() == [[1, -1], [-1, -1], [0, -1]]
    assert np.isneginf(scores[1]).all()
    ids, _ = neighbours(np.zeros((2, 2), np.float32), at(0, 90), NO_LIMIT)
    assert (ids == -1).all()


@st.composite
def collections(draw):
    """Rows in bundles, some twice, with sources; and how neighbours are chosen among them."""
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
    own = rng.integers(-1, 60, 9).astype(np.int32)
    return (
        rows.astype(np.float16),
        config,
        rows[rng.integers(0, 60, 9)].astype(np.float32),
        own,
        rng.integers(0, 3, 60),
        rng.random(60) < 0.8,
    )


@settings(max_examples=60, deadline=None)
@given(collections())
def test_many_queries_are_answered_as_each_would_be_alone(case):
    rows, config, documents, own, sources, keep = case
    bank, queries = one(rows), rows[:9].astype(np.float32)
    ids, scores = find_neighbours(
        queries, bank, config, documents=documents, own=own, sources=sources, keep=keep
    )
    found, names = bank.search(queries, config.candidates, exclude=own, keep=keep)
    for row in range(9):
        chosen = diverse(
            names[row], bank.take(names[row]), config.per_modality, config, documents[row],
            source_of=lambda name: str(sources[name]),
        )  # fmt: skip
        missing = config.per_modality - len(chosen)
        assert ids[row].tolist() == [*names[row][chosen], *[-1] * missing]
        np.testing.assert_array_equal(scores[row], [*found[row][chosen], *[-np.inf] * missing])
    there = ids >= 0
    assert keep[ids[there]].all() and (ids != own[:, None])[there].all()
    copies = np.einsum("qad,qd->qa", bank.take(ids), documents)
    assert (copies[there] <= config.near_copy_query + 1e-6).all()
    alike = np.einsum("qad,qbd->qab", bank.take(ids), bank.take(ids))
    alike[:, np.arange(config.per_modality), np.arange(config.per_modality)] = 0
    assert (alike <= config.near_copy_document + 1e-6).all()


@settings(max_examples=30, deadline=None)
@given(collections())
def test_the_choice_of_twenty_begins_with_the_choice_of_two(case):
    rows, config, documents, own, sources, keep = case
    queries = rows[:9].astype(np.float32)
    twenty, two = (
        neighbours(
            queries, rows, dataclasses.replace(config, per_modality=number),
            documents=documents, own=own, sources=sources, keep=keep,
        )
        for number in (20, 2)
    )  # fmt: skip
    np.testing.assert_array_equal(twenty[0][:, :2], two[0])
    np.testing.assert_array_equal(twenty[1][:, :2], two[1])


def test_an_approximate_search_may_look_for_the_candidates():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(500, 16))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)
    queries, found = rows[:50].astype(np.float32), {}
    for recall in (1.0, 0.95):
        config = dataclasses.replace(NO_LIMIT, per_modality=20, recall=recall)
        found[recall] = neighbours(queries, rows, config)[0]
    same = [len(set(a) & set(b)) for a, b in zip(*found.values(), strict=True)]
    assert np.mean(same) > 19


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"own": np.arange(2)}, r"own is \[2\]; 3 queries need one id each"),
        ({"sources": np.arange(2)}, "2 sources were given for the 4 documents"),
        ({}, "no sources were given for the 4 documents"),
        ({"sources": np.zeros(4), "keep": np.ones(3, bool)}, r"keep is bool\[3\]"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, message):
    config = dataclasses.replace(NO_LIMIT, alternate_sources=True)
    with pytest.raises(UserError, match=message):
        neighbours(at(1, 2, 3), at(1, 2, 3, 4), config, **arguments)


def test_query_dropout_drops_a_fifth_of_the_tokens_but_never_all():
    rng, words = np.random.default_rng(0), Words()
    text = " ".join(str(i) for i in range(10_000))
    kept = drop_tokens(text, words, 0.2, rng).split()
    assert len(kept) == pytest.approx(8000, abs=150)
    assert kept == sorted(kept, key=int)
    assert all(drop_tokens("1 2", words, 0.99, rng) in ("1", "2", "1 2") for _ in range(50))
    assert drop_tokens("", words, 0.5, rng) == ""
    assert drop_tokens("1 2 3", words, 0.0, rng) == "1 2 3"


def test_up_to_three_distinct_neighbours_are_drawn_in_random_order():
    by_text, by_image = np.array([4, 7], np.int32), np.array([7, 9], np.int32)
    draws = [
        tuple(sample_neighbours(np.random.default_rng(seed), by_text, by_image, 2))
        for seed in range(60)
    ]
    assert set(draws) == {(4, 7), (7, 4), (4, 9), (9, 4), (7, 9), (9, 7)}
    everything = sample_neighbours(np.random.default_rng(0), by_text, by_image, 3)
    assert sorted(everything) == [4, 7, 9]
    nothing = np.array([-1, -1], np.int32)
    assert sample_neighbours(np.random.default_rng(0), nothing, nothing, 3) == []
    assert sample_neighbours(np.random.default_rng(0), by_text, nothing, 0) == []


def test_only_the_best_of_a_longer_table_are_drawn():
    long, short = np.arange(20, dtype=np.int32), np.arange(2, dtype=np.int32)
    for seed in range(5):
        drawn, expected = (
            sample_neighbours(np.random.default_rng(seed), ids, ids + 20, 3, per_modality)
            for ids, per_modality in ((long, 2), (short, None))
        )
        assert drawn == expected
    everything = sample_neighbours(np.random.default_rng(0), long, long + 20, 40)
    assert sorted(everything) == list(range(40))


def test_a_documents_parts():
    pixels = np.zeros((2, 2, 3), np.uint8)
    document = Document(
        (Text("a"), Image(pixels=pixels), Text("b")), Provenance("key", "there", "CC0-1.0", "me")
    )
    text, picture = parts(document)
    assert text == "a b" and picture.shape == pixels.shape
    with pytest.raises(UserError, match="needs both text and a picture"):
        parts(Document((Text("1"),)))


@pytest.mark.parametrize(
    "arguments", [{"per_modality": 0}, {"candidates": 1}, {"query_dropout": 1.0}, {"recall": 0.0}]
)
def test_settings_that_make_no_sense_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        SelectionConfig(**arguments)


def test_sources_take_turns():
    bank = one(at(0, 10, 20, 30, 40, 50))

    def sources_of(rows):
        return dict(zip(rows, ("AAAABC"[row] for row in rows), strict=True))

    config = dataclasses.replace(NO_LIMIT, alternate_sources=True)
    query = at(0)[0]
    assert select(query, bank, 5, config, sources_of=sources_of) == [0, 4, 5, 1, 2]
    assert select(query, bank, 3, NO_LIMIT, sources_of=sources_of) == [0, 1, 2]
    # A near copy of what was chosen is no turn of its source.
    config = dataclasses.replace(config, near_copy_document=0.98)  # 10 degrees are 0.985
    assert select(query, bank, 5, config, sources_of=sources_of) == [0, 4, 2]
