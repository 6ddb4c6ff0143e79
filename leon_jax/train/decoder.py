"""Training of the decoder: next-token prediction over packed rows of CM3-masked documents.

The loss is the plain cross-entropy of every token of every document, retrieved ones included
(arXiv 2309.02591, section 2.2), unless the masking configuration weights tokens differently.
"""

import pathlib
from typing import Any

import grain
import jax
import numpy as np
from jaxtyping import Array

from leon_jax import config as configuration
from leon_jax import weight_files
from leon_jax.config import UserError
from leon_jax.data import pipeline
from leon_jax.documents import Document, Hole, Text
from leon_jax.engine import scheduler
from leon_jax.engine.engine import Engine, Sample, TokenRequest
from leon_jax.engine.grammar import ImageSpan
from leon_jax.engine.guidance import make_guidance
from leon_jax.engine.sampling_params import SamplingParams
from leon_jax.tokenizers.documents import DocumentTokenizer
from leon_jax.tokenizers.image import ImageTokenizer, to_pixels
from leon_jax.tokenizers.text import TextTokenizer
from leon_jax.train import decoder_data, optimizer
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
        params = SamplingParams(make_guidance(config.guidance))
        free = self.documents.prompt(Document((Hole("text"), Hole("image"))))
        prompts = []
        for seed, caption in enumerate(config.captions):
            bound = self.documents.prompt(Document((Text(caption), Hole("image"))))
            grammar = (ImageSpan(rows * columns),)
            prompts.append(TokenRequest((bound, free), grammar, (Sample(seed, params),)))
        outputs = scheduler.generate(Engine(state.model, vocabulary), prompts)
        codes = np.stack([spans[0].ids - vocabulary.image_start for (spans,) in outputs])
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
        weight_files.save(directory / "decoder.safetensors", state.model, KIND, header)
        if jax.process_index() == 0:
            self.text.save(directory / "text.json")
