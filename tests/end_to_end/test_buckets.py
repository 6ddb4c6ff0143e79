"""The whole way in a bucket: train a decoder on data there, export it there, and generate."""

import json
import pathlib

import jax
import numpy as np
import pytest

from leon_jax import config as configs
from leon_jax import storage, weight_files
from leon_jax.cli import main as cli
from leon_jax.leon import Leon
from leon_jax.model_folder import ModelFolder
from tests import tiny

CONFIG = """
import json
from ml_collections import ConfigDict

def get_config():
    return ConfigDict(json.loads({values!r}))
"""


def write_config(path: pathlib.Path, base: str) -> pathlib.Path:
    """Writes the config of a decoder's run on data and models below `base`."""
    model = ModelFolder.open(tiny.folders()[0])
    vocabulary = model.tokenizer.vocabulary
    values = {
        "kind": "decoder",
        "steps": 4,
        "batch_size": 2,
        "vocabulary": configs.to_dict(vocabulary),
        "model": configs.to_dict(model.config),
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 1, "total_steps": 4},
        "data": {
            "folder": f"{base}/prepared",
            "text": f"{base}/tiny/text.json",
            "image_shape": [tiny.GRID, tiny.GRID],
            "length": tiny.CONTEXT,
            "retrieved": [0.5, 0.5],
        },
        "samples": {"image": f"{base}/tiny/tokenizer.safetensors", "captions": [tiny.PROMPT]},
        "export": {
            "tokenizer": f"{base}/tiny/tokenizer.safetensors",
            "encoder": f"{base}/tiny/encoder.safetensors",
            "index": f"{base}/prepared",
        },
        "loop": {"save_every": 2, "log_every": 1, "sample_every": 4},
    }
    path.write_text(CONFIG.format(values=json.dumps(values)))
    return path


def weights(folder: pathlib.Path) -> dict[str, np.ndarray]:
    return weight_files.load(folder / "decoder.safetensors", "decoder")[0]


def leon(verb: str, *flags: str) -> None:
    assert cli.run_verb(verb, flags) == 0


@pytest.mark.slow
def test_a_decoder_is_trained_exported_and_used_in_a_bucket(gs_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("LEON_CACHE", str(tmp_path / "cache"))
    (tmp_path / "disk").mkdir()
    for name, folder in zip(("tiny", "prepared"), tiny.folders(), strict=True):
        (tmp_path / "disk" / name).symlink_to(folder, target_is_directory=True)
    bucket = storage.path(gs_folder)
    ModelFolder.open(tiny.folders()[0]).copy_to(bucket / "tiny")
    storage.upload(tiny.folders()[1], bucket / "prepared", "manifest.json")
    runs = []
    for base in (tmp_path / "disk", bucket):
        config = write_config(tmp_path / "config.py", str(base))
        # Two starts: the second resumes from a checkpoint.
        leon("train", f"--config={config}", f"--workdir={base}/run", "--config.steps=2")
        leon("train", f"--config={config}", f"--workdir={base}/run")
        leon("export", f"--workdir={base}/run", f"--out={base}/model")
        runs.append(base)
    disk, copy = (weights(base / "model") for base in runs)
    assert disk.keys() == copy.keys()
    for name in disk:
        np.testing.assert_array_equal(disk[name], copy[name], name)
    assert (bucket / "run/export/model.json").is_file()
    assert any((bucket / "run/compile_cache").iterdir())
    leon("export", f"--workdir={bucket}/run", "--step=newest", f"--out={bucket}/newest")
    np.testing.assert_array_equal(weights(bucket / "newest")["table"], disk["table"])
    loaded, expected = Leon.load(bucket / "model"), Leon.load(tmp_path / "disk/model")
    assert loaded.model.folder.index.folder == f"{bucket}/prepared"
    (image,), (same,) = (each.generate(tiny.PROMPT, num_docs=1) for each in (loaded, expected))
    np.testing.assert_array_equal(np.asarray(image.image), np.asarray(same.image))
    assert [each.text for each in image.retrieved] == [each.text for each in same.retrieved]
    jax.config.update("jax_compilation_cache_dir", None)
