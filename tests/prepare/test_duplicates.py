"""Which documents are dropped as near duplicates, against a comparison of all pairs in float64."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leon_jax.config import UserError
from leon_jax.prepare import duplicates
from leon_jax.prepare.config import DuplicatesConfig
from leon_jax.retrieval.vector_index import VectorIndex


def unit_rows(rng, count, spread):
    """Unit rows in a few tight clusters, so that many pairs are similar."""
    centres = rng.normal(size=(5, 6))
    rows = centres[rng.integers(5, size=count)] + spread * rng.normal(size=(count, 6))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 60), st.integers(0, 8), st.sampled_from([2, 7, 4096]))
def test_kept_documents_are_not_similar_and_dropped_ones_are_similar_to_an_earlier_kept_one(
    seed, count, held_out, block
):
    rng = np.random.default_rng(seed)
    rows, threshold = unit_rows(rng, count + held_out, 0.2), 0.97
    decisions = duplicates.Decisions(len(rows))
    before = rng.random(len(rows)) < 0.2
    for row in np.flatnonzero(before):
        decisions.drop(int(row), "copy_exact")
    original, duplicates._BLOCK = duplicates._BLOCK, block
    try:
        duplicates.drop_near(decisions, VectorIndex([rows]), held_out, threshold)
    finally:
        duplicates._BLOCK = original
    exact = rows.astype(np.float64)
    similarity = exact @ exact.T
    remaining = [row for row in np.flatnonzero(decisions.keep) if row >= held_out]
    for row in remaining:
        others = [other for other in remaining if other != row]
        assert (similarity[row, others] <= threshold + 1e-6).all()
    for row in np.flatnonzero(~decisions.keep):
        if decisions.reason(row) == "copy_near":
            because = decisions.rows["because"][row]
            assert held_out <= because < row and decisions.keep[because]
            assert similarity[row, because] > threshold - 1e-6
    assert decisions.keep[:held_out].tolist() == (~before[:held_out]).tolist()


def test_train_documents_similar_to_held_out_ones_are_dropped():
    rows = np.eye(6, dtype=np.float16)[[0, 1, 2, 1, 3, 0]]
    decisions = duplicates.Decisions(6)
    decisions.drop(0, "copy_exact")  # a held-out document that repeats another still counts
    duplicates.drop_evaluation(decisions, VectorIndex([rows]), 2, 0.9)
    reasons = {int(row): decisions.reason(row) for row in np.flatnonzero(~decisions.keep)}
    assert reasons == {0: "copy_exact", 3: "copy_of_evaluation", 5: "copy_of_evaluation"}
    assert decisions.rows["because"].tolist() == [-1, -1, -1, 1, -1, 0]


def test_a_missing_image_is_similar_to_nothing():
    rows = np.zeros((3, 4), np.float16)
    decisions = duplicates.Decisions(3)
    duplicates.drop_near(decisions, VectorIndex([rows]), 0, 0.5)
    duplicates.drop_evaluation(decisions, VectorIndex([rows]), 1, 0.5)
    assert decisions.keep.all()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1, max_size=30))
def test_the_first_of_equal_digests_is_kept(rows):
    digests = np.zeros((len(rows), 16), np.uint8)
    digests[:, 3] = [name for name, _ in rows]
    decisions = duplicates.Decisions(len(rows))
    for row, (_, is_kept) in enumerate(rows):
        if not is_kept:
            decisions.drop(row, "key_repeated")
    duplicates.drop_exact(decisions, digests, "copy_exact")
    seen = {}
    for row, (name, is_kept) in enumerate(rows):
        if is_kept and name in seen:
            assert decisions.reason(row) == "copy_exact"
            assert decisions.rows["because"][row] == seen[name]
        elif is_kept:
            assert decisions.keep[row]
            seen[name] = row


def test_thresholds_out_of_range_raise_an_error():
    with pytest.raises(UserError, match=r"duplicates\.near is 1\.5"):
        DuplicatesConfig(near=1.5)
    with pytest.raises(UserError, match=r"duplicates\.evaluation is 0"):
        DuplicatesConfig(evaluation=0)
