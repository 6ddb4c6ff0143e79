"""Evaluates random models of every kind, for tests of meshes.

`python -m tests.end_to_end.evaluations FOLDER` writes data to FOLDER, and prints for each kind the
metrics on one device and on meshes of eight simulated devices.
"""

import dataclasses
import json
import pathlib
import sys

import jax
import numpy as np

from leon_jax import config as configuration
from leon_jax import sharding
from leon_jax.data.config import CaptionedImageDataConfig, ImageDataConfig
from leon_jax.tokenizers.text import TextTokenizer
from leon_jax.train.decoder import DecoderProgram
from leon_jax.train.decoder_config import DecoderTraining
from leon_jax.train.evaluation import Evaluator
from leon_jax.train.image_tokenizer import TokenizerProgram
from leon_jax.train.retrieval_encoder import EncoderProgram
from leon_jax.train.state import Program
from tests import document_folders
from tests.end_to_end import curves
from tests.train import test_decoder_evaluation, test_image_tokenizer, test_retrieval_encoder

ONE_DEVICE = (1, 1, 1, 1)
MESHES = {
    "decoder": [(8, 1, 1, 1), (1, 2, 2, 2)],
    "tokenizer": [(2, 2, 1, 2)],
    "encoder": [(2, 2, 1, 2)],
}


def make_program(kind: str, folder: pathlib.Path) -> Program:
    """Writes the data of a kind, once, and returns its program."""
    folder.mkdir(exist_ok=True)
    if kind == "decoder":
        test_decoder_evaluation.write(folder)
        config = curves.get_config(str(folder))
        config.data.retrieved = (0.4, 0.3, 0.3)
        return DecoderProgram(configuration.build(DecoderTraining, config))
    drawings, photographs = document_folders.drawings(), document_folders.photographs(9, 40)
    data = document_folders.write(folder / "documents", drawings, exam=photographs)
    if kind == "tokenizer":
        config = dataclasses.replace(test_image_tokenizer.CONFIG, data=ImageDataConfig(data))
        return TokenizerProgram(dataclasses.replace(config, batch_size=8))
    # With 301 entries the vocabulary has 304, which two devices divide.
    texts = [document.text for document in (*drawings, *photographs)]
    TextTokenizer.train(texts, 301).save(folder / "text.json")
    config = test_retrieval_encoder.tiny(data, str(folder / "text.json"))
    return EncoderProgram(
        dataclasses.replace(
            config, data=CaptionedImageDataConfig(data, text=str(folder / "text.json"))
        )
    )


def evaluate(kind: str, folder: pathlib.Path, shape: tuple[int, ...]) -> dict[str, float]:
    """Returns the metrics of a random model on a mesh."""
    devices = jax.devices()[: int(np.prod(shape))]
    with jax.set_mesh(sharding.make_mesh(shape, devices)):
        program = make_program(kind, folder)
        model = jax.jit(program.init)(jax.random.key(0)).model
        evaluation = program.evaluation()
        assert evaluation is not None
        evaluator = Evaluator(evaluation)
        evaluator.compile(model)
        return evaluator.run(model)


if __name__ == "__main__":
    folder = pathlib.Path(sys.argv[1])
    print(
        json.dumps(
            {
                kind: [evaluate(kind, folder / kind, mesh) for mesh in (ONE_DEVICE, *meshes)]
                for kind, meshes in MESHES.items()
            }
        )
    )
