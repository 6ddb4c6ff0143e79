"""What is dropped as a copy, against the definition applied to all pairs in float64."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leon_jax.config import UserError
from leon_jax.prepare import duplicates
from leon_jax.prepare.config import DuplicatesConfig
from leon_jax.retrieval.vector_index import VectorIndex


def unit_rows(rng, count, spread):
    """Rows in a few tight bundles, so that many pairs are near."""
    centres = rng.normal(size=(5, 6))
    rows = centres[rng.integers(5, size=count)] + spread * rng.normal(size=(count, 6))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 60), st.integers(0, 8), st.sampled_from([2, 7, 4096]))
def test_no_two_kept_are_near_and_every_dropped_one_is_near_an_earlier_kept_one(
    seed, count, held_out, block
):
    rng = np.random.default_rng(seed)
    rows, threshold = unit_rows(rng, count + held_out, 0.2), 0.97
    fate = duplicates.Fate(len(rows))
    before = rng.random(len(rows)) < 0.2
    for row in np.flatnonzero(before):
        fate.drop(int(row), "copy_exact")
    original, duplicates._BLOCK = duplicates._BLOCK, block
    try:
        duplicates.drop_near(fate, VectorIndex([rows]), held_out, threshold)
    finally:
        duplicates._BLOCK = original
    exact = rows.astype(np.float64)
    alike = exact @ exact.T
    kept = [row for row in np.flatnonzero(fate.keep) if row >= held_out]
    for row in kept:
        assert (alike[row, [k for k in kept if k != row]] <= threshold + 1e-6).all()
    for row in np.flatnonzero(~fate.keep):
        if fate.reason(row) == "copy_near":
            because = fate.rows["because"][row]
            assert held_out <= because < row and fate.keep[because]
            assert alike[row, because] > threshold - 1e-6
    assert fate.keep[:held_out].tolist() == (~before[:held_out]).tolist()


def test_train_documents_near_to_held_out_ones_are_dropped():
    rows = np.eye(6, dtype=np.float16)[[0, 1, 2, 1, 3, 0]]
    fate = duplicates.Fate(6)
    fate.drop(0, "copy_exact")  # a held-out document that repeats another still counts
    duplicates.drop_evaluation(fate, VectorIndex([rows]), 2, 0.9)
    reasons = {int(row): fate.reason(row) for row in np.flatnonzero(~fate.keep)}
    assert reasons == {0: "copy_exact", 3: "copy_of_evaluation", 5: "copy_of_evaluation"}
    assert fate.rows["because"].tolist() == [-1, -1, -1, 1, -1, 0]


def test_a_missing_picture_is_near_nothing():
    rows = np.zeros((3, 4), np.float16)
    fate = duplicates.Fate(3)
    duplicates.drop_near(fate, VectorIndex([rows]), 0, 0.5)
    duplicates.drop_evaluation(fate, VectorIndex([rows]), 1, 0.5)
    assert fate.keep.all()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1, max_size=30))
def test_the_first_of_equal_digests_is_kept(rows):
    digests = np.zeros((len(rows), 16), np.uint8)
    digests[:, 3] = [name for name, _ in rows]
    fate = duplicates.Fate(len(rows))
    for row, (_, here) in enumerate(rows):
        if not here:
            fate.drop(row, "key_repeated")
    duplicates.drop_repeated(fate, digests, "copy_exact")
    seen = {}
    for row, (name, here) in enumerate(rows):
        if here and name in seen:
            assert fate.reason(row) == "copy_exact" and fate.rows["because"][row] == seen[name]
        elif here:
            assert fate.keep[row]
            seen[name] = row


def test_thresholds_out_of_range_are_named():
    with pytest.raises(UserError, match=r"duplicates\.near is 1\.5"):
        DuplicatesConfig(near=1.5)
    with pytest.raises(UserError, match=r"duplicates\.evaluation is 0"):
        DuplicatesConfig(evaluation=0)
