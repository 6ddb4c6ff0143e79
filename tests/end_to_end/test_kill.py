"""`leon train` on a real decoder, killed with -9, ends with the bits of a run that was not."""

import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest

from leon_jax import model_files
from tests import tiny

CONFIG = """
from ml_collections import ConfigDict

def get_config():
    return ConfigDict({{
        "kind": "decoder", "seed": 3, "batch_size": 2, "steps": {steps},
        "vocabulary": {vocabulary},
        "model": {{"vocab_size": {size}, "max_length": 160, "layers": 2, "embed": 16, "heads": 2,
                  "mlp": 32, "init_std": 0.02}},
        "optimizer": {{"learning_rate": 1e-2, "warmup_steps": 2, "total_steps": {steps}}},
        "data": {{"folder": "{prepared}", "text": "{text}", "image_shape": (4, 4), "length": 96,
                 "retrieved": (0.5, 0.25, 0.25)}},
        "masking": {{"placement": "segment"}},
        "loop": {{"log_every": 1, "save_every": 5, "sample_every": 1000}},
    }})
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> pathlib.Path:
    from leon_jax.config import to_dict
    from leon_jax.decode.checkpoint import Checkpoint

    checkpoint, prepared = tiny.folders()
    vocabulary = Checkpoint.open(checkpoint).documents.vocabulary
    path = tmp_path_factory.mktemp("config") / "tiny.py"
    path.write_text(
        CONFIG.format(
            steps=60, vocabulary=to_dict(vocabulary), size=vocabulary.size, prepared=prepared,
            text=checkpoint / "text.json",
        )
    )  # fmt: skip
    return path


def start(config: pathlib.Path, workdir: pathlib.Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "leon_jax.cli.main", "train", f"--config={config}",
         f"--workdir={workdir}"],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def lines(workdir: pathlib.Path) -> int:
    path = workdir / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_a_killed_decoder_ends_with_the_same_bits(config, tmp_path):
    unbroken = start(config, tmp_path / "unbroken")
    messages = unbroken.communicate()[1]
    assert unbroken.returncode == 0, messages

    killed, kills = tmp_path / "killed", 0
    for wanted in (9, 31):
        process = start(config, killed)
        until = time.monotonic() + 300
        while lines(killed) < wanted and process.poll() is None and time.monotonic() < until:
            time.sleep(0.005)
        if process.poll() is None:
            process.kill()
            kills += 1
        process.communicate()
    assert kills == 2, "the run ended before it could be killed; make it longer"
    assert not (killed / "export").exists()

    process = start(config, killed)
    messages = process.communicate()[1]
    assert process.returncode == 0 and "resumed from step" in messages, messages
    expected, found = (
        model_files.load(workdir / "export" / "decoder.safetensors", "decoder")[0]
        for workdir in (tmp_path / "unbroken", killed)
    )
    assert expected.keys() == found.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    assert lines(killed) == 60
