"""A pipeline from a folder of images to a model that generates, and its fine-tuning."""

import json
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

from leon_jax.data.document_folder import DocumentFolder
from leon_jax.leon import Leon
from leon_jax.model_folder import ModelFolder
from leon_jax.retrieval.prepared_folder import PreparedFolder

CONFIG = """
import runpy
from ml_collections import ConfigDict

def get_config():
    values = runpy.run_path({own!r})["get_config"]("tiny").to_dict()
    stages = values["stages"]
    for name, stage in stages.items():
        if name != "text":
            stage["steps"] = stage["optimizer"]["total_steps"] = 2
            stage["optimizer"]["warmup_steps"] = 1
            stage["batch_size"] = 4
    stages["text"]["size"] = 300
    values["prepare"]["picture_side"] = stages["tokenizer"]["model"]["resolution"] = 32
    stages["tokenizer"]["model"] |= dict(channels=8, latent=8, code_dim=4, codes=32, groups=4)
    stages["encoder"]["model"]["vision"] |= dict(image_size=16, width=32, layers=1, heads=2)
    stages["encoder"]["model"]["text"] |= dict(width=32, layers=1)
    stages["decoder"]["model"] |= dict(layers=1, embed=32, mlp=64)
    stages["decoder"]["data"] |= dict(image_shape=(4, 4), length=160)
    values["encode"]["variants"] = 2
    return ConfigDict(values)
"""
FINETUNE = """
import runpy
from ml_collections import ConfigDict

def get_config():
    values = runpy.run_path({path!r})["get_config"]().to_dict()
    decoder = values["decoder"]
    decoder["steps"] = decoder["optimizer"]["total_steps"] = 2
    decoder["batch_size"] = 2
    decoder["optimizer"]["warmup_steps"] = 1
    values["encode"]["variants"] = 2
    return ConfigDict(values)
"""


def images(folder, count, seed=0):
    folder.mkdir()
    for number in range(count):
        pixels = np.random.default_rng([seed, number]).integers(0, 256, (40, 44, 3), np.uint8)
        PIL.Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"noise number {number} of {seed}")
    return folder


def leon(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "leon_jax.cli.main", *map(str, arguments)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_images_become_a_model_that_can_be_fine_tuned(tmp_path, monkeypatch):
    monkeypatch.setenv("LEON_CACHE", str(tmp_path / "cache"))
    config = tmp_path / "small.py"
    config.write_text(CONFIG.format(own="configs/own.py"))
    workdir = tmp_path / "run"
    command = [
        "pipeline", f"--config={config}", f"--data={images(tmp_path / 'cats', 40)}",
        "--licence=CC-BY-4.0", f"--workdir={workdir}",
    ]  # fmt: skip
    first = leon(*command)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "stage 8 of 8: write the model folder" in first.stdout
    assert DocumentFolder(workdir / "documents").splits.keys() == {"train", "held_out"}
    folder = ModelFolder.open(workdir / "model")
    assert folder.description.licences == ("CC-BY-4.0",)
    image = Leon.load(workdir / "model").generate("noise number 3 of 0", seed=1)[0]
    assert np.asarray(image.image).shape == (32, 32, 3) and len(image.retrieved) == 2

    second = leon(*command)
    assert second.returncode == 0 and second.stdout.count("finished before") == 6
    tuning = tmp_path / "tuning.py"
    tuning.write_text(FINETUNE.format(path="configs/finetune.py"))
    tuned = tmp_path / "tuned"
    fourth = leon(
        "pipeline", f"--config={tuning}", f"--from={workdir / 'model'}",
        f"--data={images(tmp_path / 'dogs', 10, seed=1)}", "--licence=CC0-1.0",
        f"--workdir={tuned}",
    )  # fmt: skip
    assert fourth.returncode == 0, fourth.stdout + fourth.stderr
    old, new = DocumentFolder(workdir / "documents"), PreparedFolder(tuned / "all_documents")
    assert new.splits["train"] == old.splits["train"] + 10
    licences = ModelFolder.open(tuned / "model").description.licences
    assert set(licences) == {"CC-BY-4.0", "CC0-1.0"}
    Leon.load(tuned / "model").generate("noise number 3 of 1")
    record = json.loads((tuned / "pipeline.json").read_text())
    assert all(entry["finished"] for entry in record.values())

    # New images are refused, and nothing of the finished model is lost.
    (tmp_path / "cats" / "0.txt").write_text("another caption")
    third = leon(*command)
    assert third.returncode == 2
    assert f"{workdir / 'documents'} was made with other inputs or settings" in third.stderr
    Leon.load(workdir / "model").generate("noise number 3 of 0")


INDEXED = """
import runpy

def get_config():
    values = runpy.run_path({path!r})["get_config"]()
    sources = [dict(kind="folder", path={index!r}, licence="CC0-1.0")]
    values.index = dict(share=0.5, prepare=dict(sources=sources, picture_side=32))
    return values
"""


@pytest.mark.slow
def test_a_model_can_retrieve_from_documents_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setenv("LEON_CACHE", str(tmp_path / "cache"))
    small, config, workdir = tmp_path / "small.py", tmp_path / "indexed.py", tmp_path / "run"
    small.write_text(CONFIG.format(own="configs/own.py"))
    birds = images(tmp_path / "birds", 12, seed=2)
    config.write_text(INDEXED.format(path=str(small), index=str(birds)))
    result = leon(
        "pipeline", f"--config={config}", f"--data={images(tmp_path / 'cats', 40)}",
        "--licence=CC-BY-4.0", f"--workdir={workdir}",
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert "stage 10 of 10" in result.stdout
    leon_model = Leon.load(workdir / "model")
    retrieved = leon_model.generate("noise number 3 of 0", seed=1)[0].retrieved
    assert len(retrieved) == 2 and all(one.text.endswith("of 2") for one in retrieved)
    folder = ModelFolder.open(workdir / "model")
    assert set(folder.description.licences) == {"CC-BY-4.0", "CC0-1.0"}
