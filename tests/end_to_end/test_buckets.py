"""The whole way in a bucket: train a decoder on data there, export it there, and generate."""

import os
import pathlib
import re
import signal
import subprocess
import sys
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
from leon_jax.train.checkpoint import complete_steps
from tests import tiny

ROOT = pathlib.Path(__file__).parents[2]


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


def images(model: str, out: pathlib.Path) -> list[bytes]:
    """Returns the two images that `leon generate` writes with a model."""
    arguments = (f"--model={model}", "--prompt=a red square", "--num_images=2", f"--out={out}")
    assert cli.run_verb("generate", arguments) == 0
    return [path.read_bytes() for path in sorted(out.rglob("*.png"))]


def weights(folder: pathlib.Path) -> dict[str, np.ndarray]:
    return weight_files.load(folder / "decoder.safetensors", "decoder")[0]


def export(*arguments: str) -> None:
    assert cli.run_verb("export", arguments) == 0


@pytest.fixture
def disk(tmp_path, monkeypatch) -> pathlib.Path:
    """A folder with a model and a prepared folder."""
    monkeypatch.setenv("LEON_CACHE", str(tmp_path / "cache"))
    disk = tmp_path / "disk"
    disk.mkdir()
    for name, folder in zip(("tiny", "prepared"), tiny.folders(), strict=True):
        (disk / name).symlink_to(folder, target_is_directory=True)
    return disk


@pytest.fixture
def bucket(disk, gs_folder) -> pathlib.Path:
    """The same in a bucket."""
    bucket = storage.path(gs_folder)
    ModelFolder.open(tiny.folders()[0]).copy_to(bucket / "tiny")
    storage.upload(tiny.folders()[1], bucket / "prepared", "manifest.json")
    return bucket


@pytest.mark.slow
@pytest.mark.usefixtures("no_programs_on_disk")
def test_a_decoder_is_trained_exported_and_used_in_a_bucket(disk, bucket, tmp_path):
    flags.FLAGS.mark_as_parsed()
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
    generated = images(f"{bucket}/model", tmp_path / "from_bucket")
    assert len(generated) == 2 and generated == images(f"{disk}/model", tmp_path / "from_disk")


def start_pair(base: str, steps: int, folder: pathlib.Path) -> subprocess.Popen:
    """Starts a run of two processes, each a slice, in `base`/run."""
    values = config_of(base, steps)
    values["loop"] |= {"mesh": (2, 1, 1, 1), "slices": 2, "data_shards": 2, "save_every": 10**6}
    config = folder / "config.py"
    config.write_text(
        f"from ml_collections import ConfigDict\ndef get_config(): return ConfigDict({values!r})\n"
    )
    return subprocess.Popen(
        [
            sys.executable, ROOT / "launch/local.py", "--processes=2", "--",
            sys.executable, "-m", "leon_jax.cli.main", "train", f"--config={config}",
            f"--workdir={base}/run",
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_two_processes_save_at_a_signal_and_resume_in_a_bucket(disk, bucket, tmp_path):
    """One slice reads the checkpoint. The result is that of an undisturbed run on a disk."""
    process = start_pair(str(bucket), 1_000_000, tmp_path)
    assert process.stderr is not None
    lines = []
    with process.stderr:
        for line in process.stderr:
            lines.append(line)
            if "first step after" in line:
                process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=300) == 128 + signal.SIGTERM, "".join(lines)
    (saved,) = re.findall(r"^stopped by a signal; step (\d+) is saved", "".join(lines), re.M)
    assert complete_steps(bucket / "run/checkpoints") == [int(saved)]
    assert not (bucket / "run/lock.json").exists()
    steps = int(saved) + 3
    for base in (bucket, disk):
        process = start_pair(str(base), steps, tmp_path)
        error = process.communicate(timeout=600)[1]
        assert process.returncode == 0, error
        assert ("resumed from step" in error) == (base == bucket)
    expected, actual = weights(disk / "run/export"), weights(bucket / "run/export")
    assert expected.keys() == actual.keys()
    for name in expected:
        np.testing.assert_array_equal(actual[name], expected[name], name)
