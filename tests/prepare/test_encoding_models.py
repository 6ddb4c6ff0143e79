"""Digests of the models that prepare a folder."""

import hashlib

import numpy as np
import pytest
import safetensors.numpy

from leon_jax import weight_digests
from leon_jax.config import UserError
from leon_jax.prepare.encoding_models import digest, matches
from tests.retrieval import clip_folder


def test_a_weight_file_matches_the_digest_of_its_weights_or_of_its_bytes(checkpoint):
    path = checkpoint / "encoder.safetensors"
    bytes_digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest(path) == weight_digests.content_digest(path) != bytes_digest
    assert matches(path, digest(path)) and matches(path, bytes_digest)
    assert not matches(path, digest(checkpoint / "tokenizer.safetensors"))
    assert not matches(path, None)


def test_other_files_and_folders_match_the_digest_of_their_bytes(checkpoint, tmp_path):
    text, foreign = checkpoint / "text.json", tmp_path / "foreign.safetensors"
    safetensors.numpy.save_file({"a": np.zeros(2)}, foreign)
    for path in (text, foreign):
        assert digest(path) == hashlib.sha256(path.read_bytes()).hexdigest()
        assert matches(path, digest(path)) and not matches(path, "0" * 64)
    folder = clip_folder.write(tmp_path / "clip")
    before = digest(folder)
    assert matches(folder, before)
    (folder / "config.json").write_text("{}")
    assert not matches(folder, before)
    with pytest.raises(UserError, match=r"cannot read .*none\.json"):
        digest(tmp_path / "none.json")
