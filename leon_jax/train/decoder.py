"""Trains the decoder: next-token prediction over packed rows of CM3-masked documents.

The loss is the plain cross-entropy of every token of every document, retrieved ones included
(arXiv 2309.02591, section 2.2), unless the masking configuration weights tokens differently.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array
from optax.contrib import MuonDimensionNumbers

from leon_jax import config as configuration
from leon_jax import storage, weight_files
from leon_jax.config import UserError
from leon_jax.data import pipeline
from leon_jax.documents import Document, Hole, Text
from leon_jax.engine import scheduler
from leon_jax.engine.engine import Engine, Sample, TokenRequest
from leon_jax.engine.grammar import ImageSpan
from leon_jax.engine.guidance import make_guidance
from leon_jax.engine.sampling_params import SamplingParams
from leon_jax.export import provenance, write
from leon_jax.export.parts import Parts, of_run
from leon_jax.models.decoder import Decoder
from leon_jax.tokenizers.documents import DocumentTokenizer
from leon_jax.tokenizers.image import ImageTokenizer, to_pixels
from leon_jax.tokenizers.text import TextTokenizer
from leon_jax.train import decoder_data, decoder_evaluation, optimizer
from leon_jax.train.code_embeddings import read_codebook, start_decoder_at_codes
from leon_jax.train.decoder_config import KIND, DecoderTraining
from leon_jax.train.decoder_loss import BATCH_DTYPES, gradients, query_losses
from leon_jax.train.evaluation import Evaluation
from leon_jax.train.state import TrainState, check_multiples, rows_of_shard


class DecoderProgram:
    """The training program of the decoder; see `leon_jax.train.state.Program`.

    The constructor reads no file, so that `leon plan` can compile the program without data.
    """

    kind = KIND

    def __init__(self, config: DecoderTraining) -> None:
        self.config = config
        self.optimizer = optimizer.make(config.optimizer, _decays, _MATRICES)
        self.flops_per_token = float(config.model.flops_per_token(config.data.length))

    @functools.cached_property
    def text(self) -> TextTokenizer:
        """The text tokenizer `config.data.text`.

        Raises:
          UserError: it is not named, or its file is missing or damaged.
        """
        if not self.config.data.text:
            raise UserError("config.data.text is empty; name the text tokenizer's file, text.json")
        return TextTokenizer.load(self.config.data.text)

    @functools.cached_property
    def codebook(self) -> np.ndarray | None:
        """The vectors that the embeddings of image ids start at, or None (`config.codebook`).

        Raises:
          UserError: see `read_codebook`.
        """
        if not self.config.codebook:
            return None
        return read_codebook(self.config.codebook, self.config.vocabulary.image_codes)

    @functools.cached_property
    def documents(self) -> DocumentTokenizer:
        """The tokenizer of documents.

        Raises:
          UserError: the text tokenizer is missing or does not fit `vocabulary.text_tokens`.
        """
        rows, columns = self.config.data.image_shape
        return DocumentTokenizer(self.config.vocabulary, self.text, (rows, columns))

    def check_mesh(self, mesh: Sequence[int]) -> None:
        """Checks that a mesh splits the batch and the model evenly; see `check_divisible`."""
        check_divisible(self.config, mesh)

    def init(self, key: jax.Array) -> TrainState:
        """Returns a randomly initialised model with its optimizer state.

        Raises:
          UserError: the current mesh cannot split the batch or the model evenly, or the decoder
            predicts a part of the ids only.
        """
        if self.config.model.form.head_ids is not None:
            raise UserError(
                "config.model.form.head_ids is set, so the decoder predicts image codes only; the "
                "documents of training have texts, too"
            )
        self.check_mesh(tuple(jax.sharding.get_abstract_mesh().shape.values()))
        model_key, run_key = jax.random.split(key)
        model = Decoder(self.config.model, rngs=nnx.Rngs(model_key))
        if self.codebook is not None:
            start_decoder_at_codes(
                model, self.codebook, self.config.vocabulary, jax.random.fold_in(model_key, 1)
            )
        return TrainState(jnp.zeros((), jnp.int32), model, self.optimizer.init(model), run_key)

    def step(
        self, state: TrainState, batch: dict[str, Array]
    ) -> tuple[TrainState, dict[str, Array]]:
        """Updates the model once.

        Args:
          state: the current state.
          batch: see `leon_jax.data.pipeline.make`.

        Returns:
          The next state, and the metrics of `batch_loss`, `gradient_norm` and `learning_rate`.
        """
        grads, metrics = gradients(self.config, state.model, batch)
        updates, opt_state = self.optimizer.update(grads, state.opt_state, state.model)
        model = optax.apply_updates(state.model, updates)
        metrics["gradient_norm"] = optax.tree.norm(grads)
        metrics["learning_rate"] = optimizer.learning_rate(self.config.optimizer)(state.step)
        return TrainState(state.step + 1, model, opt_state, state.key), metrics

    def batches(self, shard: int = 0, shards: int = 1) -> grain.IterDataset:
        """Returns endless packed batches, or one shard of them, seeded by `config.seed`."""
        config, data = self.config, self.config.data
        return pipeline.make(
            decoder_data.open_components(data),
            self.documents,
            data,
            config.masking,
            batch_size=rows_of_shard(config.batch_size, shards),
            seed=config.seed,
            max_positions=config.model.max_length,
            part_step=config.model.part_step,
            shard=(shard, shards),
        )

    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes and dtypes of the arrays of a batch of packed rows."""
        shape = self.config.batch_size, self.config.data.length
        return {name: jax.ShapeDtypeStruct(shape, dtype) for name, dtype in BATCH_DTYPES.items()}

    def evaluation(self) -> Evaluation | None:
        """Prepares the evaluation; see `leon_jax.train.decoder_evaluation.make_evaluation`."""
        return decoder_evaluation.make_evaluation(self.config, self.documents, self.evaluate)

    def evaluate(self, model: Decoder, batch: dict[str, Array]) -> dict[str, Array]:
        """Returns the sums of each row's losses; see `query_losses`."""
        config = self.config
        return query_losses(model, batch, vocabulary=config.vocabulary, chunk=config.loss_chunk)

    def samples(self, state: TrainState) -> dict[str, np.ndarray]:
        """Generates a row of images, one for each of `config.samples.captions`.

        Returns an empty dictionary without an image tokenizer. The tokenizer is loaded each time,
        so that it takes no memory between samples.

        Raises:
          UserError: the image tokenizer's file is missing or does not fit.
        """
        config = self.config.samples
        if not config.image or not config.captions:
            return {}
        vocabulary, (rows, columns) = self.config.vocabulary, self.config.data.image_shape
        params = SamplingParams(make_guidance(config.guidance))
        unconditional = self.documents.prompt(Document((Hole("text"), Hole("image"))))
        requests = []
        for seed, caption in enumerate(config.captions):
            conditional = self.documents.prompt(Document((Text(caption), Hole("image"))))
            grammar = (ImageSpan(rows * columns),)
            requests.append(
                TokenRequest((conditional, unconditional), grammar, (Sample(seed, params),))
            )
        outputs = scheduler.generate(Engine(state.model, vocabulary), requests)
        codes = np.stack([spans[0].ids - vocabulary.image_start for (spans,) in outputs])
        tokenizer = ImageTokenizer.load(config.image)
        if tokenizer.shape != (rows, columns) or tokenizer.codes != vocabulary.image_codes:
            raise UserError(
                f"the tokenizer {config.image} has {tokenizer.shape} tokens an image and "
                f"{tokenizer.codes} codes; the decoder needs {(rows, columns)} tokens and "
                f"{vocabulary.image_codes} codes"
            )
        images = to_pixels(tokenizer.decode(codes.reshape(-1, rows, columns)))
        return {"samples": np.concatenate(list(images), axis=1)}

    def export(self, state: TrainState, directory: pathlib.Path) -> None:
        """Writes the model folder `directory`, if all its files are known.

        Otherwise writes `decoder.safetensors` and its text tokenizer `text.json` only.

        Raises:
          UserError: a file of the model folder is missing, damaged or does not fit the decoder.
        """
        config = self.config
        parts = self._folder_parts(directory)
        target = directory if parts.unknown else write.staging_folder(directory)
        self.save_weights(state.model, target)
        if jax.process_index() != 0:
            return
        self.text.save(target / "text.json")
        if not parts.unknown:
            values = configuration.to_dict(config)
            known = provenance.of_run(KIND, directory.parent, values)
            settings = write.ExportSettings(title=storage.absolute(directory).parent.name)
            write.complete(target, parts, directory, settings, known)

    def save_weights(self, model: Decoder, directory: pathlib.Path) -> None:
        """Writes `decoder.safetensors` into a folder."""
        header = {
            "model": configuration.to_dict(self.config.model),
            "vocabulary": configuration.to_dict(self.config.vocabulary),
            "image_shape": list(self.config.data.image_shape),
        }
        weight_files.save(directory / "decoder.safetensors", model, KIND, header)

    def check_export(self, directory: pathlib.Path) -> str:
        """Checks the files that `export` needs, and returns a sentence on what it will write.

        Raises:
          UserError: a file that the configuration names does not exist or does not fit.
        """
        parts = self._folder_parts(directory)
        parts.check_files(_PART_KEYS)
        if not parts.unknown:
            return f"the run ends in the model folder {directory}"
        keys = " and ".join(_PART_KEYS[name] for name in parts.unknown)
        return (
            f"the run ends in a decoder and its text tokenizer in {directory}; set {keys} for a "
            "model folder, or make one with leon export"
        )

    def _folder_parts(self, directory: pathlib.Path) -> Parts:
        """Returns the parts of the model folder that the run ends in."""
        return dataclasses.replace(
            of_run(configuration.to_dict(self.config)),
            decoder=directory / "decoder.safetensors",
            text=storage.path(self.config.data.text),
        )


def _decays(name: str, leaf: Array) -> bool:
    """Returns whether a weight decays: products and tables do, scales and biases do not."""
    return leaf.ndim >= 2 and not name.endswith(("_scale", "_bias"))


# The matrices of the layers, [layers, ...] each, with their axes of inputs and outputs.
_MATRICES = {
    f"blocks.{name}": MuonDimensionNumbers(inputs, outputs)
    for name, inputs, outputs in (
        ("query", 1, (2, 3)),
        ("key", 1, (2, 3)),
        ("value", 1, (2, 3)),
        ("out", (1, 2), 3),
        ("fc1", 1, 2),
        ("gate", 1, 2),
        ("fc2", 1, 2),
    )
}

# The config key of each part of the model folder.
_PART_KEYS = {
    "tokenizer": "config.export.tokenizer",
    "text": "config.data.text",
    "encoder": "config.export.encoder",
}


def check_divisible(
    config: DecoderTraining, mesh: Sequence[int], batch_size: str = "config.batch_size"
) -> None:
    """Checks that a mesh and the microbatches split the batch and the model evenly.

    Args:
      config: the configuration of the run.
      mesh: sizes of the axes (data, fsdp, context, tensor).
      batch_size: the name of the batch size in error messages.

    Raises:
      UserError: a size is not a multiple of the number of its parts; the message names both.
    """
    data, fsdp, context, tensor = mesh
    model, rows = config.model, data * fsdp * config.microbatches
    check_multiples(
        (
            (batch_size, config.batch_size, rows, "data x fsdp x microbatches"),
            ("config.data.length", config.data.length, context, "context"),
            ("config.model.embed", model.embed, fsdp, "fsdp"),
            ("config.model.heads", model.heads, tensor, "tensor"),
            ("config.model.kv_heads", model.key_heads, tensor, "tensor"),
            ("config.model.mlp", model.mlp, tensor, "tensor"),
            ("config.model.vocab_size", model.vocab_size, tensor, "tensor"),
            ("config.model.form.head_ids", model.head_rows, tensor, "tensor"),
        )
    )
