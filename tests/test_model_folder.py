"""Model folders: opening them, their defaults, and archives of them."""

import dataclasses
import io
import json
import pathlib
import re
import shutil
import tarfile

import pytest

from leon_jax.cli import main
from leon_jax.config import UserError
from leon_jax.engine.guidance import ClassifierFree, Plain
from leon_jax.engine.sampling_params import SamplingParams
from leon_jax.export.model_card import card
from leon_jax.generate import context_limits, retriever
from leon_jax.generate.image_settings import ImageSettings
from leon_jax.leon import Leon
from leon_jax.model_description import IndexAddress, ModelDescription
from leon_jax.model_folder import ModelFolder, encoder_path, shipped_folder
from leon_jax.prepare.encoding_models import digest
from tests import tiny

ROOT = pathlib.Path(__file__).parents[1]
SHIPPED = (shipped_folder() / "decoder.safetensors").is_file()


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    """A copy of the tiny model folder, which has no `model.json`."""
    retriever._say_once.cache_clear()
    shutil.copytree(tiny.folders()[0], tmp_path / "cats")
    return tmp_path / "cats"


def test_all_missing_files_are_listed_at_once(folder):
    for name in ("decoder.safetensors", "tokenizer.safetensors", "encoder.safetensors"):
        (folder / name).unlink()
    (folder / "text.json").write_bytes(b"")
    with pytest.raises(UserError) as error:
        ModelFolder.open(folder)
    for name in ("decoder.safetensors", "tokenizer.safetensors", "text.json", "encoder.safet"):
        assert name in str(error.value)
    (folder / "checkpoints").mkdir()
    (folder / "config.json").write_text("{}")
    with pytest.raises(UserError, match=f"leon export --workdir={folder}"):
        ModelFolder.open(folder)


def test_a_folder_without_a_description_has_the_former_defaults(folder):
    opened = ModelFolder.open(folder)
    assert opened.defaults.sampling == SamplingParams(ClassifierFree(3.0))
    assert opened.defaults.num_docs == 2
    # As many as fit, if that is less.
    config = dataclasses.replace(opened.config, max_length=tiny.GRID**2 + 30)
    assert dataclasses.replace(opened, config=config).defaults.num_docs == 1


def test_generation_follows_the_defaults_of_the_folder(folder):
    _, prepared = tiny.folders()
    sampling = SamplingParams.of(guidance=2.0, top_p=0.7)
    description = ModelDescription(
        "cats",
        generation={"sampling": sampling.to_dict(), "num_docs": 1},
        index=IndexAddress(folder=str(prepared)),
    )
    (folder / "model.json").write_text(description.to_json())
    leon = Leon.load(folder)
    (image,) = leon.generate(tiny.PROMPT)
    assert image.params == sampling and len(image.retrieved) == 1
    ((_, (same,)),) = leon.generate_each([tiny.PROMPT])
    assert same.settings == image.settings
    ((_, (same,)),) = leon.generate_each([tiny.PROMPT], ImageSettings(num_images=1))
    assert same.settings == image.settings
    # An argument replaces one value and no other.
    (image,) = leon.generate(tiny.PROMPT, guidance=1.0, num_docs=2)
    assert image.params.guidance == Plain() and image.params.image.top_p == 0.7
    assert len(image.retrieved) == 2


def test_a_model_without_an_index_generates_without_documents_and_says_so(
    folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    code = main.run(["generate", f"--model={folder}", f"--prompt={tiny.PROMPT}", "--num_images=1"])
    printed = capsys.readouterr()
    assert code == 0 and "retrieved" not in printed.out
    assert printed.err.count("\n") == 1
    assert "the model cats has no index, so it generates without retrieved doc" in printed.err
    leon = Leon.load(folder)
    (image,) = leon.generate(tiny.PROMPT)
    assert image.retrieved == () and json.loads(image.settings)["num_docs"] == 0
    assert capsys.readouterr().err == ""  # once is enough
    # What is asked for and is not there is an error.
    with pytest.raises(UserError, match="the model cats has no index; give --index"):
        leon.generate(tiny.PROMPT, num_docs=1)
    code = main.run(["generate", f"--model={folder}", f"--prompt={tiny.PROMPT}", "--num_docs=1"])
    assert code == 2 and "the model cats has no index; give --index" in capsys.readouterr().err


def test_an_index_on_another_machine_is_named(folder, capsys):
    description = ModelDescription("cats", index=IndexAddress(folder="/nowhere/cats"))
    (folder / "model.json").write_text(description.to_json())
    assert retriever.usable_defaults(ModelFolder.open(folder)).num_docs == 0
    assert "the index of the model cats, /nowhere/cats, is not on this" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"model\.json is not JSON"),
        ('{"title": "a", "format": 2}', "has format 2, this version reads 1"),
        ('{"titel": "a"}', r"model\.json\.title\?"),
        ('{"title": "a", "generation": {"num_docs": -1}}', "generation.num_docs is -1"),
        ('{"title": "a", "generation": {"sampling": {"top": 1}}}', r"sampling\.top is unknown"),
        ('{"title": "a", "index": {"folder": "x", "prepare": "demo"}}', "keep one"),
        ('{"title": "a", "index": {"prepare": "cats"}}', "prepare is 'cats'"),
    ],
)
def test_a_damaged_description_is_named(folder, content, message):
    (folder / "model.json").write_text(content)
    with pytest.raises(UserError, match=message):
        ModelFolder.open(folder)


def test_a_context_that_holds_no_document_is_said_so(folder):
    opened = ModelFolder.open(folder)
    shape = (16, 16)
    tokenizer = type(opened.tokenizer)(opened.tokenizer.vocabulary, opened.tokenizer.text, shape)
    config = dataclasses.replace(opened.config, max_length=384)
    short = dataclasses.replace(opened, config=config, tokenizer=tokenizer)
    assert short.max_docs == 0 and short.defaults.num_docs == 0
    message = "a context of 384 tokens holds no retrieved document beside an image of 256 tokens"
    with pytest.raises(UserError, match=message):
        context_limits.check_num_docs(short, 1)
    with pytest.raises(UserError, match=message):
        context_limits.check_prompt(short, "a cat", 2)
    context_limits.check_num_docs(short, 0)


def archive(path: pathlib.Path, members: dict[str, bytes | tarfile.TarInfo]) -> pathlib.Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
                continue
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def link(name: str, target: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = tarfile.SYMTYPE, target
    return member


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"../outside": b"x"}, "is not safe to unpack"),
        ({"cats/link": link("cats/link", "/etc")}, "is not safe to unpack"),
        ({"cats/text.json": b"{}"}, "holds no model folder"),
    ],
)
def test_archives_that_are_unsafe_or_no_model_leave_nothing(
    tmp_path, monkeypatch, members, message
):
    monkeypatch.setenv("LEON_CACHE", str(tmp_path / "cache"))
    path = archive(tmp_path / "cats.tar", members)
    with pytest.raises(UserError, match=message):
        Leon.load(path)
    assert not (tmp_path / "outside").exists() and not (tmp_path / "cache" / "outside").exists()
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_files_that_are_no_archive_or_compressed_are_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("LEON_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="is neither a model folder nor a"):
        Leon.load(folder / "text.json")
    with tarfile.open(tmp_path / "cats.tar", "w:gz") as tar:
        tar.add(folder, arcname="cats")
    with pytest.raises(UserError, match="it is damaged, or compressed"):
        Leon.load(tmp_path / "cats.tar")


def test_save_copies_the_description_and_the_card(folder, tmp_path):
    (folder / "model.json").write_text(ModelDescription("cats").to_json())
    (folder / "README.md").write_text("# cats")
    ModelFolder.open(folder).copy_to(tmp_path / "copy")
    copy = ModelFolder.open(tmp_path / "copy")
    assert copy.description == ModelDescription("cats") and (copy.path / "README.md").is_file()


@pytest.mark.skipif(not SHIPPED, reason="the shipped model is not there")
class TestShippedModel:
    def test_its_defaults_and_address_are_explicit(self):
        folder = ModelFolder.open()
        assert folder.defaults.sampling == SamplingParams.of(guidance=3.0)
        assert folder.defaults.num_docs == 2 and folder.index == IndexAddress(prepare="demo")
        assert "CC-BY-SA-4.0" in folder.description.licences
        assert not folder.description.unknown_licences
        assert folder.description.generation["max_docs"] == folder.max_docs

    def test_its_card_and_digests_are_those_of_its_files(self):
        folder = ModelFolder.open()
        assert card(folder, folder.description) == (folder.path / "README.md").read_text()
        paths = {
            "decoder": folder.path / "decoder.safetensors",
            "tokenizer": folder.path / "tokenizer.safetensors",
            "text": folder.path / "text.json",
            "encoder": encoder_path(folder.path),
        }
        assert folder.description.digests == {name: digest(path) for name, path in paths.items()}

    def test_the_numbers_of_its_card_are_those_of_the_docs(self):
        card = (shipped_folder() / "README.md").read_text()
        pages = {path.name: path.read_text() for path in (ROOT / "docs").glob("*.md")}
        measured = re.findall(r"^\|.*\| (.*) \|$", card.partition("## Measured")[2], re.MULTILINE)
        for number in re.findall(r"\d+\.?\d*", " ".join(measured)):
            assert number in pages["evaluate.md"] + pages.get("results.md", "")
        for each in ModelFolder.open().description.data:
            assert (
                f"{each.documents:,}" in card and f"{each.documents:,}" in pages["data_format.md"]
            )
        assert re.search(r"leon generate --model=\. ", card)
