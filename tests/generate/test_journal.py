"""File names never meet, and what is finished is known without opening images."""

import json
import struct
import zlib

import numpy as np
import PIL.Image
import pytest

from leon_jax.config import UserError
from leon_jax.engine.sampling_params import SamplingParams
from leon_jax.generate import journal
from leon_jax.generate.image_metadata import ModelState, former_settings_text, settings_text
from leon_jax.generate.image_settings import ImageSettings
from leon_jax.generate.journal import JOURNAL, FinishedImages, Journal, file_name
from leon_jax.generate.results import GeneratedImage
from leon_jax.model_description import GenerationDefaults

SETTINGS = ImageSettings(num_images=2, num_docs=0, seed=5).filled(GenerationDefaults())
MODEL = ModelState("leon_jax 0 tiny", "0123456789ab", "float32", "compute")


def images(prompt: str, text=settings_text, model: ModelState = MODEL) -> list[GeneratedImage]:
    return [
        GeneratedImage(
            PIL.Image.fromarray(np.zeros((2, 2, 3), np.uint8)), prompt, sample.seed, sample.params,
            (), model.name, text(sample.params, model, SETTINGS.num_docs),
        )
        for sample in SETTINGS.samples
    ]  # fmt: skip


def test_two_prompts_never_share_a_file():
    prompts = [
        "🐱",
        "🐶",
        "cat",
        "Cat",
        "cat!",
        "a" * 60 + "b",
        "a" * 60 + "c",
        "",
        "é" * 99,
        "..//",
    ]
    names = [file_name(prompt, 0) for prompt in prompts]
    assert len(set(names)) == len(prompts)
    assert all(len(name.encode()) < 255 and "/" not in name for name in names)


def test_finished_prompts_are_known_without_opening_an_image(tmp_path, monkeypatch):
    first = Journal(tmp_path)
    first.add(images("a cat"))
    first.add(images("a dog")[:1])
    monkeypatch.setattr(journal.PIL.Image, "open", None)
    finished = FinishedImages(Journal(tmp_path), SETTINGS, MODEL)
    assert "a cat" in finished and "a dog" not in finished and "a bird" not in finished
    (tmp_path / file_name("a cat", 6)).unlink()
    assert "a cat" not in FinishedImages(Journal(tmp_path), SETTINGS, MODEL)


def test_images_of_other_settings_or_weights_are_not_finished(tmp_path):
    first = Journal(tmp_path)
    first.add(images("a cat"))
    for settings, model in (
        (ImageSettings(num_images=2, num_docs=0, seed=6), MODEL),
        (ImageSettings(num_images=2, num_docs=1, seed=5), MODEL),
        (ImageSettings((SamplingParams(),), num_images=2, num_docs=0, seed=5), MODEL),
        (SETTINGS, ModelState(MODEL.name, "f" * 12, "float32", "compute")),
        (SETTINGS, ModelState(MODEL.name, MODEL.digest, "int8", "compute")),
    ):
        filled = settings.filled(GenerationDefaults())
        assert "a cat" not in FinishedImages(Journal(tmp_path), filled, model)
    # A file that was written anew counts for its new settings alone.
    changed = ModelState(MODEL.name, "f" * 12, "float32", "compute")
    first.add(images("a cat", model=changed))
    assert "a cat" not in FinishedImages(Journal(tmp_path), SETTINGS, MODEL)
    assert "a cat" in FinishedImages(Journal(tmp_path), SETTINGS, changed)


def test_images_without_a_line_are_opened_once(tmp_path, monkeypatch):
    """Those of version 0.1.0 too, whose settings were Python and whose digest was of bytes."""
    former = ModelState(MODEL.name, "b" * 12, "float32", "compute")
    for number, image in enumerate(images("a  cat", former_settings_text, former)):
        image.save(tmp_path / f"old-{number}.png")
    (tmp_path / "not-ours.png").write_bytes(b"nothing")
    header = struct.pack(">4sIIBBBBB", b"IHDR", 100_000, 100_000, 8, 0, 0, 0, 0)
    header = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    (tmp_path / "huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header)
    assert "a cat" in FinishedImages(Journal(tmp_path), SETTINGS, MODEL, ["b" * 12])
    assert "a cat" not in FinishedImages(Journal(tmp_path), SETTINGS, MODEL)
    monkeypatch.setattr(journal.PIL.Image, "open", None)
    assert "a cat" in FinishedImages(Journal(tmp_path), SETTINGS, MODEL, ["b" * 12])


def test_a_line_that_was_cut_loses_its_own_image_only(tmp_path):
    Journal(tmp_path).add(images("a cat"))
    path = tmp_path / JOURNAL
    path.write_bytes(path.read_bytes()[:-9])
    Journal(tmp_path).add(images("a dog"))
    finished = FinishedImages(Journal(tmp_path), SETTINGS, MODEL)
    assert "a cat" in finished and "a dog" in finished
    lines = path.read_text().splitlines()
    with pytest.raises(ValueError):
        json.loads(lines[1])


def test_settings_have_at_least_one_set_of_parameters():
    with pytest.raises(UserError, match="params is empty"):
        ImageSettings(())


def test_a_folder_that_is_missing_holds_nothing(tmp_path):
    assert Journal(tmp_path / "none").keys == set()
    assert not (tmp_path / "none").exists()
