"""Configuration of a decoder's training run."""

import dataclasses
import math
from typing import ClassVar, Literal

from leon_jax.config import UserError
from leon_jax.data.config import DataConfig
from leon_jax.data.masking import MaskingConfig
from leon_jax.models.decoder_config import DecoderConfig
from leon_jax.train.optimizer import OptimizerConfig
from leon_jax.train.state import rows_of_shard
from leon_jax.vocabulary import Vocabulary

KIND = "decoder"


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """Settings of the images that are generated during training.

    Attributes:
      image: the image tokenizer's file; "" generates no images.
      captions: prompts, one for each image.
      guidance: classifier-free guidance weight.
    """

    image: str = ""
    captions: tuple[str, ...] = ()
    guidance: float = 3.0


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """The other files of the model folder that a run writes at its end (docs/model_folder.md).

    Attributes:
      tokenizer: the image tokenizer's file; "": `samples.image`, or the file that made the data.
      encoder: the retrieval encoder, a file or a folder; "": the one that made the data, if it is
        beside the tokenizers or in a run beside theirs.
      selection: a file with the encoder's selection rules; "": `selection.json` beside the encoder,
        or the rules of the data.
      index: the prepared folder that the model retrieves from; "": the data.
    """

    tokenizer: str = ""
    encoder: str = ""
    selection: str = ""
    index: str = ""


@dataclasses.dataclass(frozen=True)
class DecoderTraining:
    """Configuration of `leon_jax.train.decoder.DecoderProgram`.

    Attributes:
      model: shape of the decoder.
      vocabulary: layout of the ids; its size must equal the model's `vocab_size`.
      optimizer: see `leon_jax.train.optimizer`.
      batch_size: rows in a global batch.
      steps: number of updates.
      seed: seed of initialisation, order, neighbours and masks.
      kind: always "decoder".
      data: the training data.
      masking: the CM3 objective.
      samples: the images generated during training.
      export: the other files of the model folder that the run ends in.
      loss_chunk: tokens per device whose logits are in memory at a time.
      microbatches: number of parts of a batch, whose gradients are accumulated one after the
        other to save memory; the update is the same.
      z_loss: weight of log(sum(exp(logits)))^2, which keeps logits from drifting (PaLM, section
        5: 1e-4); CM3Leon uses 0.
      head_exchange: dtype in which devices exchange the output head and its gradient. "bfloat16"
        halves these bytes and rounds the gradient of each device before the sum.
      codebook: an image tokenizer's file; the embeddings of image ids start as a random projection
        of its codes' vectors. "": all embeddings are random.
    """

    OMITTED_DEFAULTS: ClassVar[tuple[str, ...]] = ("head_exchange", "codebook")

    model: DecoderConfig
    vocabulary: Vocabulary
    optimizer: OptimizerConfig
    batch_size: int
    steps: int
    seed: int = 0
    kind: str = KIND
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    masking: MaskingConfig = dataclasses.field(default_factory=MaskingConfig)
    samples: SampleConfig = dataclasses.field(default_factory=SampleConfig)
    export: ExportConfig = dataclasses.field(default_factory=ExportConfig)
    loss_chunk: int = 2048
    microbatches: int = 1
    z_loss: float = 0.0
    head_exchange: Literal["float32", "bfloat16"] = "float32"
    codebook: str = ""

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
        form, columns = self.model.form, self.data.image_shape[1]
        if form.positions == "rotary_2d" and form.image_columns != columns:
            raise UserError(
                f"model.form.image_columns is {form.image_columns}; it must be the columns of "
                f"data.image_shape, {columns}"
            )
        if form.positions == "rotary_2d" and self.data.packing == "stream":
            raise UserError(
                'data.packing is "stream", which cuts images, but model.form.positions="rotary_2d" '
                'needs whole images; set data.packing to "whole"'
            )
        for name in ("loss_chunk", "microbatches"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        rows_of_shard(self.batch_size, self.microbatches, "microbatches")


def retrieval_notice(config: DecoderTraining) -> str | None:
    """Returns one sentence if rows are too short for all retrieved documents, else None.

    With `data.packing` "whole", retrieved documents that do not fit a row are left out.

    Args:
      config: the configuration.
    """
    data = config.data
    image_tokens = math.prod(data.image_shape)
    # A document has at least one text token, two <break> and the image.
    document = image_tokens + 3
    retrieved = [component.retrieved or (1.0,) for component in data.components]
    max_retrieved = max(
        (count for shares in retrieved for count, share in enumerate(shares) if share), default=0
    )
    fitting = max(0, data.length // document - 1)
    if data.packing != "whole" or fitting >= max_retrieved:
        return None
    return (
        f"a row of {data.length} tokens holds {fitting or 'no'} retrieved "
        f"image{'s' * (fitting > 1)} of {image_tokens} tokens, but config.data.retrieved asks for "
        f"up to {max_retrieved}; set config.data.length >= {(max_retrieved + 1) * document}, or "
        f"shorten config.data.retrieved to {fitting + 1} probabilities"
    )
