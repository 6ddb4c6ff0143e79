"""What a training run of the decoder depends on."""

import dataclasses
from typing import Literal

from leon_jax.config import UserError
from leon_jax.data.masking import MaskingConfig
from leon_jax.models.decoder import DecoderConfig
from leon_jax.train.optimizer import OptimizerConfig
from leon_jax.train.state import rows_of_shard
from leon_jax.vocabulary import Vocabulary

KIND = "decoder"


@dataclasses.dataclass(frozen=True)
class MixturePart:
    """One of the prepared folders of a mixture.

    Attributes:
      folder, split: as in `DecoderData`.
      weight: how many examples come from here, relative to the other parts.
      retrieved, variants, unchanged, balance: as in `DecoderData`, whose values count where they
        are left out.
    """

    folder: str
    split: str = "train"
    weight: float = 1.0
    retrieved: tuple[float, ...] | None = None
    variants: int | None = None
    unchanged: float | None = None
    balance: float | None = None


@dataclasses.dataclass(frozen=True)
class DecoderData:
    """What the decoder is trained on: one prepared folder (`leon prepare`), or a mixture.

    Attributes:
      folder: a prepared folder; "" for a mixture.
      split: which of its record files.
      mixture: several folders instead; examples are drawn in proportion to their weights.
      text: the text tokenizer's file.
      image_shape: rows and columns of a picture's codes.
      length: tokens of a row; the model's `max_length` or less.
      retrieved: probabilities of 0, 1, 2, ... retrieved documents.
      per_modality: how many of a document's neighbours retrieved ones are drawn from, of those
        found through its text and of those found through its picture; the best of each.
      variants: of how many variants of the pictures one is drawn for each example (see
        `leon_jax.data.variants`); 1: the pictures as they are.
      unchanged: probability that an example takes the pictures as they are all the same.
      balance: 0 takes every document equally often as a query, 1 every group of documents (see
        `Provenance.group`); in between, groups of n count as n ** (1 - balance).
      packing, packing_bins, spare_spans, threads: see `leon_jax.data.pipeline.PipelineConfig`.
    """

    folder: str = ""
    split: str = "train"
    mixture: tuple[MixturePart, ...] = ()
    text: str = "runs/emoji/text/export/text.json"
    image_shape: tuple[int, ...] = (12, 12)
    length: int = 512
    retrieved: tuple[float, ...] = (1.0,)
    per_modality: int = 2
    variants: int = 1
    unchanged: float = 0.0
    balance: float = 0.0
    packing: Literal["whole", "stream"] = "whole"
    packing_bins: int = 4
    spare_spans: int = 4
    threads: int = 2

    def __post_init__(self) -> None:
        if self.folder and self.mixture:
            raise UserError(
                f"folder is {self.folder!r}, but there is a mixture too; leave one of them empty"
            )
        if self.per_modality < 1:
            raise UserError(f"per_modality is {self.per_modality}; it must be at least 1")


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
    """Everything a run of `leon_jax.train.decoder.DecoderProgram` depends on.

    Attributes:
      model: shape of the decoder.
      vocabulary: id layout; its size is the model's `vocab_size`.
      optimizer: see `leon_jax.train.optimizer`.
      batch_size: rows of a global batch.
      steps: updates.
      seed: decides initialisation, order, neighbours and masks.
      masking: the CM3 objective.
      loss_chunk: tokens a device turns into logits at a time.
      microbatches: into how many parts a batch is cut whose gradients are added up, one part in
        memory at a time; the update is the same.
      z_loss: weight of log(sum(exp(logits)))^2, which keeps logits from drifting (PaLM, section
        5: 1e-4); 0 is CM3Leon's.
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
    microbatches: int = 1
    z_loss: float = 0.0

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
        for name in ("loss_chunk", "microbatches"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        rows_of_shard(self.batch_size, self.microbatches, "microbatches")
