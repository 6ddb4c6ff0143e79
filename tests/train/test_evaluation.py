"""Tests which documents a run is evaluated on, and the metrics of image tokenizer and encoder."""

import dataclasses

import jax
import numpy as np
import pytest

from leon_jax.config import UserError, to_dict
from leon_jax.data.config import CaptionedImageDataConfig, FolderComponent, ImageDataConfig
from leon_jax.data.document_folder import DocumentFolder
from leon_jax.models.perceptual import lpips
from leon_jax.retrieval.encoder import frame, plain_square
from leon_jax.tokenizers.image import fit_image, normalize
from leon_jax.tokenizers.text import TextTokenizer
from leon_jax.train.evaluation import Evaluator, choose_held_out
from leon_jax.train.image_tokenizer import TokenizerProgram
from leon_jax.train.retrieval_encoder import EncoderProgram, contrastive_loss
from leon_jax.train.state import Program
from tests import document_folders
from tests.train import test_image_tokenizer, test_retrieval_encoder


def evaluate(program: Program, model) -> dict[str, float]:
    evaluator = Evaluator(program.evaluation())
    evaluator.compile(model)
    return evaluator.run(model)


def chosen(data: ImageDataConfig) -> list[tuple[str, str, list[int]]]:
    """Returns the name of the folder, the split and the numbers of the chosen documents."""
    return [
        (part.folder.folder.name, part.split, part.documents.tolist())
        for part in choose_held_out(data, DocumentFolder)
    ]


def test_held_out_documents_lie_at_equal_distances_in_the_first_other_split(tmp_path):
    drawings = document_folders.drawings()
    a = document_folders.write(tmp_path / "a", drawings, empty=[], exam=drawings, other=drawings)
    b = document_folders.write(tmp_path / "b", drawings, second=drawings[:4])
    c = document_folders.write(tmp_path / "c", drawings)
    assert chosen(ImageDataConfig(a)) == [("a", "exam", list(range(12)))]
    assert chosen(ImageDataConfig(a, eval_documents=4)) == [("a", "exam", [0, 3, 6, 9])]
    assert chosen(ImageDataConfig(a, eval_split="other", eval_documents=1)) == [("a", "other", [0])]
    assert chosen(ImageDataConfig(a, split="exam", eval_documents=1)) == [("a", "train", [0])]
    mixture = tuple(map(FolderComponent, (a, b, c, a)))
    assert chosen(ImageDataConfig(mixture=mixture, eval_documents=8)) == [
        ("a", "exam", [0, 2, 4, 6, 8, 10]), ("b", "second", [0, 2]),
    ]  # fmt: skip
    named = ImageDataConfig(mixture=mixture, eval_split="second")
    assert chosen(named) == [("b", "second", [0, 1, 2, 3])]
    assert chosen(ImageDataConfig(c)) == []
    with pytest.raises(
        UserError, match=r"'exams', but no folder has documents .* train, empty, ex"
    ):
        chosen(ImageDataConfig(a, eval_split="exams"))
    with pytest.raises(UserError, match="eval_split is 'exam', which the run trains on"):
        chosen(ImageDataConfig(a, split="exam", eval_split="exam"))
    with pytest.raises(UserError, match="eval_documents is 0; it must be at least 1"):
        ImageDataConfig(a, eval_documents=0)


def test_keys_with_their_default_are_left_out_of_saved_configurations():
    assert not {"eval_split", "eval_documents"} & to_dict(ImageDataConfig("a")).keys()
    assert to_dict(ImageDataConfig("a", eval_documents=9))["eval_documents"] == 9


def test_the_image_tokenizer_is_measured_on_whole_images(tmp_path):
    """Five images in batches of four; the last batch is padded."""
    held_out = document_folders.photographs(5, 40)
    folder = document_folders.write(tmp_path / "a", document_folders.drawings(), exam=held_out)
    program = test_image_tokenizer.program_of(folder)
    model = jax.jit(program.init)(jax.random.key(0)).model
    metrics = evaluate(program, model)
    images = normalize(np.stack([fit_image(one.pixels, 32) for one in held_out]))
    codes = np.asarray(model.generator.encode(images))
    outputs = np.asarray(model.generator.decode(codes))
    distance = float(lpips(outputs, images, program.perceptual, "alexnet").mean())
    errors = np.square((np.clip(outputs, -1, 1) - images) / 2).mean((1, 2, 3), dtype=np.float64)
    expected = {
        "heldout/reconstruction_loss": np.abs(outputs - images).mean() + distance,
        "heldout/psnr_db": np.mean(-10 * np.log10(errors)),
        "heldout/lpips": distance,
        "heldout/codes_used": len(set(codes.ravel().tolist())) / 64,
    }
    assert metrics == pytest.approx(expected, rel=1e-4)


def test_the_encoder_is_measured_by_its_loss_and_its_recall(tmp_path):
    """Each document searches those of its own group, too, so a match within a group counts."""
    drawings = document_folders.drawings()
    config = test_retrieval_encoder.make_config(tmp_path, drawings)
    folder = document_folders.write(tmp_path / "b", drawings, exam=drawings[:10])
    data = CaptionedImageDataConfig(folder, text=config.data.text)
    program = EncoderProgram(dataclasses.replace(config, data=data))
    model = jax.jit(program.init)(jax.random.key(1)).model
    metrics = evaluate(program, model)
    text = TextTokenizer.load(config.data.text)
    images = np.stack([plain_square(one.pixels, 16) for one in drawings[:10]])
    captions = [one.provenance.captions[0] for one in drawings[:10]]
    ids = np.stack([frame(text.encode(caption), program.config.model.text) for caption in captions])
    groups = np.repeat(np.arange(5, dtype=np.int32), 2)
    loss, accuracy = contrastive_loss(model, images, ids, groups)
    embeddings = np.asarray(model.embed_image(images.astype(np.float32) / 255))
    scores = np.asarray(model.embed_text(ids)) @ embeddings.T
    assert metrics == pytest.approx(
        {
            "heldout/loss": float(loss),
            "heldout/image_to_text": float(accuracy),
            "heldout/text_to_image": float((groups[scores.argmax(1)] == groups).mean()),
        },
        rel=1e-5,
    )


@pytest.mark.parametrize("kind", [TokenizerProgram, EncoderProgram])
def test_a_folder_without_held_out_documents_is_not_evaluated(tmp_path, kind):
    config = test_retrieval_encoder.make_config(tmp_path, document_folders.drawings())
    if kind is TokenizerProgram:
        data = ImageDataConfig(config.data.folder)
        config = dataclasses.replace(test_image_tokenizer.CONFIG, data=data)
    assert kind(config).evaluation() is None
