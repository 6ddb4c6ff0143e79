"""Training of the decoder: next-token prediction over packed rows of CM3-masked documents.

The loss is the plain cross-entropy of every token of every document, retrieved ones included
(arXiv 2309.02591, section 2.2), unless the masking configuration weights tokens differently.
"""

import pathlib
from typing import Any

import grain
import jax
import numpy as np
from jaxtyping import Array, Float64

from leon_jax import config as configuration
from leon_jax import model_files
from leon_jax.config import UserError
from leon_jax.data import pipeline, variants
from leon_jax.data.records import RecordSource
from leon_jax.data.variants import Variants
from leon_jax.decode.engine import Engine, Prompt
from leon_jax.decode.grammar import ImageSpan
from leon_jax.decode.guidance import make_guidance
from leon_jax.documents import Document, Hole, Source, Text
from leon_jax.retrieval.selection import Neighbours, sample_neighbours
from leon_jax.tokenizers.documents import DocumentTokenizer
from leon_jax.tokenizers.image import ImageTokenizer, to_pixels
from leon_jax.tokenizers.text import TextTokenizer
from leon_jax.train import optimizer
from leon_jax.train.decoder_config import KIND, DecoderTraining
from leon_jax.train.decoder_step import new_state, uneven, update
from leon_jax.train.state import TrainState, rows_of_shard


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
        """A new model and the optimizer's state.

        Raises:
          UserError: the mesh that is set cannot split the batch or the model evenly.
        """
        mesh = tuple(jax.sharding.get_abstract_mesh().shape.values())
        if problem := uneven(self.config, mesh, self.config.microbatches):
            raise UserError(problem)
        model_key, run_key = jax.random.split(key)
        return new_state(self.config.model, self.transformation, model_key, run_key)

    def step(
        self, state: TrainState, batch: dict[str, Array]
    ) -> tuple[TrainState, dict[str, Array]]:
        """One update. `batch` is described in `leon_jax.data.pipeline.make`."""
        return update(self.config, self.transformation, state, batch)

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
