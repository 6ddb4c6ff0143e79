"""The door to the demonstration's data set: what it asks `leon prepare` for never changes."""

import json

from leon_jax import config as configs
from leon_jax.datasets import demo
from leon_jax.prepare import prepare as preparing
from tests import tiny

# What the manifests of format 3 recorded of the sources, whose folder was drawn into "data/emoji".
RECORDED_SOURCE = {
    "kind": "emoji", "path": "data/emoji", "read_split": "", "name": "", "licence": "",
    "attribution": "", "language": "en", "text": "", "picture": "", "shard_size": 1000,
}  # fmt: skip
RECORDED_DUPLICATES = {"exact": False, "near": None, "evaluation": None}
FILES = {"tokenizer": "a", "encoder": "b", "text": "c"}


def test_the_configuration_is_the_one_that_prepared_folders_recorded():
    values = json.loads(json.dumps(configs.to_dict(demo.prepare_config("data/emoji", **FILES))))
    splits = ("train", "unseen_design", "unseen_concept")
    assert values["sources"] == [RECORDED_SOURCE | {"split": split} for split in splits]
    assert (values["picture_side"], values["min_side"]) == (96, 32)
    assert values["duplicates"] == RECORDED_DUPLICATES
    assert (values["variants"], values["block"]) == (1, 256)
    assert demo.prepare_config("data/emoji", **FILES, variants=5).variants == 5


def test_both_folders_are_made_with_what_is_asked_for(monkeypatch, tmp_path):
    checkpoint, _ = tiny.folders()
    made = []
    monkeypatch.setattr(demo, "make_dataset", made.append)
    monkeypatch.setattr(preparing, "prepare", lambda config, out: made.append((config, out)))
    files = {kind: str(checkpoint / name) for kind, name in FILES.items()}
    demo.prepare_documents(tmp_path / "emoji", tmp_path / "out", **files)
    config = demo.prepare_config(tmp_path / "emoji", **files)
    assert made == [tmp_path / "emoji", (config, tmp_path / "out")]
