"""Tests prepared folders as components of a mixture: settings, mistakes and exact resumption."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from leon_jax import sharding
from leon_jax.config import ConfigError, UserError, build, to_dict
from leon_jax.data.config import DataConfig, MixtureComponent
from leon_jax.documents import Document, Image, Provenance, Text
from leon_jax.retrieval.prepared_folder import PreparedFolder, write_split
from leon_jax.tokenizers.text import TextTokenizer
from leon_jax.train.checkpoint import Checkpoints
from leon_jax.train.decoder import DecoderProgram
from leon_jax.train.decoder_config import DecoderTraining
from leon_jax.train.decoder_data import family_weights, neighbour_sampler, open_components
from leon_jax.train.global_batches import Feed
from leon_jax.train.state import TrainState
from leon_jax.vocabulary import Vocabulary

WORDS = ("red", "green", "blue", "heart", "star", "cat")


def write(folder, count, columns=0, split="train"):
    """Writes a prepared folder of `count` documents in two groups, with neighbours if `columns`."""
    rng = np.random.default_rng(count)
    documents = [
        Document(
            (
                Text(f"{folder.name} {WORDS[i % 6]} {i}"),
                Image(codes=rng.integers(0, 16, (2, 2)).astype(np.int32)),
            ),
            Provenance(str(i), folder.name, "CC0-1.0", "", group="heart" if i % 4 else "star"),
        )
        for i in range(count)
    ]
    ids = None
    if columns:
        by_text = (np.arange(count)[:, None] + np.arange(1, columns + 1)) % count
        ids = np.stack([by_text, (by_text + columns) % count]).astype(np.int32)
    write_split(folder, split, documents, ids)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write(folder / "web", 20, columns=5)
    write(folder / "art", 9)
    TextTokenizer.train(WORDS, 270).save(folder / "text.json")
    return folder


def make_program(root, **data):
    text = TextTokenizer.load(root / "text.json")
    vocabulary = Vocabulary.compact(image_codes=16, text_tokens=text.size, sentinels=4)
    config = build(
        DecoderTraining,
        {
            "batch_size": 4,
            "steps": 1,
            "seed": 5,
            "vocabulary": dataclasses.asdict(vocabulary),
            "model": {
                "vocab_size": vocabulary.size, "max_length": 96, "layers": 1, "embed": 8,
                "heads": 1, "mlp": 8,
            },
            "optimizer": {"learning_rate": 1e-2, "warmup_steps": 1, "total_steps": 2},
            "data": {
                "text": str(root / "text.json"), "image_shape": (2, 2), "length": 96,
                "threads": 0, **data,
            },
        },
    )  # fmt: skip
    return DecoderProgram(config)


def mixture(folder):
    return (
        {"folder": str(folder / "web"), "weight": 3.0, "retrieved": (0.2, 0.4, 0.4)},
        {"folder": str(folder / "art"), "balance": 0.5},
    )


def test_a_single_folder_equals_a_mixture_of_one(folder):
    web = str(folder / "web")
    single = iter(make_program(folder, folder=web, retrieved=(0.5, 0.5)).batches())
    mixed = iter(make_program(folder, mixture=({"folder": web},), retrieved=(0.5, 0.5)).batches())
    for _ in range(4):
        expected, batch = next(single), next(mixed)
        for name in expected:
            np.testing.assert_array_equal(batch[name], expected[name])


def test_a_component_inherits_settings_that_it_does_not_set(folder):
    data = DataConfig(
        mixture=(
            MixtureComponent(str(folder / "web"), weight=3.0, retrieved=(0.5, 0.5), balance=0.0),
            MixtureComponent(str(folder / "art")),
        ),
        balance=1.0,
    )
    web, art = open_components(data)
    assert (web.settings.weight, web.settings.retrieved) == (3.0, (0.5, 0.5))
    assert web.query_weights is None and web.neighbours is not None
    assert (art.settings.weight, art.settings.retrieved) == (1.0, (1.0,))
    assert (art.settings.balance, art.neighbours) == (1.0, None)
    # Documents 0, 4 and 8 are one group; the other six are the other group.
    np.testing.assert_allclose(art.query_weights, [1 / 3, *[1 / 6] * 3] * 2 + [1 / 3])
    assert (len(web.source), len(art.source)) == (20, 9)
    assert web.name == f"{folder / 'web'} (train)"


def test_config_json_holds_all_values_but_only_the_set_ones_of_a_component():
    """Earlier versions wrote the same keys."""
    config = to_dict(DataConfig(mixture=(MixtureComponent("a", variants=3),), unchanged=0.5))
    assert json.loads(json.dumps(config)) == {
        "folder": "", "split": "train", "text": "",
        "image_shape": [12, 12], "length": 512, "retrieved": [1.0], "per_modality": 2,
        "variants": 1, "unchanged": 0.5, "balance": 0.0, "packing": "whole", "packing_bins": 4,
        "threads": 2,
        "mixture": [
            {"folder": "a", "split": "train", "weight": 1.0, "retrieved": None, "variants": 3,
             "unchanged": None, "balance": None}
        ],
    }  # fmt: skip


def test_a_document_without_a_group_has_weight_one():
    listing = [{"group": name} for name in ("", "a", "a", "", "b")] + [{}]
    np.testing.assert_allclose(family_weights(listing, 0.5), [1, 0.5**0.5, 0.5**0.5, 1, 1, 1])
    assert len(family_weights([], 1.0)) == 0


def test_groups_of_one_family_are_weighted_together():
    listing = [{"group": "a1", "family": "a"}, {"group": "a2", "family": "a"}, {"group": "b"}]
    np.testing.assert_allclose(family_weights(listing, 1.0), [0.5, 0.5, 1])


@pytest.mark.parametrize(("per_modality", "expected"), [(1, {4, 9}), (2, {4, 5, 9, 10})])
def test_neighbours_are_sampled_from_the_nearest_of_each_modality(folder, per_modality, expected):
    """Document 3's neighbours are 4 to 8 by its text, nearest first, and 9 to 13 by its image."""
    sample = neighbour_sampler(PreparedFolder(folder / "web"), "train", per_modality)
    rng = np.random.default_rng(0)
    samples = [sample(rng, 3, 2) for _ in range(60)]
    assert {int(index) for indices in samples for index in indices} == expected
    assert all(len(set(indices)) == 2 for indices in samples)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, r"config\.data\.folder is empty; name a .* folder, or set config\.data\.mixture"),
        ({"folder": "nowhere"}, r"config\.data: nowhere is not a prepared folder"),
        ({"mixture": [{"folder": "{web}"}, {"folder": "nowhere"}]},
         r"config\.data\.mixture\[1\]: nowhere is not a prepared folder"),
        ({"mixture": [{"folder": "{web}", "weight": 0.0}]}, r"mixture\[0\]: weight is 0\.0; it"),
        ({"mixture": [{"folder": "{web}"}, {"folder": "{art}", "variants": 4}]},
         r"mixture\[1\]: .*art has no variants of train; encode its documents with --variants"),
        ({"mixture": [{"folder": "{art}"}], "retrieved": (0.5, 0.5)},
         r"mixture\[0\]: there is no file .*train-00000\.neighbours\.npy"),
        ({"mixture": [{"folder": "{art}", "retrieved": (0.5,)}]},
         r"mixture\[0\]: retrieved is \(0\.5,\); probabilities must sum to 1"),
        ({"mixture": [{"folder": "{web}", "split": "unseen"}], "retrieved": (0.5, 0.5)},
         r"mixture\[0\]: split is unseen, but neighbours are documents of train"),
    ],
)  # fmt: skip
def test_mistakes_are_named_by_their_config_key(folder, data, message):
    paths = {"{web}": str(folder / "web"), "{art}": str(folder / "art")}
    for part in data.get("mixture", ()):
        part["folder"] = paths.get(part["folder"], part["folder"])
    write(folder / "web", 20, split="unseen")
    with pytest.raises(UserError, match=message):
        open_components(build(DataConfig, data))


def test_contradictory_settings_are_refused_when_the_configuration_is_built():
    with pytest.raises(ConfigError, match=r"config: folder is 'a' and mixture is not empty"):
        build(DataConfig, {"folder": "a", "mixture": [{"folder": "b"}]})
    with pytest.raises(ConfigError, match=r"config\.mixture\[0\]\.folder is missing"):
        build(DataConfig, {"mixture": [{"weight": 2.0}]})
    with pytest.raises(ConfigError, match=r"unknown key config\.mixture\[0\]\.wieght; .*weight"):
        build(DataConfig, {"mixture": [{"folder": "b", "wieght": 2.0}]})
    with pytest.raises(ConfigError, match="per_modality is 0"):
        build(DataConfig, {"per_modality": 0})


def test_a_neighbour_table_of_other_documents_is_refused(tmp_path):
    write(tmp_path / "a", 20, columns=2)
    write(tmp_path / "b", 7, columns=2)
    name = "train-00000.neighbours.npy"
    (tmp_path / "b" / name).write_bytes((tmp_path / "a" / name).read_bytes())
    with pytest.raises(UserError, match=r"b has neighbours of 20 documents, but 7 documents"):
        neighbour_sampler(PreparedFolder(tmp_path / "b"), "train", 2)


class Weight(nnx.Module):
    def __init__(self):
        self.weight = nnx.Param(jnp.ones(3))


@pytest.mark.parametrize("packing", ["whole", "stream"])
def test_a_mixture_resumes_from_a_checkpoint_with_other_threads(folder, tmp_path, packing):
    """The position is saved as in the training loop, with two data shards."""

    def feed(threads):
        program = make_program(folder, mixture=mixture(folder), packing=packing, threads=threads)
        return Feed(program.batches, 2)

    with jax.set_mesh(sharding.make_mesh((1, 1, 1, 1), jax.devices()[:1])):
        state = TrainState(jnp.int32(3), Weight(), {}, jax.random.key(0))
        first = feed(threads=4)
        for _ in range(3):
            next(first)
        checkpoints = Checkpoints(tmp_path / "checkpoints")
        checkpoints.save(state, first.get_state())
        expected_batches = [jax.device_get(next(first)) for _ in range(6)]
        checkpoints.close()
        abstract = jax.eval_shape(lambda: state)
        _, _, position = Checkpoints(tmp_path / "checkpoints").restore(abstract)
        for threads in (0, 1):
            resumed = feed(threads)
            resumed.set_state(position)
            for expected in expected_batches:
                batch = jax.device_get(next(resumed))
                for name in expected:
                    np.testing.assert_array_equal(batch[name], expected[name])
