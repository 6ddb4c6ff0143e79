"""Tests the evaluation of a decoder on held-out documents."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest
from scipy.special import log_softmax

from leon_jax import config as configuration
from leon_jax.config import UserError
from leon_jax.documents import Document, Image, Text
from leon_jax.retrieval.prepared_folder import PreparedFolder, write_split
from leon_jax.train.decoder import DecoderProgram
from leon_jax.train.decoder_config import DecoderTraining
from leon_jax.train.evaluation import Evaluator
from tests.train.test_decoder_program import NAMES, make_config, write_data

HELD_OUT = ("red car", "blue heart and a green clock", "tree")


def write(folder: pathlib.Path, neighbours: bool = True) -> None:
    """Writes the training data, and three held-out documents with up to two neighbours each."""
    write_data(folder)
    rng = np.random.default_rng(1)
    documents = [
        Document((Text(name), Image(codes=rng.integers(0, 16, (2, 2)).astype(np.int32))))
        for name in HELD_OUT
    ]
    by_text = np.array([[2, 0], [1, -1], [3, 2]], np.int32)
    by_image = np.array([[1, 3], [1, 0], [0, 1]], np.int32)
    write_split(folder, "test", documents, np.stack([by_text, by_image]) if neighbours else None)


def make_program(folder: pathlib.Path, **data) -> DecoderProgram:
    config = make_config(folder)
    config.data.update({"retrieved": (0.2, 0.3, 0.3, 0.2), **data})
    return DecoderProgram(configuration.build(DecoderTraining, config))


def evaluate(program: DecoderProgram, model=None) -> dict[str, float]:
    evaluation = program.evaluation()
    assert evaluation is not None
    evaluator = Evaluator(evaluation)
    model = jax.jit(program.init)(jax.random.key(0)).model if model is None else model
    evaluator.compile(model)
    return evaluator.run(model)


def expected(program: DecoderProgram, model, retrieved: list[list[int]]) -> dict[str, float]:
    """Returns the mean loss of the held-out documents, each after documents of train, in float64.

    Every example is encoded and scored alone, without segments. Padding follows it, which no
    earlier position reads, so that one program scores all.
    """
    logits = jax.jit(lambda ids: model.logits(model(ids)))
    folder, tokenizer = PreparedFolder(program.config.data.folder), program.documents
    train, test, vocabulary = folder.records(), folder.records("test"), program.config.vocabulary
    losses: dict[str, list[float]] = {"image_loss": [], "text_loss": []}
    for row, numbers in enumerate(retrieved):
        ids = tokenizer.encode([*(train[number] for number in numbers), test[row]])
        query = len(tokenizer.encode(test[row])) - 1  # the ids of the query after the first </s>
        padded = np.pad(ids[:-1], (0, model.config.max_length - len(ids) + 1))[None]
        scores = log_softmax(np.asarray(logits(padded), np.float64)[0], axis=-1)
        for position in range(len(ids) - query, len(ids)):
            loss = -scores[position - 1, ids[position]]
            if vocabulary.is_image(ids[position]):
                losses["image_loss"].append(loss)
            elif vocabulary.is_text(ids[position]):
                losses["text_loss"].append(loss)
    assert len(losses["image_loss"]) == 4 * len(retrieved)
    return {name: float(np.mean(values)) for name, values in losses.items()}


def test_the_loss_is_the_mean_over_the_tokens_of_the_queries(tmp_path):
    """The best neighbours by text come first, then those by image; the best one is the last."""
    write(tmp_path)
    program = make_program(tmp_path)
    model = jax.jit(program.init)(jax.random.key(0)).model
    metrics = evaluate(program, model)
    retrieved = {0: [[], [], []], 1: [[2], [1], [3]], 2: [[0, 2], [0, 1], [2, 3]]}
    assert len(metrics) == 6
    for number, documents in retrieved.items():
        for name, loss in expected(program, model, documents).items():
            assert metrics[f"heldout/{name}_{number}"] == pytest.approx(loss, rel=1e-5)
    assert program.evaluation().loss == "image_loss_2"
    assert program.evaluation().documents == (
        f"3 documents of {tmp_path} (test), with 0, 1 and 2 retrieved documents"
    )


def test_numbers_of_documents_that_do_not_fit_or_are_not_trained_are_left_out(tmp_path):
    write(tmp_path)

    def names(**data):
        return {name.removeprefix("heldout/") for name in evaluate(make_program(tmp_path, **data))}

    alone = {"image_loss_0", "text_loss_0"}
    assert names(retrieved=(1.0,)) == alone
    assert names(retrieved=(0.5, 0.5)) == alone | {"image_loss_1", "text_loss_1"}
    # The shortest example with two retrieved documents takes 27 tokens of a row.
    assert names(length=27) == alone | {f"{name}_{k}" for name in ("image_loss", "text_loss")
                                        for k in (1, 2)}  # fmt: skip
    assert names(length=26) == alone | {"image_loss_1", "text_loss_1"}
    with pytest.raises(
        UserError, match=r"no document of .*\(test\) fits a row of config\.data\.le"
    ):
        names(length=4)


def test_a_split_without_neighbours_is_evaluated_without_retrieved_documents(tmp_path):
    write(tmp_path, neighbours=False)
    assert set(evaluate(make_program(tmp_path))) == {"heldout/image_loss_0", "heldout/text_loss_0"}


def test_rows_do_not_depend_on_the_batch_or_on_the_seed(tmp_path):
    write(tmp_path)
    program = make_program(tmp_path)
    other = DecoderProgram(dataclasses.replace(program.config, batch_size=2, seed=5))
    model = jax.jit(program.init)(jax.random.key(0)).model
    rows, same = program.evaluation().rows, other.evaluation().rows
    assert all(np.array_equal(rows[name], same[name]) for name in rows)
    assert len(rows["ids"]) > 2, "several batches"
    for name, value in evaluate(other, model).items():
        assert value == pytest.approx(evaluate(program, model)[name], rel=1e-6)


def test_a_folder_without_held_out_documents_is_not_evaluated(tmp_path):
    write_data(tmp_path)
    assert make_program(tmp_path).evaluation() is None
    assert len(NAMES) == PreparedFolder(tmp_path).splits["train"]
    with pytest.raises(
        UserError, match="eval_split is 'test', but no folder has documents in this"
    ):
        make_program(tmp_path, eval_split="test").evaluation()
    with pytest.raises(UserError, match="eval_split is 'train', which the run trains on"):
        make_program(tmp_path, eval_split="train").evaluation()
