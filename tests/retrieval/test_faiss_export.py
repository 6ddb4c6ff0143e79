"""FAISS reads what was exported, and finds what the bank finds."""

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
def bank(monkeypatch):
    monkeypatch.setattr(faiss_export, "_ROWS", 100)
    rows = unit(np.random.default_rng(0), 1050, 32)
    return VectorIndex([rows[:333], rows[333:]])


def test_a_flat_index_finds_the_same_neighbours(bank, tmp_path):
    faiss = pytest.importorskip("faiss")
    export(bank, tmp_path / "bank.faiss")
    assert [file.name for file in tmp_path.iterdir()] == ["bank.faiss"]
    index = faiss.read_index(str(tmp_path / "bank.faiss"))
    assert type(index) is faiss.IndexFlatIP
    assert index.ntotal == len(bank) and index.metric_type == faiss.METRIC_INNER_PRODUCT
    np.testing.assert_array_equal(index.reconstruct_n(0, len(bank)), bank.take(np.arange(1050)))
    queries = unit(np.random.default_rng(1), 50, 32).astype(np.float32)
    scores, ids = bank.search(queries, 10)
    found, names = index.search(queries, 10)
    np.testing.assert_array_equal(names, ids)
    np.testing.assert_allclose(found, scores, atol=1e-6)
    again = faiss.IndexFlatIP(32)
    again.add(bank.take(np.arange(1050)))
    faiss.write_index(again, str(tmp_path / "faiss's own"))
    assert (tmp_path / "faiss's own").read_bytes() == (tmp_path / "bank.faiss").read_bytes()


def test_other_kinds_of_indexes_are_trained_and_filled(bank, tmp_path):
    faiss = pytest.importorskip("faiss")
    export(bank, tmp_path / "bank.faiss", "IVF8,SQ8")
    index = faiss.read_index(str(tmp_path / "bank.faiss"))
    faiss.extract_index_ivf(index).nprobe = 8
    queries = unit(np.random.default_rng(1), 50, 32).astype(np.float32)
    _, ids = bank.search(queries, 10)
    _, names = index.search(queries, 10)
    assert np.mean([len(set(a) & set(b)) for a, b in zip(ids, names, strict=True)]) > 9


def test_what_cannot_be_made_is_said(bank, tmp_path, monkeypatch):
    pytest.importorskip("faiss")
    with pytest.raises(UserError, match=r"cannot make 'Nonsense' of a bank .* train$"):
        export(bank, tmp_path / "bank.faiss", "Nonsense")
    with pytest.raises(UserError, match="the bank is empty"):
        export(VectorIndex([np.zeros((0, 4), np.float16)]), tmp_path / "bank.faiss")
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match=r"FAISS is not installed: pip install 'leon_jax\[faiss\]'"):
        export(bank, tmp_path / "bank.faiss")
    assert not list(tmp_path.iterdir())
