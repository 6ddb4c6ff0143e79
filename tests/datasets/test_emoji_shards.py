"""The emoji designs as a source are what `demo.source` gives, before decoding."""

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
        text, picture = document.parts
        assert raw.parts[0] == text.text
        assert np.array_equal(from_png(raw.parts[1]), picture.pixels)
        said = {name: value for name, value in vars(raw).items() if name != "parts"}
        assert said.pop("origin") == document.provenance.source
        assert said == {name: getattr(document.provenance, name) for name in said}
        assert raw.group


def test_a_split_can_become_another(emoji_data_dir):
    config = SourceConfig("emoji", emoji_data_dir, read_split="unseen_design")
    assert open_source(config).shards() == ["unseen_design/0"]


def test_an_unknown_split_is_named(emoji_data_dir):
    with pytest.raises(UserError, match="'test'; the splits are train, unseen_design"):
        open_source(SourceConfig("emoji", emoji_data_dir, split="test"))
