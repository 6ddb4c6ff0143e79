"""The emoji dataset as a source: its records match the documents of `demo.source`."""

import pickle

import numpy as np
import pytest

from leon_jax.config import UserError
from leon_jax.data.records import from_png
from leon_jax.data.sources.open import open_source
from leon_jax.data.sources.raw_record import SourceConfig
from leon_jax.datasets import demo


def test_every_document_is_a_record(emoji_data_dir):
    documents = demo.source("unseen_concept", emoji_data_dir)
    config = SourceConfig("emoji", emoji_data_dir, split="unseen_concept", shard_size=60)
    source = pickle.loads(pickle.dumps(open_source(config)))
    assert source.shards() == [f"unseen_concept/{start}" for start in (0, 60, 120, 180)]
    raws = [raw for shard in source.shards() for raw in source.read(shard)]
    for raw, document in zip(raws, documents, strict=True):
        text, image = document.parts
        assert raw.parts[0] == text.text
        assert np.array_equal(from_png(raw.parts[1]), image.pixels)
        metadata = {name: value for name, value in vars(raw).items() if name != "parts"}
        assert metadata.pop("origin") == document.provenance.source
        assert metadata == {name: getattr(document.provenance, name) for name in metadata}
        name = text.text.rpartition(", ")[0]
        assert raw.captions == (name, name, f"{name}, OpenMoji style", f"{name}, Twemoji style")
        assert raw.group == raw.key.partition("/")[2]
        assert raw.family


def test_a_split_can_be_read_into_another_split(emoji_data_dir):
    config = SourceConfig("emoji", emoji_data_dir, read_split="unseen_design")
    assert open_source(config).shards() == ["unseen_design/0"]


def test_an_unknown_split_raises_an_error(emoji_data_dir):
    with pytest.raises(UserError, match="'test'; the splits are train, unseen_design"):
        open_source(SourceConfig("emoji", emoji_data_dir, split="test"))
