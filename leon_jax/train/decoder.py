"""Training of the decoder: next-token prediction over packed rows of CM3-masked documents.

The loss is the plain cross-entropy of every token of every document, retrieved ones included
(arXiv 2309.02591, section 2.2), unless the masking configuration weights tokens differently.
"""

import dataclasses
import functools
import pathlib
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Float64

from leon_jax import config as configuration
from leon_jax import model_files
from leon_jax.config import UserError
from leon_jax.data import pipeline, variants
from leon_jax.data.masking import MaskingConfig
from leon_jax.data.records import RecordSource
from leon_jax.data.variants import Variants
from leon_jax.decode.engine import Engine, Prompt
from leon_jax.decode.grammar import ImageSpan
from leon_jax.decode.guidance import make_guidance
from leon_jax.documents import Document, Hole, Source, Text
from leon_jax.models.decoder import Decoder, DecoderConfig
from leon_jax.ops.cross_entropy import chunked_cross_entropy
from leon_jax.retrieval.selection import Neighbours, sample_neighbours
from leon_jax.sharding import spec
from leon_jax.tokenizers.documents import DocumentTokenizer
from leon_jax.tokenizers.image import ImageTokenizer, to_pixels
from leon_jax.tokenizers.text import TextTokenizer
from leon_jax.train import optimizer
from leon_jax.train.optimizer import OptimizerConfig
from leon_jax.train.state import TrainState, rows_of_shard
from leon_jax.vocabulary import Vocabulary

KIND = "decoder"


@dataclasses.dataclass(frozen=True)
class DecoderData:
    """What the decoder is trained on.

    Attributes:
      folder: a prepared folder (`leon prepare`).
      split: which of its record files.
      text: the text tokenizer's file.
      image_shape: rows and columns of a picture's codes.
      length: tokens of a row; the model's `max_length` or less.
      retrieved: probabilities of 0, 1, 2, ... retrieved documents.
      variants: of how many variants of the pictures one is drawn for each example (see
        `leon_jax.data.variants`); 1: the pictures as they are.
      unchanged: probability that an example takes the pictures as they are all the same.
      balance: 0 takes every document equally often as a query, 1 every group of documents (see
        `Provenance.group`); in between, groups of n count as n ** (1 - balance).
      spare_spans, packing_bins, threads: see `leon_jax.data.pipeline.PipelineConfig`.
    """

    folder: str = "data/emoji_prepared"
    split: str = "train"
    text: str = "runs/emoji/text/export/text.json"
    image_shape: tuple[int, ...] = (12, 12)
    length: int = 512
    retrieved: tuple[float, ...] = (1.0,)
    variants: int = 1
    unchanged: float = 0.0
    balance: float = 0.0
    spare_spans: int = 4
    packing_bins: int = 4
    threads: int = 2


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """Pictures drawn while training.

    Attributes:
      image: the image tokenizer's file; "" draws nothing.
      captions: one picture each.
      guidance: classifier-free guidance weight.
    """

    image: str = ""
    captions: tuple[str, ...] = ()
    guidance: float = 3.0


@dataclasses.dataclass(frozen=True)
class DecoderTraining:
    """Everything a run of `DecoderProgram` depends on.

    Attributes:
      model: shape of the decoder.
      vocabulary: id layout; its size is the model's `vocab_size`.
      optimizer: see `leon_jax.train.optimizer`.
      batch_size: rows of a global batch.
      steps: updates.
      seed: decides initialisation, order, neighbours and masks.
      masking: the CM3 objective.
      loss_chunk: tokens a device turns into logits at a time.
    """

    model: DecoderConfig
    vocabulary: Vocabulary
    optimizer: OptimizerConfig
    batch_size: int
    steps: int
    seed: int = 0
    kind: str = KIND
    data: DecoderData = dataclasses.field(default_factory=DecoderData)
    masking: MaskingConfig = dataclasses.field(default_factory=MaskingConfig)
    samples: SampleConfig = dataclasses.field(default_factory=SampleConfig)
    loss_chunk: int = 2048

    def __post_init__(self):
        if self.model.vocab_size != self.vocabulary.size:
            raise UserError(
                f"model.vocab_size is {self.model.vocab_size}, but the vocabulary has "
                f"{self.vocabulary.size} ids; they must be equal"
            )
        if self.data.length > self.model.max_length:
            raise UserError(
                f"data.length is {self.data.length}; it must be at most model.max_length, "
                f"{self.model.max_length}"
            )
        if len(self.data.image_shape) != 2:
            raise UserError(
                f"data.image_shape is {self.data.image_shape}; it must be rows and columns"
            )
        if self.loss_chunk < 1:
            raise UserError(f"loss_chunk is {self.loss_chunk}; it must be at least 1")


class DecoderProgram:
    """The decoder as the training loop sees it; built from a ConfigDict or a DecoderTraining.

    Raises:
      ConfigError: a wrong key or value.
      UserError: the text tokenizer is missing or does not fit `vocabulary.text_tokens`.
    """

    kind = KIND

    def __init__(self, config: Any):
        if not isinstance(config, DecoderTraining):
            config = configuration.build(DecoderTraining, config)
        self.config: DecoderTraining = config
        self.text = TextTokenizer.load(config.data.text)
        rows, columns = config.data.image_shape
        self.documents = DocumentTokenizer(config.vocabulary, self.text, (rows, columns))
        self.transformation = optimizer.make(config.optimizer)
        self.flops_per_token = float(config.model.flops_per_token(config.data.length))

    def init(self, key: jax.Array) -> TrainState:
        """A new model and the optimizer's state."""
        model_key, run_key = jax.random.split(key)
        return new_state(self.config.model, self.transformation, model_key, run_key)

    def step(
        self, state: TrainState, batch: dict[str, Array]
    ) -> tuple[TrainState, dict[str, Array]]:
        """One update. `batch` is described in `leon_jax.data.pipeline.make`."""
        loss = functools.partial(
            batch_loss, batch=batch, vocabulary=self.config.vocabulary, chunk=self.config.loss_chunk
        )
        (_, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(state.model)
        updates, opt_state = self.transformation.update(gradients, state.opt_state, state.model)
        model = optax.apply_updates(state.model, updates)
        metrics["gradient_norm"] = optax.global_norm(gradients)
        metrics["learning_rate"] = optimizer.learning_rate(self.config.optimizer)(state.step)
        return TrainState(state.step + 1, model, opt_state, state.key), metrics

    def batches(self, shard: int = 0, shards: int = 1) -> grain.IterDataset:
        """Endless packed batches, or one of their equal parts, seeded by `config.seed`."""
        config = self.config
        rows = rows_of_shard(config.batch_size, shards)
        folder = pathlib.Path(config.data.folder)
        retrieves = any(config.data.retrieved[1:])
        data, split = config.data, config.data.split
        source = RecordSource(folder / f"{split}.array_record", pixels=False)
        shown = Variants(folder, split, source) if data.variants > 1 else None
        if shown is not None and shown.count < data.variants:
            raise UserError(
                f"config.data.variants is {data.variants}, but {folder} holds {shown.count}"
            )
        settings = pipeline.PipelineConfig(
            length=config.data.length,
            batch_size=rows,
            seed=config.seed,
            retrieved=config.data.retrieved,
            spare_spans=config.data.spare_spans,
            packing_bins=config.data.packing_bins,
            threads=config.data.threads,
            variants=data.variants,
            unchanged=data.unchanged,
            max_positions=config.model.max_length,
            part_step=config.model.part_step,
            plain_variants=min(variants.plain(shown.count), data.variants) if shown else 1,
        )
        return pipeline.make(
            source,
            self.documents,
            settings,
            config.masking,
            neighbours=neighbours(folder, config.data.split) if retrieves else None,
            weights=balanced(source, data.balance) if data.balance else None,
            variant=shown,
            shard=(shard, shards),
        )

    def samples(self, state: TrainState) -> dict[str, np.ndarray]:
        """One row of pictures, one for each of `config.samples.captions`.

        Nothing without an image tokenizer. Its file is read anew each time, so it takes no memory
        between samples.

        Raises:
          UserError: the image tokenizer's file is missing or does not fit.
        """
        config = self.config.samples
        if not config.image or not config.captions:
            return {}
        vocabulary, (rows, columns) = self.config.vocabulary, self.config.data.image_shape
        guidance = make_guidance(config.guidance)
        free = self.documents.prompt(Document((Hole("text"), Hole("image"))))
        prompts = []
        for seed, caption in enumerate(config.captions):
            bound = self.documents.prompt(Document((Text(caption), Hole("image"))))
            prompts.append(Prompt((bound, free)[: guidance.streams], seed=seed))
        answers = Engine(state.model, vocabulary).fill(prompts, ImageSpan(rows * columns), guidance)
        codes = np.stack([answer.ids - vocabulary.image_start for answer in answers])
        tokenizer = ImageTokenizer.load(config.image)
        if tokenizer.shape != (rows, columns) or tokenizer.codes != vocabulary.image_codes:
            raise UserError(
                f"{config.image} makes {tokenizer.shape} of {tokenizer.codes} codes; the decoder "
                f"is trained on {(rows, columns)} of {vocabulary.image_codes}"
            )
        pictures = to_pixels(tokenizer.decode(codes.reshape(-1, rows, columns)))
        return {"samples": np.concatenate(list(pictures), axis=1)}

    def export(self, state: TrainState, directory: pathlib.Path) -> None:
        """Writes `decoder.safetensors`, and `text.json`, which it cannot be used without."""
        directory, config = pathlib.Path(directory), self.config
        header = {
            "model": configuration.to_dict(config.model),
            "vocabulary": configuration.to_dict(config.vocabulary),
            "image_shape": list(config.data.image_shape),
        }
        model_files.save(directory / "decoder.safetensors", state.model, KIND, header)
        if jax.process_index() == 0:
            self.text.save(directory / "text.json")


def new_state(
    config: DecoderConfig,
    transformation: optax.GradientTransformation,
    model_key: jax.Array,
    run_key: jax.Array,
) -> TrainState:
    """A model with fresh weights and the optimizer's state for it; pure."""
    model = Decoder(config, rngs=nnx.Rngs(model_key))
    return TrainState(jnp.zeros((), jnp.int32), model, transformation.init(model), run_key)


def batch_loss(
    model: Decoder, batch: dict[str, Array], vocabulary: Vocabulary, chunk: int
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Weighted mean cross-entropy in nats a token, and metrics.

    Args:
      model: the decoder.
      batch: see `leon_jax.data.pipeline.make`.
      vocabulary: tells text from picture tokens.
      chunk: see `chunked_cross_entropy`.

    Returns:
      The loss; `loss`, `loss_text`, `loss_image` (means over the targets of that kind, 0 where a
      batch has none) and `tokens` (targets that are no padding).
    """
    batch = {name: jax.reshard(array, spec("batch", "length")) for name, array in batch.items()}
    targets, weights = batch["targets"], batch["weights"]
    hidden = model(batch["ids"], batch["positions"], batch["segment_ids"])
    losses = chunked_cross_entropy(hidden, model.table[...], targets, weights, chunk=chunk)

    def mean(chosen: Array) -> Array:
        total = jnp.where(chosen, weights, 0).sum()
        return jnp.where(chosen, losses, 0).sum() / jnp.maximum(total, 1e-6)

    loss = mean(weights > 0)
    return loss, {
        "loss": loss,
        "loss_text": mean(vocabulary.is_text(targets)),
        "loss_image": mean(vocabulary.is_image(targets)),
        "tokens": (batch["segment_ids"] > 0).sum().astype(jnp.float32),
    }


def balanced(source: Source, exponent: float) -> Float64[np.ndarray, "documents"]:
    """A weight for each document: (documents of its provenance's group) ** -exponent.

    Half of an emoji set are people in five skin tones; without weights a model learns little else.
    """
    groups = []
    for index in range(len(source)):
        provenance = source[index].provenance
        groups.append(provenance.group if provenance and provenance.group else f"alone {index}")
    _, inverse, counts = np.unique(groups, return_inverse=True, return_counts=True)
    return counts[inverse].astype(np.float64) ** -exponent


def neighbours(folder: pathlib.Path, split: str) -> pipeline.Neighbours:
    """Draws the documents to put before a query from the folder's neighbour table.

    Raises:
      UserError: the table is missing or is none.
    """
    table = Neighbours.load(folder / f"neighbours_{split}.safetensors")

    def draw(rng: np.random.Generator, index: int, number: int) -> list[int]:
        return sample_neighbours(rng, table.by_text_ids[index], table.by_image_ids[index], number)

    return draw
