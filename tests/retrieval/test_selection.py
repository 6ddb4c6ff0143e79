"""CM3Leon's rules of selection; each test fails if its rule is left out."""

import dataclasses

import numpy as np
import pytest

from leon_jax.config import UserError
from leon_jax.documents import Document, Image, Text
from leon_jax.retrieval.encoder import normalise
from leon_jax.retrieval.index import Index, Views
from leon_jax.retrieval.selection import (
    Neighbours,
    SelectionConfig,
    build_neighbours,
    diverse,
    drop_tokens,
    embed_views,
    sample_neighbours,
    select,
)


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


class Planar:
    """An encoder to the plane: a text is its angle in degrees; a picture's first byte is its."""

    def __init__(self):
        self.text, self.texts_seen = Words(), []

    def embed_texts(self, texts):
        self.texts_seen += texts
        return self._unit([sum(float(word) for word in text.split()) for text in texts])

    def embed_images(self, images):
        return self._unit([float(image[0, 0, 0]) for image in images])

    @staticmethod
    def _unit(angles):
        radians = np.deg2rad(np.array(angles))
        return np.stack([np.cos(radians), np.sin(radians)], 1).astype(np.float32)


def document(text, angle):
    return Document((Text(str(text)), Image(pixels=np.full((2, 2, 3), angle, np.uint8))))


def at(*degrees):
    return Planar._unit(degrees)


NO_LIMIT = SelectionConfig(
    near_copy_text=2, near_copy_image=2, near_copy_document=2, query_dropout=0
)


def test_relevance_the_best_scoring_documents_are_selected_in_order():
    index = Index(at(50, 10, 90, 30))
    assert select(at(0)[0], index, 3, NO_LIMIT) == [1, 3, 0]


def test_diversity_a_near_copy_of_the_query_is_skipped():
    index = Index(at(1, 40, 60))
    config = SelectionConfig(near_copy_document=0.99)
    assert select(at(0)[0], index, 1, config) == [1]
    assert select(at(0)[0], index, 1, NO_LIMIT) == [0]


def test_diversity_a_near_copy_of_a_chosen_document_is_skipped():
    index = Index(at(30, 31, -60))
    config = SelectionConfig(near_copy_document=0.99)
    assert select(at(0)[0], index, 2, config) == [0, 2]
    assert select(at(0)[0], index, 2, NO_LIMIT) == [0, 1]


def test_the_threshold_is_clips_by_default_and_the_query_may_have_its_own():
    index = Index(at(20, 30))  # cosines 0.94 and 0.87 with the query, 0.98 with each other
    assert select(at(0)[0], index, 2) == [1]
    assert select(at(0)[0], index, 2, near_copy_query=0.95) == [0]


def test_excluded_ids_and_missing_candidates_are_never_chosen():
    embeddings = at(10, 20, 30)
    assert select(at(0)[0], Index(embeddings), 3, NO_LIMIT, exclude=[1]) == [0, 2]
    scores = np.array([0.9, -np.inf], np.float32)
    ids = np.array([2, -1], np.int32)
    assert diverse(scores, ids, embeddings, 2, 2, 2) == [0]


def test_no_documents_are_selected_where_none_are_wanted():
    assert select(at(0)[0], Index(at(10)), 0) == []


def test_modality_two_by_text_and_two_by_picture_compared_with_whole_documents():
    # Texts say 0..40, pictures 90..130, so documents lie at 45..85.
    documents = [document(a, a + 90) for a in (0, 10, 20, 30, 40)]
    encoder = Planar()
    views = embed_views(documents, encoder)
    np.testing.assert_allclose(views.document.embeddings, at(45, 55, 65, 75, 85), atol=1e-6)
    query = [document(45, 85)]
    table = build_neighbours(query, encoder, views, NO_LIMIT, own_rows=False)
    assert table.by_text_ids.tolist() == [[0, 1]]
    assert table.by_image_ids.tolist() == [[4, 3]]
    np.testing.assert_allclose(table.by_text_scores, np.cos(np.deg2rad([[0, 10]])), atol=1e-6)
    np.testing.assert_allclose(table.by_image_scores, np.cos(np.deg2rad([[0, 10]])), atol=1e-6)


def test_a_document_is_never_its_own_neighbour():
    documents = [document(a, a) for a in (10, 20, 30)]
    encoder = Planar()
    views = embed_views(documents, encoder)
    table = build_neighbours(documents, encoder, views, NO_LIMIT, own_rows=True)
    for row in range(3):
        assert row not in table.by_text_ids[row] and row not in table.by_image_ids[row]
    strangers = build_neighbours(documents, encoder, views, NO_LIMIT, own_rows=False)
    assert strangers.by_text_ids[:, 0].tolist() == [0, 1, 2]


def test_each_modality_has_its_threshold_against_the_query():
    documents = [document(10, 10), document(40, 40)]
    encoder = Planar()
    views = embed_views(documents, encoder)
    config = SelectionConfig(1, 2, 0.9, 2, 2, 0)
    table = build_neighbours([document(5, 5)], encoder, views, config, own_rows=False)
    assert table.by_text_ids.tolist() == [[1]] and table.by_image_ids.tolist() == [[0]]


def test_where_too_few_differ_the_row_ends_in_minus_one():
    documents = [document(10, 10), document(11, 11)]
    views = embed_views(documents, Planar())
    config = SelectionConfig(near_copy_text=2, near_copy_image=2, near_copy_document=0.99)
    table = build_neighbours([document(50, 50)], Planar(), views, config, own_rows=False)
    assert table.by_text_ids.tolist() == [[1, -1]]
    assert np.isneginf(table.by_text_scores[0, 1])


def test_query_dropout_drops_a_fifth_of_the_tokens_but_never_all():
    rng, words = np.random.default_rng(0), Words()
    text = " ".join(str(i) for i in range(10_000))
    kept = drop_tokens(text, words, 0.2, rng).split()
    assert len(kept) == pytest.approx(8000, abs=150)
    assert kept == sorted(kept, key=int)
    assert all(drop_tokens("1 2", words, 0.99, rng) in ("1", "2", "1 2") for _ in range(50))
    assert drop_tokens("", words, 0.5, rng) == ""
    assert drop_tokens("1 2 3", words, 0.0, rng) == "1 2 3"


def test_query_dropout_applies_to_training_queries_and_to_no_others():
    documents = [document("1 " * 40, 10), document("2 " * 40, 20)]
    config = SelectionConfig(near_copy_text=2, near_copy_image=2, near_copy_document=2)
    for own_rows in (True, False):
        encoder = Planar()
        views = embed_views(documents, encoder)
        encoder.texts_seen.clear()
        build_neighbours(documents, encoder, views, config, own_rows=own_rows)
        lengths = [len(text.split()) for text in encoder.texts_seen]
        assert (max(lengths) < 40) == own_rows


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


def test_a_table_comes_back_from_its_file(tmp_path):
    ids = np.array([[1, -1]], np.int32)
    scores = np.array([[0.5, -np.inf]], np.float32)
    table = Neighbours(ids, ids + 1, scores, scores / 2)
    table.save(tmp_path / "neighbours_train.safetensors")
    loaded = Neighbours.load(tmp_path / "neighbours_train.safetensors")
    for name in vars(table):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(table, name))


def test_documents_without_text_or_pixels_cannot_be_queries():
    views = Views(*[normalise(np.ones((1, 2), np.float32))] * 3)
    with pytest.raises(UserError, match="needs both text and a picture"):
        build_neighbours([Document((Text("1"),))], Planar(), views, NO_LIMIT, own_rows=False)
    with pytest.raises(UserError, match="2 documents cannot be the 1 rows"):
        build_neighbours([document(1, 1)] * 2, Planar(), views, NO_LIMIT, own_rows=True)


@pytest.mark.parametrize(
    "arguments", [{"per_modality": 0}, {"candidates": 1}, {"query_dropout": 1.0}]
)
def test_settings_that_make_no_sense_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        SelectionConfig(**arguments)


def test_sources_take_turns():
    index = Index(at(0, 10, 20, 30, 40, 50))
    source_of = "AAAABC".__getitem__
    config = SelectionConfig(
        near_copy_text=2, near_copy_image=2, near_copy_document=2, alternate_sources=True
    )
    query = at(0)[0]
    assert select(query, index, 5, config, source_of=source_of) == [0, 4, 5, 1, 2]
    assert select(query, index, 3, NO_LIMIT, source_of=source_of) == [0, 1, 2]
    # A near copy of what was chosen is no turn of its source.
    config = dataclasses.replace(config, near_copy_document=0.98)  # 10 degrees are 0.985
    chosen = select(query, index, 5, config, near_copy_query=2, source_of=source_of)
    assert chosen == [0, 4, 2]
