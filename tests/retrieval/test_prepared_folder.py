"""Reading a prepared folder: rows through all shards, and errors."""

import numpy as np
import pytest

from leon_jax.config import UserError
from leon_jax.documents import Document, Image, Text
from leon_jax.generate import retriever
from leon_jax.retrieval.neighbour_table import FIELDS, Neighbours, row_type
from leon_jax.retrieval.prepared_folder import PreparedFolder, write_split
from leon_jax.retrieval.vector_index import save_rows
from tests import tiny


def table(count, k=3, seed=0):
    rng = np.random.default_rng(seed)
    rows = np.zeros(count, row_type(k))
    for name in FIELDS:
        rows[name] = rng.integers(-1, 50, (count, k))
    return rows


def test_rows_are_numbered_through_all_files(tmp_path):
    shards = [table(count, seed=count) for count in (4, 0, 1, 7)]
    paths = [tmp_path / f"{number}.npy" for number in range(4)]
    for path, shard in zip(paths, shards, strict=True):
        save_rows(path, shard)
    opened, together = Neighbours.open(paths), np.concatenate(shards)
    assert len(opened) == 12
    for row in range(12):
        for name in FIELDS:
            np.testing.assert_array_equal(opened[row][name], together[row][name])
    for name in FIELDS:
        np.testing.assert_array_equal(opened.column(name), together[name])
    for row in (-1, 12):
        with pytest.raises(IndexError, match="of a table with 12"):
            opened[row]


def test_a_file_that_is_not_a_table_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"there is no file .*none\.npy"):
        Neighbours.open([tmp_path / "none.npy"])
    save_rows(tmp_path / "other.npy", np.zeros((2, 3), np.float32))
    with pytest.raises(UserError, match=r"other\.npy is not a table of neighbours"):
        Neighbours.open([tmp_path / "other.npy"])
    save_rows(tmp_path / "cut.npy", table(9))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "cut.npy").read_bytes()[:-5])
    with pytest.raises(UserError, match=r"cut\.npy is damaged; run: leon prepare$"):
        Neighbours.open([tmp_path / "cut.npy"])


def test_a_missing_split_or_missing_variants_are_errors():
    prepared = PreparedFolder(tiny.folders()[1])
    with pytest.raises(UserError, match="no split 'exam'; its splits are train, unseen_design"):
        prepared.records("exam")
    with pytest.raises(
        UserError, match="has no variants of train; encode its documents with --variants"
    ):
        prepared.variants(prepared.records())


def test_a_folder_of_another_program_can_be_used_for_training_but_not_searched(tmp_path):
    document = Document((Text("a"), Image(codes=np.zeros((2, 2), np.int32))))
    write_split(tmp_path, "train", [document])
    prepared = PreparedFolder(tmp_path)
    assert list(prepared.records()) == [document] and list(prepared.listing()) == [{}]
    with pytest.raises(UserError, match="was not made by leon prepare, so it cannot be searched"):
        prepared.selection  # noqa: B018
    model = tiny.folders()[0]
    with pytest.raises(UserError, match="was encoded with another tokenizer file"):
        retriever.check_index(tmp_path, model)
