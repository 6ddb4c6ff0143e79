"""`leon prepare`: what a person types, and what comes back."""

import json

import numpy as np
import PIL.Image
import pytest

from leon_jax.cli import main
from leon_jax.retrieval.prepared_folder import PreparedFolder
from tests import tiny


@pytest.fixture
def pictures(tmp_path):
    """A folder of six pictures and a captions file, one line of it wrong."""
    folder, rng = tmp_path / "my pictures", np.random.default_rng(0)
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
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_a_folder_of_pictures_is_prepared_audited_and_edited(capsys, tmp_path, pictures):
    out = tmp_path / "prepared"
    source = f"--source=jsonl:{pictures}"
    code, said, _ = leon(capsys, source, "--licence=CC-BY-4.0", "--attribution=me", f"--out={out}")
    assert code == 0 and "4 train; 2 records are not used" in said
    assert "card.md" in said and (out / "card.md").is_file()
    assert {d["attribution"] for d in PreparedFolder(out).listing()} == {"me"}
    code, said, _ = leon(capsys, f"--out={out}", "--audit", "n2")
    (document,) = json.loads(said)
    assert code == 0 and document["licence"] == "CC-BY-4.0" and document["text"]
    (tmp_path / "keys.txt").write_text("n2\nn9\n")
    code, said, _ = leon(capsys, f"--out={out}", "--remove-keys", tmp_path / "keys.txt")
    assert code == 0 and "1 documents were removed" in said and "1 keys belong to no" in said
    assert [d["key"] for d in PreparedFolder(out).listing()] == ["n0", "n1", "n3"]
    code, said, _ = leon(capsys, source, "--licence=CC0-1.0", f"--out={out}")
    assert code == 0 and [d["key"] for d in PreparedFolder(out).listing()] == ["n0", "n1", "n3"]


def test_splits_and_a_config_file(capsys, tmp_path, pictures):
    (tmp_path / "mine.py").write_text(f"""
from ml_collections import ConfigDict

def get_config():
    source = {{"kind": "jsonl", "path": {str(pictures)!r}, "licence": "CC0-1.0"}}
    return ConfigDict({{"sources": [source, source | {{"split": "exam"}}], "min_side": 40}})
""")
    out = tmp_path / "prepared"
    config = f"--config={tmp_path / 'mine.py'}"
    code, said, error = leon(capsys, config, f"--out={out}")
    # Every train document repeats one of the exam.
    assert code == 2 and "no document of train can be used" in error
    assert "; the first, " in error and "for the others see" in error
    # A file that names no sources takes them from the command line.
    (tmp_path / "filters.py").write_text(
        "from ml_collections import ConfigDict\n\n\ndef get_config():\n"
        "    return ConfigDict({'min_side': 40})\n"
    )
    code, said, error = leon(
        capsys, f"--config={tmp_path / 'filters.py'}", f"--out={out}", "--config.max_text=7",
        f"--source=jsonl:{pictures}", "--licence=CC0-1.0",
    )  # fmt: skip
    assert code == 0 and "4 train" in said, error
    assert PreparedFolder(out).manifest["config"]["max_text"] == 7
    code, _, error = leon(capsys, config, f"--out={out}", "--config.max_txt=7")
    assert code == 2 and "config.max_txt; did you mean config.max_text?" in error
    code, _, error = leon(capsys, config, f"--out={out}", f"--source=jsonl:{pictures}")
    assert code == 2 and "--source is given, but --config names the sources already" in error
    (tmp_path / "mine.py").write_text("def get_config(:\n")
    code, _, error = leon(capsys, config, f"--out={out}")
    assert code == 2 and "mine.py has a syntax error in line 1" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source=jsonl"], "not of the form [SPLIT=]KIND:PATH"),
        (["--source=csv:x"], "kind is 'csv'; it must be one of"),
        (["--source=jsonl:nowhere"], "nowhere"),
        (["--source=test=jsonl:nowhere"], "no source has the split 'train'; the splits are test"),
        (["--audit=x", "--out=nowhere"], "nowhere is not a prepared folder"),
        (["--licence=MIT"], "--licence and --attribution say what holds for the sources of"),
        (["--source=jsonl:{}", "--licence=GPL-9"], "--licence=GPL-9 is no SPDX licence"),
        (["--beam=--x", "--source=jsonl:{}"], "--beam gives options to --runner"),
    ],
)
def test_mistakes_are_one_sentence(capsys, tmp_path, pictures, arguments, message):
    arguments = [argument.format(pictures) for argument in arguments]
    if not any(a.startswith("--out") for a in arguments):
        arguments.append(f"--out={tmp_path / 'out'}")
    code, _, error = leon(capsys, *arguments)
    assert code == 2 and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_out_is_asked_for(capsys, pictures):
    code, _, error = leon(capsys, f"--source=jsonl:{pictures}")
    assert code == 2 and "--out is missing" in error
    code, _, error = leon(capsys, "--remove-keys=x")
    assert code == 2 and "--out is missing" in error
