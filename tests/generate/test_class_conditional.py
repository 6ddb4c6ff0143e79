"""A model that draws an image for a class: prompts, and the tasks that it does not have."""

import dataclasses
import json

import numpy as np
import PIL.Image
import pytest

from leon_jax.cli import main
from leon_jax.config import UserError
from leon_jax.convert import torch_file
from leon_jax.data import image_files
from leon_jax.documents import Document, Hole, Image, Text
from leon_jax.engine.guidance import ClassifierFree, Contrastive
from leon_jax.engine.samplers import Categorical, Greedy
from leon_jax.engine.sampling_params import SamplingParams
from leon_jax.leon import Leon
from leon_jax.model_folder import ModelFolder
from tests.convert import small_gpt

REFUSAL = "draws one image for one prompt; it writes no text"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The model folder of a small GPT with random weights."""
    path = tmp_path_factory.mktemp("gpt")
    torch_file.write(path / "gpt.pt", small_gpt.random_gpt(), "model")
    small_gpt.write_vqgan(path / "vqgan.pt")
    assert main.run(["convert", *small_gpt.flags(path), "--nocheck"]) == 0
    return path / "model"


@pytest.fixture(scope="module")
def leon(folder):
    return Leon.load(folder)


@pytest.fixture
def image():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3))
    return PIL.Image.fromarray(pixels.astype(np.uint8))


def test_the_defaults_are_those_of_the_published_script(folder):
    defaults = ModelFolder.open(folder).defaults
    assert defaults.sampling.guidance == ClassifierFree(4.0)
    assert defaults.sampling.image == Categorical(1.0, top_k=2000)
    assert defaults.num_docs == 0
    card = (folder / "README.md").read_text()
    assert '--prompt="golden retriever"' in card and "guidance 4" in card and "LlamaGen" in card
    assert "ImageNet terms of access" in card and "conversion.json" in card and "gpt.pt" in card


def test_prompts_are_one_id_and_the_unconditional_one_is_the_null_class(folder):
    tokenizer = ModelFolder.open(folder).tokenizer
    start = tokenizer.vocabulary.text_start
    for text, number in (("golden retriever", 207), ("207", 207), ("Tinca_tinca", 0), ("999", 999)):
        ids = tokenizer.prompt(Document((Text(text), Hole("image"))))
        np.testing.assert_array_equal(ids, [start + number])
    np.testing.assert_array_equal(tokenizer.prompt(Document((Hole("image"),))), [start + 1000])


def test_leon_generate_draws_a_class_by_number_or_name(folder, tmp_path, capsys):
    for number, prompt in enumerate(("207", "Golden Retriever")):
        flags = [f"--model={folder}", f"--prompt={prompt}", "--num_images=2"]
        assert main.run(["generate", *flags, f"--out={tmp_path}/{number}"]) == 0, (
            capsys.readouterr()
        )
    first, second = (sorted((tmp_path / str(number)).glob("*.png")) for number in range(2))
    assert len(first) == len(second) == 2
    pixels = [np.asarray(image_files.read(path)) for path in (*first, *second)]
    assert pixels[0].shape == (32, 32, 3) and (pixels[0] != pixels[1]).any()
    np.testing.assert_array_equal(pixels[:2], pixels[2:])


def test_flags_of_other_tasks_are_refused_in_one_sentence(folder, image, tmp_path, capsys):
    image.save(tmp_path / "a.png")
    for flags, message in (
        (["--prompt=207", "--num_docs=1"], REFUSAL),
        (["--task=caption", f"--image={tmp_path}/a.png"], REFUSAL),
        (["--prompt=golden retreiver"], "the closest are golden retriever (207)"),
        (["--prompt=1000"], "there is no class 1000; the model has the classes 0 to 999"),
        (["--prompt=crane"], "several classes are called 'crane'; give a number, 134"),
        (["--prompt=207", "--num_images=1", "--best_of=2"], "has no retrieval encoder"),
        (["--prompt=207", "--num_images=1", "--best_of=2", "--rank_by=likelihood"], REFUSAL),
    ):
        code = main.run(["generate", f"--model={folder}", *flags, f"--out={tmp_path}/out"])
        error = capsys.readouterr().err
        assert code == 2 and message in error, error


def test_documents_of_other_tasks_are_refused(leon, image):
    known = Image(codes=np.zeros((8, 8), int))
    for document in (
        Document((Hole("text"), known)),
        Document((Hole("text"), Hole("image"))),
        Document((Hole("image"), Text("207"))),
        Document((known, Hole("image"))),
        Document((Text("207"), Text("208"), Hole("image"))),
    ):
        with pytest.raises(UserError, match=REFUSAL):
            leon.complete(document)
    document = Document((Text("207"), Hole("image")))
    with pytest.raises(UserError, match=REFUSAL):
        leon.complete(document, retrieved=[[Document((Text("208"), known))]])
    with pytest.raises(UserError, match=REFUSAL):
        leon.edit(image, "make it red")
    with pytest.raises(UserError, match=REFUSAL):
        leon.answer(image, "what is it?")
    with pytest.raises(UserError, match=REFUSAL):
        leon.likelihood(Document((Text("207"), known)), part=0)


def test_an_image_is_drawn_without_a_class_and_continued_with_one(leon, image):
    (free,) = leon.complete([Document((Hole("image"),))])
    assert free.codes.shape == (8, 8)
    codes = leon.tokenize(Document((Image(pixels=np.asarray(image)),))).codes
    params = SamplingParams(Contrastive(0.3, 4), Categorical(0.7), Greedy())
    document = Document((Text("tench"), Hole("image", codes[:4])))
    (extended,) = leon.complete([document], params=params)
    np.testing.assert_array_equal(extended.codes[:4], codes[:4])
    assert leon.extend(image, "tench")[0].image.size == (32, 32)
    drafts = list(leon.stream(document, params=params))
    assert [draft.num_codes for draft in drafts[:-1]] == [40, 48, 56]
    np.testing.assert_array_equal(drafts[-1].document.codes, extended.codes)


def test_images_are_ranked_by_the_name_of_the_class(leon):
    texts = []

    class Encoder:
        def embed_images(self, pixels):
            return np.array([[1.0], [3.0], [2.0]])

        def embed_texts(self, prompts):
            texts.extend(prompts)
            return np.ones((1, 1))

    ranking = Leon(dataclasses.replace(leon.model, encoder=Encoder()))
    images = ranking.generate("207", num_images=2, best_of=3)
    assert texts == ["golden retriever"] and [image.seed for image in images] == [1, 2]


def test_likelihoods_of_an_image_depend_on_its_class(leon):
    codes = np.random.default_rng(0).integers(0, 64, (8, 8))
    scores = [
        leon.likelihood(Document((*text, Image(codes=codes))), part=part)
        for text, part in (
            ((Text("207"),), 1),
            ((Text("207"),), None),
            ((Text("208"),), None),
            ((), None),
        )
    ]
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)
    assert len({round(score, 2) for score in scores}) == 3 and max(scores) < 0


def test_weights_and_cache_in_eight_bits_draw(folder):
    leon = Leon.load(folder, weights="int8", cache="int8")
    assert leon.generate("207")[0].image.size == (32, 32)


def test_a_copy_of_the_folder_is_the_same_model(leon, folder, tmp_path):
    leon.save(tmp_path / "copy")
    names = {path.name for path in folder.iterdir()}
    assert {path.name for path in (tmp_path / "copy").iterdir()} == names
    assert json.loads((tmp_path / "copy" / "conversion.json").read_text())["licence"] == "MIT"
