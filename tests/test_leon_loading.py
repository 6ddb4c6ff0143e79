"""Loading and saving models, on a tiny one with random weights."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from leon_jax.config import UserError
from leon_jax.generate import retriever
from leon_jax.leon import Leon
from leon_jax.model_description import IndexAddress, ModelDescription
from leon_jax.model_folder import ModelFolder
from leon_jax.prepare import prepare
from tests import tiny
from tests.retrieval import clip_folder

PROMPT = tiny.PROMPT


@pytest.fixture(scope="module")
def leon() -> Leon:
    return Leon.load(*tiny.folders())


@pytest.mark.parametrize(("weights", "cache"), [("bfloat16", "compute"), ("int8", "int8")])
def test_weights_and_cache_may_be_small(leon, weights, cache):
    small = Leon.load(*tiny.folders(), weights=weights, cache=cache)
    assert small.model.engine.decoder.table.dtype == (
        "bfloat16" if weights == "bfloat16" else "float32"
    )
    (drawn,) = small.generate(PROMPT, num_docs=1)
    assert drawn.image.size == (tiny.RESOLUTION, tiny.RESOLUTION)
    cat = tiny.documents()[0]
    assert small.likelihood(cat) == pytest.approx(leon.likelihood(cat), rel=0.02)
    assert small.likelihood(cat) != leon.likelihood(cat)


def test_kinds_of_weights_that_there_are_not_are_refused():
    with pytest.raises(UserError, match="weights is 'int4'; it must be one of float32, bfloat16"):
        Leon.load(*tiny.folders(), weights="int4")
    with pytest.raises(UserError, match="cache is 'int4'"):
        Leon.load(*tiny.folders(), cache="int4")


def test_save_and_load_give_the_same_model(leon, tmp_path):
    leon.save(tmp_path / "copy")
    copy = Leon.load(tmp_path / "copy", tiny.folders()[1])
    cat = tiny.documents()[0]
    assert copy.likelihood(cat) == leon.likelihood(cat)
    assert not list((tmp_path / "copy").glob("*.tmp"))
    before = {path: path.read_bytes() for path in (tmp_path / "copy").iterdir()}
    copy.save(tmp_path / "copy")
    assert {path: path.read_bytes() for path in (tmp_path / "copy").iterdir()} == before


@pytest.mark.parametrize("name", ["decoder.safetensors", "tokenizer.safetensors", "text.json"])
def test_a_damaged_model_folder_is_named(name, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    with pytest.raises(UserError, match=r"no decoder\.safetensors"):
        Leon.load(folder)
    for path in tiny.folders()[0].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    content = (folder / name).read_bytes()
    for damaged in (content[: len(content) // 2], b"not a model", b""):
        (folder / name).write_bytes(damaged)
        with pytest.raises(UserError, match=name.replace(".", r"\.")):
            Leon.load(folder)


def test_an_index_of_another_model_is_refused(tmp_path):
    checkpoint, prepared = tiny.folders()
    with pytest.raises(UserError, match="not a prepared folder"):
        Leon.load(checkpoint, tmp_path)
    manifest = json.loads((prepared / "manifest.json").read_text())
    manifest["sha256"]["encoder"] = "0" * 64
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="another encoder file"):
        Leon.load(checkpoint, tmp_path)


@pytest.fixture
def demo_folder() -> ModelFolder:
    """Returns a model folder whose index is the emoji documents."""
    description = ModelDescription("demo", index=IndexAddress(prepare="demo"))
    return dataclasses.replace(ModelFolder.open(tiny.folders()[0]), description=description)


def test_the_demonstrations_documents_lying_around_are_used_if_they_fit(monkeypatch, demo_folder):
    _, prepared = tiny.folders()
    monkeypatch.setattr(retriever, "DEFAULT_FOLDER", prepared)
    assert retriever.find_index(demo_folder) == prepared
    assert retriever.find_index(demo_folder, prepared) == prepared
    # Another model finds no index, even if the folder would fit.
    with pytest.raises(UserError, match="the model tiny has no index; give --index=FOLDER"):
        retriever.find_index(ModelFolder.open(tiny.folders()[0]))


def test_without_a_prepared_folder_one_is_made_in_the_cache(
    monkeypatch, tmp_path, capsys, demo_folder
):
    made = []
    monkeypatch.setenv("LEON_CACHE", str(tmp_path))
    monkeypatch.setattr(
        retriever.demo, "prepare_documents", lambda data, out, **files: made.extend((data, out))
    )
    folder = retriever.find_index(demo_folder)
    assert folder.parent == tmp_path
    assert made == [tmp_path / "emoji", folder]
    assert "once" in capsys.readouterr().err


def test_a_model_folder_may_hold_openais_clip_as_its_encoder(leon, tmp_path):
    model, index = tmp_path / "model", tmp_path / "prepared"
    leon.save(model)
    (model / "encoder.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no encoder\.safetensors"):
        Leon.load(model, index)
    clip_folder.write(model / "encoder")
    config, sources = tiny.preparation(
        model, {"train": tiny.documents()}, encoder=str(model / "encoder")
    )
    prepare.prepare(config, index, sources=sources, progress=False)
    with_clip = Leon.load(model, index)
    (drawn,) = with_clip.generate(PROMPT)
    assert len(drawn.retrieved) == 2
    with_clip.save(model)  # into itself
    for _ in range(2):
        with_clip.save(tmp_path / "copy")
    (again,) = Leon.load(tmp_path / "copy", index).generate(PROMPT)
    np.testing.assert_array_equal(np.asarray(drawn.image), np.asarray(again.image))
    with pytest.raises(UserError, match="encoded with another encoder"):
        leon.load(tiny.folders()[0], index)


def test_what_leon_needs_not_is_not_loaded():
    """Only these packages are loaded beside what jax and flax load themselves."""
    program = (
        "import sys, jax, flax.nnx\n"
        "before = {name.split('.')[0] for name in sys.modules}\n"
        "import leon_jax.leon\n"
        "print(*sorted({name.split('.')[0] for name in sys.modules} - before))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    allowed = {
        "PIL", "array_record", "jaxtyping", "leon_jax", "mmap", "resource", "safetensors",
        "tokenizers", "tqdm", "unicodedata",
        # The parser of SVG drawings, from the standard library.
        "_elementtree", "pyexpat",
    }  # fmt: skip
    assert set(done.stdout.split()) <= allowed
