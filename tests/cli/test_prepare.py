"""Tests the flags, output and errors of `leon prepare`."""

import json

import numpy as np
import PIL.Image
import pytest

from leon_jax.cli import main
from leon_jax.data.document_folder import DocumentFolder
from leon_jax.retrieval.prepared_folder import PreparedFolder, encodings
from tests import tiny


@pytest.fixture
def images(tmp_path):
    """Returns a folder of six images and a captions file with one invalid line."""
    folder, rng = tmp_path / "my images", np.random.default_rng(0)
    folder.mkdir()
    lines = []
    for number in range(6):
        pixels = rng.integers(0, 256, (40, 50, 3), np.uint8)
        PIL.Image.fromarray(pixels).save(folder / f"{number}.png")
        lines.append({"key": f"n{number}", "image": f"{number}.png", "text": f"noise {number}"})
    lines[4]["licence"] = "CC-BY-NC-4.0"
    lines[5]["image"] = "none.png"
    (folder / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def leon(capsys, *arguments):
    model = tiny.folders()[0]
    files = [f"--{kind}={model / name}" for kind, name in (
        ("tokenizer", "tokenizer.safetensors"), ("encoder", "encoder.safetensors"),
        ("text", "text.json"))]  # fmt: skip
    code = main.run(["prepare", *files, *map(str, arguments)])
    output = capsys.readouterr()
    return code, output.out, output.err


def test_a_folder_of_images_is_prepared_audited_and_edited(capsys, tmp_path, images):
    out = tmp_path / "prepared"
    source = f"--source=train=jsonl:{images}"
    code, stdout, error = leon(
        capsys, source, "--licence=CC BY 4.0", "--attribution=me", f"--out={out}"
    )
    assert "2 of 6 records were rejected:\n" in error
    assert "1: its licence is CC-BY-NC-4.0, which --accept=CC-BY-NC-4.0 would accept\n" in error
    assert "  1 missing_picture: the image file does not exist\n    for example n5: " in error
    assert code == 0 and "4 train; 2 records rejected" in stdout
    assert "card.md" in stdout and (out / "card.md").is_file()
    assert {d["attribution"] for d in PreparedFolder(out).listing()} == {"me"}
    code, stdout, _ = leon(capsys, f"--out={out}", "--audit", "n2")
    collected, encoded = json.loads(stdout)
    assert code == 0 and collected["licence"] == "CC-BY-4.0" and collected["text"]
    assert set(encoded["neighbours"]) == {"text", "image"}
    (tmp_path / "keys.txt").write_text("n2\nn9\n")
    code, stdout, _ = leon(capsys, f"--out={out}", "--remove-keys", tmp_path / "keys.txt")
    assert code == 0 and "removed 1 documents" in stdout and "1 keys are not in" in stdout
    assert [d["key"] for d in PreparedFolder(out).listing()] == ["n0", "n1", "n3"]
    code, stdout, _ = leon(capsys, source, "--licence=CC0-1.0", f"--out={out}")
    assert code == 0 and [d["key"] for d in PreparedFolder(out).listing()] == ["n0", "n1", "n3"]


def test_documents_are_collected_without_models_and_encoded_later(capsys, tmp_path, images):
    out = tmp_path / "documents"
    arguments = [f"--source=jsonl:{images}", "--licence=CC-BY-4.0", f"--out={out}", "--side=24"]
    arguments.append("--held_out=0.2")
    code = main.run(["prepare", *arguments])
    stdout = capsys.readouterr().out
    assert code == 0 and "(3 train, 1 held_out; 2 records rejected)" in stdout
    assert DocumentFolder(out).records()[0].pixels.shape == (24, 24, 3)
    code = main.run(["encode", f"--folder={out}", f"--model={tiny.folders()[0]}"])
    stdout = capsys.readouterr().out
    assert code == 0 and stdout == f"prepared folder: {encodings(out)[0]} (3 train, 1 held_out)\n"
    assert PreparedFolder(out).records()[0].codes.shape == (tiny.GRID, tiny.GRID)
    code = main.run(["prepare", *arguments, "--side=20", "--noreplace"])
    error = capsys.readouterr().err
    assert code == 2 and f"{out} was made with other inputs or settings" in error
    assert main.run(["prepare", *arguments, "--noreplace"]) == 0
    assert DocumentFolder(out).records()[0].pixels.shape == (24, 24, 3) and encodings(out)
    for arguments, message in (
        ([], "--folder is missing"),
        (["--folder=nowhere"], "nowhere is not a documents folder"),
        ([f"--folder={out}", "--model=nowhere"], "there is no model folder nowhere"),
        ([f"--folder={out}", "--text=nowhere"], "there is no file nowhere, which --text names"),
        ([f"--folder={out}", "--beam=--x"], "--beam needs --runner"),
    ):
        code = main.run(["encode", *arguments])
        error = capsys.readouterr().err
        assert code == 2 and message in error.splitlines()[-1], error


def test_a_folder_of_images_with_captions_beside_them_is_prepared(capsys, tmp_path, images):
    (images / "captions.jsonl").unlink()
    out = tmp_path / "prepared"
    arguments = (f"--source=folder:{images}", "--licence=public domain", f"--out={out}")
    code, _, error = leon(capsys, *arguments, "--accept=LicenseRef-Public-Domain")
    assert code == 2 and "put it into 0.txt beside the image" in error
    (images / "0.txt").write_text("noise")
    (images / "1.png").rename(images / "grey-noise_1.png")
    code, _, error = leon(capsys, *arguments)
    assert code == 2 and "--accept=LicenseRef-Public-Domain would accept" in error
    arguments += ("--accept=LicenseRef-Public-Domain",)
    code, stdout, error = leon(capsys, *arguments, "--caption_from_name")
    assert code == 0 and "2 train; 4 records rejected" in stdout
    assert "4 missing_field" in error and "to accept them: --text_field=NAME" in error
    assert [document.text for document in PreparedFolder(out).records()] == ["noise", "grey noise"]


def test_splits_and_a_config_file(capsys, tmp_path, images):
    (tmp_path / "own.py").write_text(f"""
from ml_collections import ConfigDict

def get_config():
    source = {{"kind": "jsonl", "path": {str(images)!r}, "licence": "CC0-1.0"}}
    return ConfigDict({{"sources": [source, source | {{"split": "exam"}}], "min_side": 40}})
""")
    out = tmp_path / "prepared"
    config = f"--config={tmp_path / 'own.py'}"
    code, stdout, error = leon(capsys, config, f"--out={out}")
    # Every train document is a duplicate of an exam document.
    assert code == 2 and "no document of train can be used" in error
    assert "; the first, " in error and "for the others see" in error
    # A config file without sources takes them from --source.
    (tmp_path / "filters.py").write_text(
        "from ml_collections import ConfigDict\n\n\ndef get_config():\n"
        "    return ConfigDict({'min_side': 40})\n"
    )
    code, stdout, error = leon(
        capsys, f"--config={tmp_path / 'filters.py'}", f"--out={out}", "--config.max_text=7",
        f"--source=train=jsonl:{images}", "--licence=CC0-1.0",
    )  # fmt: skip
    assert code == 0 and "4 train" in stdout, error
    assert PreparedFolder(out).manifest["config"]["max_text"] == 7
    code, _, error = leon(capsys, config, f"--out={out}", "--config.max_txt=7")
    assert code == 2 and "config.max_txt; did you mean config.max_text?" in error
    code, _, error = leon(capsys, config, f"--out={out}", f"--source=jsonl:{images}")
    assert code == 2 and "--source cannot be used with a --config that sets sources" in error
    (tmp_path / "own.py").write_text("def get_config(:\n")
    code, _, error = leon(capsys, config, f"--out={out}")
    assert code == 2 and "own.py has a syntax error in line 1" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source=jsonl"], "not of the form [SPLIT=]KIND:PATH"),
        (["--source=csv:x"], "kind is 'csv'; it must be one of"),
        (["--source=jsonl:nowhere"], "nowhere"),
        (["--source=test=jsonl:nowhere"], "no source has the split 'train'; the splits are test"),
        (["--audit=x", "--out=nowhere"], "nowhere is not a documents folder"),
        (["--licence=MIT"], "--licence needs --source; in a config file, set licence of each"),
        (["--caption_from_name"], "--caption_from_name needs --source"),
        (["--source=jsonl:{}", "--licence=x y"], "--licence: 'x y' is not an SPDX expression"),
        (["--source=jsonl:{}", "--licence=GPL-2"], "'GPL-2' may be GPL-2.0-only or GPL-2.0-or-"),
        (["--beam=--x", "--source=jsonl:{}"], "--beam needs --runner"),
    ],
)
def test_mistakes_give_one_sentence(capsys, tmp_path, images, arguments, message):
    arguments = [argument.format(images) for argument in arguments]
    if not any(a.startswith("--out") for a in arguments):
        arguments.append(f"--out={tmp_path / 'out'}")
    code, _, error = leon(capsys, *arguments)
    assert code == 2 and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_missing_out_is_refused(capsys, images):
    code, _, error = leon(capsys, f"--source=jsonl:{images}")
    assert code == 2 and "--out is missing" in error
    code, _, error = leon(capsys, "--remove-keys=x")
    assert code == 2 and "--out is missing" in error
