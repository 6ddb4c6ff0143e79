"""The index against numpy in float64."""

import numpy as np
import pytest

from leon_jax.config import UserError
from leon_jax.retrieval.index import Index, Views


def unit(rng, *shape):
    rows = rng.normal(size=shape)
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


def exact(embeddings, queries, k, exclude=None):
    scores = queries.astype(np.float64) @ embeddings.astype(np.float64).T
    if exclude is not None:
        for row, banned in enumerate(exclude):
            scores[row, [i for i in np.atleast_1d(banned) if i >= 0]] = -np.inf
    ids = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, ids, axis=1), ids


@pytest.mark.parametrize(("block", "width"), [(1024, 65_536), (3, 7), (5, 100), (4, 1)])
@pytest.mark.parametrize("excluded", [False, True])
def test_search_equals_a_float64_argsort_however_it_is_blocked(block, width, excluded):
    rng = np.random.default_rng(0)
    embeddings, queries = unit(rng, 23, 9), unit(rng, 11, 9)
    exclude = rng.integers(-1, 23, (11, 2)) if excluded else None
    scores, ids = Index(embeddings, block, width).search(queries, 6, exclude)
    expected_scores, expected_ids = exact(embeddings, queries, 6, exclude)
    assert scores.dtype == np.float32 and ids.dtype == np.int32
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(scores, expected_scores, atol=1e-6)


def test_one_excluded_id_a_query_may_be_given_flat():
    embeddings = np.eye(4, dtype=np.float32)
    _, ids = Index(embeddings).search(embeddings, 1, exclude=[-1, 1, 2, -1])
    assert ids[0, 0] == 0 and ids[3, 0] == 3
    assert ids[1, 0] != 1 and ids[2, 0] != 2


def test_equal_scores_come_in_the_order_of_ids_across_blocks():
    embeddings = np.ones((10, 2), np.float32)
    _, ids = Index(embeddings, width=3).search(np.ones((1, 2), np.float32), 5)
    assert ids.tolist() == [[0, 1, 2, 3, 4]]


def test_where_too_few_documents_are_left_ids_end_in_minus_one():
    embeddings = np.eye(3, dtype=np.float32)
    scores, ids = Index(embeddings).search(embeddings[:1], 5, exclude=[0])
    assert ids.tolist() == [[1, 2, -1, -1, -1]]
    assert np.isneginf(scores[0, 2:]).all() and (scores[0, :2] == 0).all()


def test_negative_scores_are_found_too():
    embeddings = -np.eye(2, dtype=np.float32)
    scores, ids = Index(embeddings, width=1).search(np.ones((1, 2), np.float32), 2)
    assert ids.tolist() == [[0, 1]] and scores.tolist() == [[-1, -1]]


def test_no_queries_give_no_rows():
    scores, ids = Index(np.eye(3, dtype=np.float32)).search(np.zeros((0, 3), np.float32), 2)
    assert scores.shape == ids.shape == (0, 2)


def test_views_come_back_from_their_file(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {name: unit(rng, 5, 3) for name in ("text", "image", "document")}
    Views(**arrays).save(tmp_path / "index.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["index.safetensors"]
    loaded = Views.load(tmp_path / "index.safetensors")
    assert len(loaded) == 5
    for name, array in arrays.items():
        np.testing.assert_array_equal(getattr(loaded, name).embeddings, array)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda: Index(np.zeros(3)), r"embeddings\[n, d\]"),
        (lambda: Index(np.full((2, 2), np.nan)), "finite"),
        (lambda: Index(np.eye(3)).search(np.eye(3), 0), "k is 0"),
        (lambda: Index(np.eye(3)).search(np.eye(4), 1), r"needs \[q, 3\]"),
        (lambda: Views(np.eye(3), np.eye(3), np.eye(2)), "3, 3 and 2 rows"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(action, message):
    with pytest.raises(UserError, match=message):
        action()


def test_a_missing_or_damaged_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"there is no file .*index\.safetensors"):
        Views.load(tmp_path / "index.safetensors")
    (tmp_path / "index.safetensors").write_bytes(b"not tensors")
    with pytest.raises(UserError, match="not a whole safetensors file"):
        Views.load(tmp_path / "index.safetensors")
