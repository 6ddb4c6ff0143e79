"""FAISS reads an exported index, and its searches return the same rows."""

import sys

import numpy as np
import pytest

from leon_jax.config import UserError
from leon_jax.retrieval import faiss_export
from leon_jax.retrieval.faiss_export import export
from leon_jax.retrieval.vector_index import VectorIndex


def unit(rng, *shape):
    rows = rng.normal(size=shape)
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float16)


@pytest.fixture
def index(monkeypatch):
    monkeypatch.setattr(faiss_export, "_ROWS", 100)
    rows = unit(np.random.default_rng(0), 1050, 32)
    return VectorIndex([rows[:333], rows[333:]])


def test_a_flat_index_returns_the_same_rows(index, tmp_path):
    faiss = pytest.importorskip("faiss")
    export(index, tmp_path / "index.faiss")
    assert [file.name for file in tmp_path.iterdir()] == ["index.faiss"]
    faiss_index = faiss.read_index(str(tmp_path / "index.faiss"))
    assert type(faiss_index) is faiss.IndexFlatIP
    assert faiss_index.ntotal == len(index)
    assert faiss_index.metric_type == faiss.METRIC_INNER_PRODUCT
    rows = faiss_index.reconstruct_n(0, len(index))
    np.testing.assert_array_equal(rows, index.take(np.arange(1050)))
    queries = unit(np.random.default_rng(1), 50, 32).astype(np.float32)
    scores, ids = index.search(queries, 10)
    faiss_scores, faiss_ids = faiss_index.search(queries, 10)
    np.testing.assert_array_equal(faiss_ids, ids)
    np.testing.assert_allclose(faiss_scores, scores, atol=1e-6)
    expected = faiss.IndexFlatIP(32)
    expected.add(index.take(np.arange(1050)))
    faiss.write_index(expected, str(tmp_path / "faiss's own"))
    assert (tmp_path / "faiss's own").read_bytes() == (tmp_path / "index.faiss").read_bytes()


def test_other_kinds_of_indexes_are_trained_and_filled(index, tmp_path):
    faiss = pytest.importorskip("faiss")
    export(index, tmp_path / "index.faiss", "IVF8,SQ8")
    faiss_index = faiss.read_index(str(tmp_path / "index.faiss"))
    faiss.extract_index_ivf(faiss_index).nprobe = 8
    queries = unit(np.random.default_rng(1), 50, 32).astype(np.float32)
    _, ids = index.search(queries, 10)
    _, faiss_ids = faiss_index.search(queries, 10)
    assert np.mean([len(set(a) & set(b)) for a, b in zip(ids, faiss_ids, strict=True)]) > 9


def test_an_index_that_cannot_be_built_is_an_error(index, tmp_path, monkeypatch):
    pytest.importorskip("faiss")
    with pytest.raises(UserError, match=r"cannot build 'Nonsense' from .* train$"):
        export(index, tmp_path / "index.faiss", "Nonsense")
    with pytest.raises(UserError, match="the vector index is empty"):
        export(VectorIndex([np.zeros((0, 4), np.float16)]), tmp_path / "index.faiss")
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match=r"FAISS is not installed: pip install 'leon_jax\[faiss\]'"):
        export(index, tmp_path / "index.faiss")
    assert not list(tmp_path.iterdir())
