"""The whole way in a bucket: train a decoder on data there, export it there, and load it."""

import pathlib
from typing import Any

import numpy as np
import pytest
from absl import flags

from leon_jax import config as configs
from leon_jax import storage, weight_files
from leon_jax.cli import main as cli
from leon_jax.cli import train
from leon_jax.leon import Leon
from leon_jax.model_folder import ModelFolder
from tests import tiny


def config_of(base: str, steps: int) -> dict[str, Any]:
    """Returns the config of a decoder's run on data and models below `base`."""
    model = ModelFolder.open(tiny.folders()[0])
    tokenizer = f"{base}/tiny/tokenizer.safetensors"
    return {
        "kind": "decoder",
        "steps": steps,
        "batch_size": 2,
        "vocabulary": configs.to_dict(model.tokenizer.vocabulary),
        "model": configs.to_dict(model.config),
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 1, "total_steps": 4},
        "data": {
            "folder": f"{base}/prepared",
            "text": f"{base}/tiny/text.json",
            "image_shape": [tiny.GRID, tiny.GRID],
            "length": tiny.CONTEXT,
            "retrieved": [0.5, 0.5],
        },
        "samples": {"image": tokenizer, "captions": []},
        "export": {
            "tokenizer": tokenizer,
            "encoder": f"{base}/tiny/encoder.safetensors",
            "index": f"{base}/prepared",
        },
        "loop": {"save_every": 2, "log_every": 1, "sample_every": 4},
    }


def weights(folder: pathlib.Path) -> dict[str, np.ndarray]:
    return weight_files.load(folder / "decoder.safetensors", "decoder")[0]


def export(*arguments: str) -> None:
    assert cli.run_verb("export", arguments) == 0


@pytest.mark.slow
def test_a_decoder_is_trained_exported_and_loaded_in_a_bucket(gs_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("LEON_CACHE", str(tmp_path / "cache"))
    disk, bucket = tmp_path / "disk", storage.path(gs_folder)
    disk.mkdir()
    flags.FLAGS.mark_as_parsed()
    for name, folder in zip(("tiny", "prepared"), tiny.folders(), strict=True):
        (disk / name).symlink_to(folder, target_is_directory=True)
    ModelFolder.open(tiny.folders()[0]).copy_to(bucket / "tiny")
    storage.upload(tiny.folders()[1], bucket / "prepared", "manifest.json")
    for base in (bucket, disk):
        for steps in (2, 4):  # the second start resumes from a checkpoint
            train._train("decoder", config_of(str(base), steps), base / "run")
        export(f"--workdir={base}/run", f"--out={base}/model")
    expected, actual = weights(disk / "model"), weights(bucket / "model")
    assert expected.keys() == actual.keys()
    for name in expected:
        np.testing.assert_array_equal(actual[name], expected[name], name)
    assert (bucket / "run/export/model.json").is_file()
    assert any((bucket / "run/compile_cache").iterdir())
    export(f"--workdir={bucket}/run", "--step=newest", f"--out={bucket}/newest")
    assert weights(bucket / "newest").keys() == expected.keys()
    loaded, local = Leon.load(bucket / "model"), Leon.load(disk / "model")
    assert loaded.model.folder.index.folder == f"{bucket}/prepared"
    document = tiny.documents()[0]
    assert loaded.likelihood(document) == local.likelihood(document)
    assert loaded.retriever.records[3].text == local.retriever.records[3].text
