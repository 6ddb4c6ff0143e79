"""`leon export`: complete model folders, what is recorded in them, and what is refused."""

import json
import os
import pathlib
import re
import shlex
import shutil
import tarfile

import ml_dtypes
import numpy as np
import PIL.Image
import pytest

from leon_jax import model_description, weight_files
from leon_jax.cli import main
from leon_jax.export import write
from leon_jax.leon import Leon
from leon_jax.model_folder import ModelFolder
from leon_jax.tokenizers.text import TextTokenizer
from tests import tiny

FLAGS = {
    "decoder": "decoder.safetensors",
    "tokenizer": "tokenizer.safetensors",
    "text": "text.json",
    "encoder": "encoder.safetensors",
}


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a command in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LEON_CACHE", str(tmp_path / "cache"))

    def command(*arguments: str) -> tuple[int, str, str]:
        code = main.run(arguments)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return command


def parts(folder: pathlib.Path) -> list[str]:
    """The flags of `leon export` for the parts in a folder."""
    return [f"--{name}={folder / file}" for name, file in FLAGS.items()]


def write_run(
    workdir: pathlib.Path, folder: pathlib.Path, prepared: pathlib.Path, **changes
) -> pathlib.Path:
    """Writes what `leon train` leaves of a decoder's run, with the decoder of a model folder."""
    (workdir / "export").mkdir(parents=True)
    for name in ("decoder.safetensors", "text.json"):
        shutil.copy(folder / name, workdir / "export" / name)
    config = {
        "kind": "decoder",
        "steps": 1234,
        "batch_size": 8,
        "data": {
            "folder": str(prepared),
            "split": "train",
            "text": str(folder / "text.json"),
            "retrieved": [0.5, 0.5, 0.0],
        },
        "samples": {
            "image": str(folder / "tokenizer.safetensors"),
            "captions": [tiny.PROMPT],
            "guidance": 2.5,
        },
        "loop": {"init_from": ""},
    }
    (workdir / "config.json").write_text(json.dumps(config | changes))
    return workdir


def test_a_run_becomes_a_complete_folder_that_works_by_its_card_alone(run, tmp_path):
    folder, prepared = tiny.folders()
    workdir = write_run(tmp_path / "run", folder, prepared)
    code, said, error = run("export", f"--workdir={workdir}", "--out=models/cats")
    assert code == 0 and said == f"wrote the model folder {tmp_path / 'models/cats'}\n"
    assert "the licences of the data of tokenizer, text, encoder are not recorded" in error
    written = {path.name for path in (tmp_path / "models" / "cats").iterdir()}
    assert written == {*FLAGS.values(), "selection.json", "model.json", "README.md"}
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["cats"]

    opened = ModelFolder.open("models/cats")
    description = opened.description
    assert opened.index_path == prepared
    assert opened.defaults.sampling.guidance.weight == 2.5
    # One document was the most in training.
    assert opened.defaults.num_docs == 1 and description.generation["max_docs"] == opened.max_docs
    assert description.licences == ("CC-BY-4.0", "CC-BY-SA-4.0")
    assert description.unknown_licences == ("tokenizer", "text", "encoder")
    (data,) = description.data
    assert (data.name, data.parts, data.documents) == ("prepared", ("decoder",), 12)
    assert data.licences == {"CC-BY-4.0": 6, "CC-BY-SA-4.0": 6}
    assert description.training["decoder"]["steps"] == 1234
    assert description.training["decoder"]["config"]["batch_size"] == 8
    # The rules of the prepared folder, which this encoder made.
    rules = json.loads(pathlib.Path("models/cats/selection.json").read_text())
    assert rules["near_copy_document"] == 0.999

    card = pathlib.Path("models/cats/README.md").read_text()
    for words in ("12", "CC-BY-SA-4.0 (6)", "1,234 steps", "Twemoji authors", "guidance 2.5"):
        assert words in card
    (command,) = re.findall(r"```bash\n(leon .*)\n```", card)
    os.chdir("models/cats")
    code, said, error = run(*shlex.split(command)[1:], "--num_images=1")
    assert (code, error) == (0, "") and "retrieved:" in said
    assert len(list(pathlib.Path("images").glob("*.png"))) == 1


def test_a_run_that_starts_from_a_model_inherits_its_licences_and_data(run, tmp_path):
    folder, prepared = tiny.folders()
    base = tmp_path / "base"
    shutil.copytree(folder, base)
    description = model_description.ModelDescription(
        "base",
        licences=("CC-BY-SA-3.0",),
        data=(model_description.TrainingData("old", tuple(FLAGS), documents=7),),
        training={"decoder": {"steps": 5}, "encoder": {"steps": 6}},
    )
    (base / "model.json").write_text(description.to_json())
    start = {"init_from": str(base / "decoder.safetensors")}
    workdir = write_run(tmp_path / "run", base, prepared, loop=start)
    code, _, error = run("export", f"--workdir={workdir}", "--out=cats")
    assert (code, error) == (0, "")
    written = ModelFolder.open("cats").description
    assert written.licences == ("CC-BY-4.0", "CC-BY-SA-3.0", "CC-BY-SA-4.0")
    assert written.unknown_licences == ()
    parts_of = {data.name: data.parts for data in written.data}
    assert parts_of == {"old": tuple(FLAGS), "prepared": ("decoder",)}
    assert written.training["encoder"] == {"steps": 6}
    assert written.training["decoder"]["base"] == start["init_from"]
    # A run that starts from the workdir of that run inherits both.
    third = write_run(tmp_path / "third", base, prepared, loop={"init_from": str(workdir)})
    assert run("export", f"--workdir={third}", "--out=third_model")[0] == 0
    assert ModelFolder.open("third_model").description.licences == written.licences


def test_a_base_without_a_record_makes_the_licences_unknown(run, tmp_path):
    folder, prepared = tiny.folders()
    start = {"init_from": str(folder / "decoder.safetensors")}
    workdir = write_run(tmp_path / "run", folder, prepared, loop=start)
    assert run("export", f"--workdir={workdir}", "--out=cats")[0] == 0
    assert "decoder" in ModelFolder.open("cats").description.unknown_licences
    code, _, error = run(
        "export", f"--workdir={workdir}", "--licence=CC0-1.0", "--licence=MIT", "--out=cats"
    )
    assert (code, error) == (0, "")
    description = ModelFolder.open("cats").description
    assert description.unknown_licences == ()
    assert set(description.licences) == {"CC0-1.0", "MIT", "CC-BY-4.0", "CC-BY-SA-4.0"}


def test_flags_set_the_parts_and_the_defaults(run):
    folder, prepared = tiny.folders()
    code, _, error = run(
        "export", *parts(folder), f"--index={prepared}", "--guidance=4", "--top_p=0.8",
        "--num_docs=3", "--title=My cats", "--out=cats", "--copy_index",
    )  # fmt: skip
    assert code == 0 and "no selection rules" not in error
    opened = ModelFolder.open("cats")
    assert opened.defaults.num_docs == 3
    assert opened.defaults.sampling.guidance.weight == 4
    assert opened.defaults.sampling.image.top_p == 0.8
    assert opened.description.title == "My cats"
    # The folder needs no other: not even its index.
    shutil.move("cats", "moved")
    (image,) = Leon.load("moved").generate(tiny.PROMPT)
    assert len(image.retrieved) == 3
    assert json.loads(image.settings)["num_docs"] == 3


def test_the_weights_of_the_decoder_can_be_stored_in_bfloat16(run, tmp_path):
    folder, prepared = tiny.folders()
    flags = [*parts(folder), f"--index={prepared}", "--dtype=bfloat16", "--out=half"]
    assert run("export", *flags)[0] == 0
    before, config = weight_files.load(folder / "decoder.safetensors", "decoder")
    after, stored_config = weight_files.load(tmp_path / "half" / "decoder.safetensors", "decoder")
    assert stored_config == config and before.keys() == after.keys()
    for name, array in after.items():
        assert array.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(array, before[name].astype(ml_dtypes.bfloat16))
    assert Leon.load(tmp_path / "half", prepared).generate(tiny.PROMPT, num_docs=0)


def test_a_tar_of_the_folder_is_a_model_and_is_unpacked_once(run, tmp_path):
    folder, prepared = tiny.folders()
    assert run("export", *parts(folder), f"--index={prepared}", "--out=cats")[0] == 0
    with tarfile.open("cats.tar", "w") as archive:
        archive.add("cats")
    with tarfile.open("flat.tar", "w") as archive:
        archive.add("cats", arcname=".")
    shutil.rmtree("cats")
    generate = "generate", f"--prompt={tiny.PROMPT}", "--num_images=1"
    for name in ("cats.tar", "flat.tar"):
        code, _, error = run(*generate, f"--model={name}", f"--out=out/{name}")
        assert (code, error) == (0, ""), name
    first, second = (
        next(pathlib.Path("out", name).glob("*.png")) for name in ("cats.tar", "flat.tar")
    )
    np.testing.assert_array_equal(*(np.asarray(PIL.Image.open(path)) for path in (first, second)))
    unpacked = sorted((tmp_path / "cache" / "models").glob("*/*"))
    assert sorted(path.name for path in unpacked) == ["cats", "flat"]
    times = [(path / "decoder.safetensors").stat().st_mtime_ns for path in unpacked]
    assert Leon.load("cats.tar").name.endswith(" cats")
    assert times == [(path / "decoder.safetensors").stat().st_mtime_ns for path in unpacked]
    assert "unpacked models" in run("cache")[1]


def test_all_missing_parts_are_listed_at_once(run, tmp_path):
    code, _, error = run("export", "--text=nowhere.json", "--out=cats")
    assert code == 2 and all(f"--{name}" in error for name in ("decoder", "tokenizer", "encoder"))
    folder, _ = tiny.folders()
    flags = [f"--{name}={folder / file}x" for name, file in FLAGS.items()]
    code, _, error = run("export", *flags, "--out=cats")
    assert code == 2 and all(f"--{name} names" in error for name in FLAGS)
    assert not (tmp_path / "cats").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--out="], "--out is missing"),
        (["--workdir=nowhere"], "nowhere is not a training run: it has no config.json"),
        (["--num_docs=99"], "num_docs is 99, but a context of 160 tokens holds at most"),
        (["--licence=GPL-2"], "--licence=GPL-2 is not an SPDX licence expression"),
        (["--index=nowhere"], "nowhere is not a prepared folder"),
        (["--notes=nowhere.md"], "cannot read --notes=nowhere.md"),
        (["--selection=nowhere.json"], "cannot read the selection rules nowhere.json"),
        (["--guidance=-1"], "guidance is -1"),
    ],
)
def test_wrong_flags_are_refused_and_nothing_is_written(run, tmp_path, flags, message):
    code, _, error = run("export", *parts(tiny.folders()[0]), "--out=models/cats", *flags)
    assert code == 2 and message in error and error.count("\n") == 1
    assert not list(tmp_path.glob("models/*")) and not list(tmp_path.glob("models/.*"))


def test_parts_that_do_not_belong_together_are_refused(run, tmp_path):
    folder, prepared = tiny.folders()
    TextTokenizer.train(["a cat"] * 3, 280).save(tmp_path / "text.json")
    code, _, error = run("export", *parts(folder), "--text=text.json", "--out=cats")
    assert code == 2 and "entries" in error and not (tmp_path / "cats").exists()
    # An index that other files made.
    manifest = json.loads((prepared / "manifest.json").read_text())
    manifest["sha256"]["encoder"] = "0" * 64
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.json").write_text(json.dumps(manifest))
    code, _, error = run("export", *parts(folder), "--index=other", "--out=cats")
    assert code == 2 and "was encoded with another encoder file" in error
    assert not (tmp_path / "cats").exists()


def test_an_older_model_folder_is_replaced_and_other_files_stay(run, tmp_path):
    folder, _ = tiny.folders()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    code, _, error = run("export", *parts(folder), "--out=notes")
    assert code == 2 and "notes exists and is not a model folder" in error
    assert run("export", *parts(folder), "--out=cats")[0] == 0
    (tmp_path / "cats" / "a.txt").write_text("mine")
    assert run("export", *parts(folder), "--out=cats", "--guidance=5")[0] == 0
    assert (tmp_path / "cats" / "a.txt").read_text() == "mine"
    assert ModelFolder.open("cats").defaults.sampling.guidance.weight == 5
    # A re-export keeps the defaults of the decoder's own folder.
    assert run("export", *parts(tmp_path / "cats"), "--out=again")[0] == 0
    assert ModelFolder.open("again").defaults.sampling.guidance.weight == 5


def test_a_stop_while_writing_leaves_the_older_folder(run, tmp_path, monkeypatch):
    folder, _ = tiny.folders()
    assert run("export", *parts(folder), "--out=cats")[0] == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "cats").iterdir()}

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write, "write_description", fail)
    code, _, error = run("export", *parts(folder), "--out=cats", "--guidance=5")
    assert code == 2 and "cats cannot be written: No space left on device" in error
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "cats").iterdir()}
    assert not list(tmp_path.glob(".cats*"))
