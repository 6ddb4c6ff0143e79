"""The vector index restoredst numpy in float64, and its files."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leon_jax.config import UserError
from leon_jax.retrieval import device_blocks
from leon_jax.retrieval.vector_index import VectorIndex, save_rows

# Small, so that a few hundred rows are several tiles and blocks.
SMALL = device_blocks.BlockSizes(tile=128, queries=8, queries_exact=4, block=256 * 4 * 2)


def small_integers(rng, count, width=4):
    """Rows whose inner products are exact in float32 and often equal."""
    return rng.integers(-2, 3, (count, width)).astype(np.float16)


def brute(rows, queries, k, exclude=None, keep=None):
    """The expected result of a search: scores in float64, ids in the order of a stable sort."""
    scores = queries.astype(np.float64) @ rows.astype(np.float64).T
    if exclude is not None:
        for row, excluded in enumerate(exclude):
            scores[row, [i for i in np.atleast_1d(excluded) if i >= 0]] = -np.inf
    if keep is not None:
        scores[:, ~keep] = -np.inf
    scores = np.pad(scores, ((0, 0), (0, k)), constant_values=-np.inf)
    ids = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    scores = np.take_along_axis(scores, ids, axis=1)
    return scores, np.where(np.isneginf(scores), -1, ids)


@pytest.fixture(scope="module", autouse=True)
def small_pieces():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_blocks, "CPU", SMALL)
        yield


@st.composite
def searches(draw):
    """Arrays of an index, and the arguments of a search."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    # Few sizes, because each one is compiled.
    count = draw(st.sampled_from([0, 1, 100, 129, 256, 300, 700]))
    rows = small_integers(rng, count)
    cuts = sorted(draw(st.lists(st.integers(0, count), max_size=3)))
    queries = small_integers(rng, draw(st.sampled_from([1, 4, 11]))).astype(np.float32)
    exclude = keep = None
    if draw(st.booleans()):
        exclude = rng.integers(-1, count, (len(queries), 2))
    if draw(st.booleans()):
        keep = rng.random(count) < draw(st.sampled_from([0.0, 0.02, 0.5, 1.0]))
    return np.split(rows, cuts), queries, draw(st.sampled_from([1, 5, 150])), exclude, keep


@settings(max_examples=60, deadline=None)
@given(searches())
def test_search_equals_a_float64_sort(case):
    arrays, queries, k, exclude, keep = case
    scores, ids = VectorIndex(arrays).search(queries, k, exclude=exclude, keep=keep)
    assert scores.dtype == np.float32 and ids.dtype == np.int32
    expected_scores, expected_ids = brute(np.concatenate(arrays), queries, k, exclude, keep)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_array_equal(scores, expected_scores)


def test_products_are_computed_in_float32():
    rng = np.random.default_rng(0)
    rows, queries = rng.normal(size=(300, 512)), rng.normal(size=(5, 512)).astype(np.float32)
    for dtype in (np.float16, np.float32):
        stored = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(dtype)
        scores, ids = VectorIndex([stored]).search(queries, 20)
        expected, expected_ids = brute(stored, queries, 20)
        np.testing.assert_array_equal(ids, expected_ids)
        np.testing.assert_allclose(scores, expected, atol=5e-6)


def test_an_approximate_search_returns_most_of_the_best():
    rng = np.random.default_rng(0)
    rows, queries = rng.normal(size=(2000, 64)).astype(np.float16), rng.normal(size=(40, 64))
    index, keep = VectorIndex([rows]), rng.random(2000) < 0.5
    _, best = brute(rows, queries, 20, keep=keep)
    for approximate in (True, 0.95):
        _, ids = index.search(queries, 20, exclude=best[:, 0], keep=keep, approximate=approximate)
        recall = np.mean([len(set(a) & set(b)) / 19 for a, b in zip(ids, best[:, 1:], strict=True)])
        assert recall > 0.95
        assert keep[ids].all() and (ids != best[:, :1]).all()


def test_exclude_may_be_one_id_for_each_query():
    index = VectorIndex([np.eye(4, dtype=np.float32)])
    _, ids = index.search(np.eye(4), 1, exclude=[-1, 1, 2, -1])
    assert ids[0, 0] == 0 and ids[3, 0] == 3
    assert ids[1, 0] != 1 and ids[2, 0] != 2


def test_a_search_without_queries_returns_no_rows():
    scores, ids = VectorIndex([np.eye(3, dtype=np.float16)]).search(np.zeros((0, 3)), 2)
    assert scores.shape == ids.shape == (0, 2)


def test_a_second_prompt_compiles_nothing():
    from leon_jax.retrieval import exact_search

    index = VectorIndex([small_integers(np.random.default_rng(0), 300)])
    index.search(np.ones((1, 4)), 5)
    programs = exact_search.step._cache_size()
    for seed in range(3):
        index.search(small_integers(np.random.default_rng(seed), 1), 5)
    assert exact_search.step._cache_size() == programs


def test_rows_are_numbered_through_all_files(tmp_path):
    rng = np.random.default_rng(0)
    parts = [small_integers(rng, count) for count in (3, 0, 5, 1)]
    paths = [tmp_path / f"{number}.npy" for number in range(4)]
    for path, part in zip(paths, parts, strict=True):
        save_rows(path, part)
    assert sorted(tmp_path.iterdir()) == paths  # no temporary file remains
    index, whole = VectorIndex.open(paths), np.concatenate(parts)
    assert len(index) == 9 and index.dimensions == 4
    for start in range(10):
        for stop in range(start, 10):
            rows = index.rows(start, stop)
            assert rows.dtype == np.float16
            np.testing.assert_array_equal(rows, whole[start:stop])
    ids = rng.integers(-1, 9, (4, 7))
    taken = index.take(ids)
    assert taken.dtype == np.float32
    np.testing.assert_array_equal(taken, np.where(ids[..., None] < 0, 0, whole[ids]))


def test_an_index_is_pickled_by_the_paths_of_its_files(tmp_path):
    rows = small_integers(np.random.default_rng(0), 300)
    save_rows(tmp_path / "rows.npy", rows)
    index = VectorIndex.open([tmp_path / "rows.npy"])
    index.search(np.ones((1, 4)), 1)
    pickled = pickle.dumps(index)
    assert len(pickled) < 300
    for restored in (pickle.loads(pickled), pickle.loads(pickle.dumps(VectorIndex([rows])))):
        np.testing.assert_array_equal(restored.rows(0, 300), rows)


def test_a_search_reports_rows_that_are_not_finite(tmp_path):
    rows = small_integers(np.random.default_rng(0), 700)
    save_rows(tmp_path / "good.npy", rows)
    rows[600, 2] = np.nan
    save_rows(tmp_path / "bad.npy", rows)
    index = VectorIndex.open([tmp_path / "good.npy", tmp_path / "bad.npy"])
    keep = np.arange(1400) < 700
    assert index.search(np.ones((1, 4)), 1, keep=keep)[1].shape == (1, 1)
    with pytest.raises(UserError, match=r"row 600 of .*bad\.npy has numbers that are not finite"):
        index.search(np.ones((1, 4)), 1)


EYE = np.eye(3, dtype=np.float32)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda: VectorIndex([]), "at least one file or array"),
        (lambda: VectorIndex([np.zeros(3, np.float32)]), r"array 0 has float32\[3\].*\[n, d\]"),
        (
            lambda: VectorIndex([np.eye(3)]),
            r"array 0 has float64\[3, 3\]; a vector index needs float16 or",
        ),
        (lambda: VectorIndex([EYE, EYE[:, :2]]), r"array 1 has float32\[3, 2\], but array 0"),
        (lambda: VectorIndex([EYE, EYE.astype(np.float16)]), "of one type and width"),
        (lambda: VectorIndex([EYE]).search(EYE, 0), "k is 0"),
        (lambda: VectorIndex([EYE]).search(np.eye(4), 1), r"needs \[q, 3\]"),
        (
            lambda: VectorIndex([EYE]).search(EYE * np.nan, 1),
            "queries have numbers that are not finite",
        ),
        (lambda: VectorIndex([EYE]).search(EYE, 1, keep=np.ones(2, bool)), r"needs bool\[3\]"),
        (lambda: VectorIndex([EYE]).search(EYE, 1, keep=np.ones(3)), "keep is float64"),
        (lambda: VectorIndex([EYE]).search(EYE, 1, exclude=[1]), r"exclude is \[1, 1\]; 3 queries"),
        (lambda: VectorIndex([EYE]).search(EYE, 1, approximate=1.5), r"approximate is 1\.5"),
        (lambda: VectorIndex([EYE]).rows(1, 4), "rows 1 to 4 are not within an index of 3"),
        (lambda: VectorIndex([EYE]).take(np.array([3])), "rows 3 to 3 are not within"),
    ],
)
def test_arguments_that_do_not_fit_are_rejected(action, message):
    with pytest.raises(UserError, match=message):
        action()


def test_a_missing_or_damaged_file_is_named(tmp_path):
    path = tmp_path / "rows.npy"
    with pytest.raises(UserError, match=r"there is no file .*rows\.npy; run: leon prepare"):
        VectorIndex.open([path])
    save_rows(path, np.eye(8, dtype=np.float32))
    whole = path.read_bytes()
    for damaged in (b"", b"not an array", whole[:100], whole[:-1]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"rows\.npy is not a whole \.npy file$"):
            VectorIndex.open([path])
    np.save(path, np.array([None]), allow_pickle=True)
    with pytest.raises(UserError, match=r"rows\.npy is not a whole \.npy file$"):
        VectorIndex.open([path])
    save_rows(path, np.arange(3))
    with pytest.raises(UserError, match=r"rows\.npy has int64\[3\]; a vector index needs float16"):
        VectorIndex.open([path])
