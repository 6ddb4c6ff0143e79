"""Tests documents folders as training data: mixtures, shards, groups, texts and mistakes."""

import collections
import dataclasses
import itertools

import grain
import numpy as np
import pytest

from leon_jax.config import UserError
from leon_jax.data.config import FolderComponent, FoldersConfig
from leon_jax.documents import Document, Text
from leon_jax.train import document_data
from tests import document_folders


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[str]:
    """Two folders, with the texts a0 to a8 and b0 to b2."""
    root = tmp_path_factory.mktemp("folders")
    return [
        document_folders.write(
            root / name, [Document((Text(f"{name}{number}"),)) for number in range(count)]
        )
        for name, count in (("a", 9), ("b", 3))
    ]


class Name(grain.transforms.RandomMap):
    """Maps the index of a document to its text and a random number."""

    def __init__(self, component: document_data.Component) -> None:
        self.component = component

    def random_map(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        text = self.component.source[index].text
        return {"text": np.array(text), "number": rng.integers(2**40)}


def batches(folders: list[str], weights=(3.0, 1.0), rows=4, shard=(0, 1), threads=0):
    mixture = tuple(map(FolderComponent, folders, ("train", "train"), weights))
    components = document_data.open_components(FoldersConfig(mixture=mixture))
    return document_data.batches(
        components,
        [len(component.source) for component in components],
        [Name(component) for component in components],
        rows=rows, seed=3, shard=shard, threads=threads,
    )  # fmt: skip


def rows(dataset, count: int) -> list[tuple[str, int]]:
    iterator = iter(dataset)
    return [
        (str(text), int(number))
        for batch in (next(iterator) for _ in range(count))
        for text, number in zip(batch["text"], batch["number"], strict=True)
    ]


def test_components_have_their_shares_and_are_shuffled_every_epoch(folders):
    texts = [text for text, _ in rows(batches(folders), 6)]
    counts = collections.Counter(text[0] for text in texts)
    assert counts == {"a": 18, "b": 6}
    epochs = [[text for text in texts if text[0] == "a"][start : start + 9] for start in (0, 9)]
    assert set(epochs[0]) == set(epochs[1]) and epochs[0] != epochs[1]


def test_shards_and_threads_give_the_rows_of_one_shard(folders):
    whole = rows(batches(folders), 6)
    shards = [rows(batches(folders, rows=2, shard=(n, 2), threads=2), 6) for n in (0, 1)]
    assert collections.Counter(whole) == collections.Counter(shards[0] + shards[1])
    assert len({number for _, number in whole}) == len(whole), "examples have their own randomness"


def test_an_iterator_resumes_exactly(folders):
    iterator = iter(batches(folders, threads=2))
    for _ in range(4):
        next(iterator)
    state, expected = iterator.get_state(), [next(iterator) for _ in range(4)]
    resumed = iter(batches(folders, threads=1))
    resumed.set_state(state)
    for batch in expected:
        other = next(resumed)
        assert all(np.array_equal(batch[name], other[name]) for name in batch)


def test_texts_are_repeated_by_weight(folders):
    def counts(*weights: float) -> list[int]:
        mixture = tuple(map(FolderComponent, folders, ("train", "train"), weights))
        components = document_data.open_components(FoldersConfig(mixture=mixture))
        counter = collections.Counter(document_data.weighted_texts(components))
        return [counter[f"a{n}"] for n in range(9)] + [counter[f"b{n}"] for n in range(3)]

    assert counts(3, 1) == [1] * 12
    assert counts(3, 2) == [1] * 9 + [2] * 3
    assert counts(9, 1) == [3] * 9 + [1] * 3
    assert sorted(counts(9, 5)) == [1] * 10 + [2] * 2


def test_rows_are_sorted_by_group_then_by_picture():
    listing = [
        {"group": "x", "picture": "1"}, {"picture": "2"}, {}, {"group": "x"}, {"picture": "2"}, {},
    ]  # fmt: skip
    order, starts = document_data.group_rows(iter(listing))
    groups = [order[a:b].tolist() for a, b in itertools.pairwise(starts)]
    assert groups == [[0, 3], [1, 4], [2], [5]]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            FoldersConfig(),
            r"config\.data\.folder is empty; name a documents folder or a prepared folder",
        ),
        (FoldersConfig("{a}", "exam"), r"config\.data: .*a has no split 'exam'; its .* are train"),
        (
            FoldersConfig(mixture=(FolderComponent("{a}"), FolderComponent("none"))),
            r"config\.data\.mixture\[1\]: none is not a documents folder",
        ),
    ],
)
def test_a_mistake_is_named_with_its_config_key(folders, data, message):
    def with_folder(part):
        return dataclasses.replace(part, folder=part.folder.replace("{a}", folders[0]))

    mixture = tuple(map(with_folder, data.mixture))
    data = dataclasses.replace(with_folder(data), mixture=mixture)
    with pytest.raises(UserError, match=message):
        document_data.open_components(data)
    with pytest.raises(UserError, match="set only one of them"):
        FoldersConfig("a", mixture=(FolderComponent("b"),))
