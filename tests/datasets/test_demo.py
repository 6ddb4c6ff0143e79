"""The emoji dataset: its configuration for `leon prepare` never changes."""

import json

from leon_jax import config as configs
from leon_jax.datasets import demo
from leon_jax.prepare import prepare as preparing
from leon_jax.retrieval.prepared_folder import PreparedFolder
from tests import tiny

# The sources in manifests of format 3, for a dataset in "data/emoji".
RECORDED_SOURCE = {
    "kind": "emoji", "path": "data/emoji", "read_split": "", "name": "", "licence": "",
    "attribution": "", "language": "en", "text": "", "picture": "", "shard_size": 1000,
}  # fmt: skip
RECORDED_DUPLICATES = {"exact": False, "near": None, "evaluation": None}
FILES = {"tokenizer": "a", "encoder": "b", "text": "c"}


def test_the_configuration_is_as_recorded_in_prepared_folders():
    values = json.loads(json.dumps(configs.to_dict(demo.prepare_config("data/emoji", **FILES))))
    splits = ("train", "unseen_design", "unseen_concept")
    # Manifests leave out later settings that are not set.
    assert not any(source.pop("caption_from_name") for source in values["sources"])
    assert values["sources"] == [RECORDED_SOURCE | {"split": split} for split in splits]
    assert (values["picture_side"], values["min_side"]) == (96, 32)
    assert values["duplicates"] == RECORDED_DUPLICATES
    assert (values["variants"], values["block"]) == (1, 256)
    assert demo.prepare_config("data/emoji", **FILES, variants=5).variants == 5


def test_prepare_documents_renders_the_dataset_and_prepares_it(monkeypatch, tmp_path):
    checkpoint, _ = tiny.folders()
    calls = []
    monkeypatch.setattr(demo, "make_dataset", calls.append)
    monkeypatch.setattr(preparing, "prepare", lambda config, out: calls.append((config, out)))
    files = {kind: str(checkpoint / name) for kind, name in FILES.items()}
    demo.prepare_documents(tmp_path / "emoji", tmp_path / "out", **files)
    config = demo.prepare_config(tmp_path / "emoji", **files)
    assert calls == [tmp_path / "emoji", (config, tmp_path / "out")]


def test_seen_documents_are_the_first_of_the_design_that_is_held_out_elsewhere():
    _, prepared = tiny.folders()
    train = PreparedFolder(prepared).records("train")
    every = [train[row] for row in range(len(train))]
    keys = [one.provenance.key for one in every if one.provenance.key.startswith("twemoji/")]
    assert 2 <= len(keys) < len(every)
    assert [one.provenance.key for one in demo.seen_documents(train, 2)] == keys[:2]
