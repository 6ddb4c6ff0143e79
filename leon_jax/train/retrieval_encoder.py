"""Trains the retrieval encoder: a CLIP on captioned images.

The loss is CLIP's symmetric InfoNCE (arXiv 2103.00020, figure 3) with one change: all pairs of a
batch that show the same concept are positives of each other, as in supervised contrastive learning
(arXiv 2004.11362). The documents of a group show one concept, and so do equal images. They should
not be negatives.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import ClassVar

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from leon_jax import config as configuration
from leon_jax import weight_files
from leon_jax.config import UserError
from leon_jax.data.augment import AugmentConfig
from leon_jax.data.config import CaptionedImageDataConfig
from leon_jax.models.clip import CLIP, CLIPConfig, create
from leon_jax.ops.products import Products, operand_dtype
from leon_jax.retrieval.encoder import KIND, SPECIALS
from leon_jax.sharding import spec
from leon_jax.tokenizers.text import TextTokenizer
from leon_jax.train import document_data, encoder_data, optimizer
from leon_jax.train.evaluation import Evaluation
from leon_jax.train.optimizer import OptimizerConfig
from leon_jax.train.state import TrainState, check_multiples, rows_of_shard


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Configuration of `EncoderProgram`; see `leon_jax.train.decoder_config` for shared keys.

    Attributes:
      model: the network; `model.text.vocab_size` 0 is the size that fits the text tokenizer.
      data: the documents folders, and the text tokenizer.
      batch_size: pairs of a batch, a multiple of `views`.
      views: 1: a batch has each document at most once, as in CLIP. Above 1: a batch has this many
        documents of each of its groups (see `leon_jax.documents.Provenance`). A smaller group has
        several views of the same documents. So the encoder learns to ignore what differs within a
        group.
      augment: random changes of the images.
      products: dtype of the operands of the products in training: "dtype" (float32), "bfloat16"
        with float32 sums, or "auto" (see `leon_jax.ops.products.operand_dtype`).

    Raises:
      ValueError: `views` is below 1, or `batch_size` does not fit it.
    """

    model: CLIPConfig
    optimizer: OptimizerConfig
    data: CaptionedImageDataConfig
    batch_size: int
    steps: int
    seed: int = 0
    kind: str = KIND
    views: int = 1
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
    products: Products = "dtype"

    OMITTED_DEFAULTS: ClassVar[tuple[str, ...]] = ("products",)

    def __post_init__(self):
        if self.views < 1:
            raise ValueError(f"views is {self.views}; it must be at least 1")
        if self.batch_size < 2 * self.views or self.batch_size % self.views:
            raise ValueError(
                f"batch_size is {self.batch_size}; it must be a multiple of views, {self.views}, "
                f"and at least {2 * self.views}"
            )


class EncoderProgram:
    """The training program of the retrieval encoder; see `leon_jax.train.state.Program`.

    If `model.text.vocab_size` is set, the constructor reads no file, so that `leon plan` can
    compile the program without a text tokenizer.

    Raises:
      UserError: `model.text.vocab_size` is 0 and the text tokenizer is missing or damaged.
    """

    kind = KIND
    flops_per_token = 0.0

    def __init__(self, config: EncoderConfig) -> None:
        self.config = config
        if not config.model.text.vocab_size:
            text = dataclasses.replace(config.model.text, vocab_size=self.text.size + SPECIALS)
            model = dataclasses.replace(config.model, text=text)
            self.config = dataclasses.replace(config, model=model)
        self.optimizer = optimizer.make(config.optimizer)

    @functools.cached_property
    def text(self) -> TextTokenizer:
        """The text tokenizer `config.data.text`.

        Raises:
          UserError: it is missing, damaged or does not fit `model.text.vocab_size`.
        """
        path, vocab_size = self.config.data.text, self.config.model.text.vocab_size
        text = TextTokenizer.load(path)
        if vocab_size not in (0, text.size + SPECIALS):
            raise UserError(
                f"config.model.text.vocab_size is {vocab_size}; the tokenizer {path} has "
                f"{text.size} entries, so it must be {text.size + SPECIALS}, or 0 for the size "
                "that fits"
            )
        return text

    def check_mesh(self, mesh: Sequence[int]) -> None:
        """Checks that a mesh splits the batch and both towers evenly."""
        (data, fsdp, _, tensor), model = mesh, self.config.model
        sizes = [("config.batch_size", self.config.batch_size, data * fsdp, "data x fsdp")]
        for name, tower in (("vision", model.vision), ("text", model.text)):
            key = f"config.model.{name}"
            sizes.append((f"{key}.width", tower.width, fsdp, "fsdp"))
            sizes.append((f"{key}.heads", tower.heads, tensor, "tensor"))
        check_multiples(sizes)

    def init(self, key: jax.Array) -> TrainState:
        """Returns a randomly initialised model with its optimizer state.

        Raises:
          UserError: the current mesh cannot split the batch or the model evenly.
        """
        self.check_mesh(tuple(jax.sharding.get_abstract_mesh().shape.values()))
        model_key, run_key = jax.random.split(key)
        model = create(self.config.model, model_key)
        return TrainState(jnp.zeros((), jnp.int32), model, self.optimizer.init(model), run_key)

    def step(
        self, state: TrainState, batch: dict[str, Array]
    ) -> tuple[TrainState, dict[str, Array]]:
        """Updates the model once and returns the next state and metrics.

        Args:
          state: the current state.
          batch: `image` uint8[b, h, w, 3], `text` int32[b, t] and `concept` int32[b].
        """
        operands = operand_dtype(self.config.products, jnp.float32)
        (loss, accuracy), gradients = jax.value_and_grad(contrastive_loss, has_aux=True)(
            state.model, batch["image"], batch["text"], batch["concept"], operands
        )
        updates, opt_state = self.optimizer.update(gradients, state.opt_state, state.model)
        model = optax.apply_updates(state.model, updates)
        metrics = {
            "loss": loss,
            "accuracy": accuracy,
            "scale": model.scale(),
            "gradient_norm": optax.tree.norm(gradients),
            "learning_rate": optimizer.learning_rate(self.config.optimizer)(state.step),
        }
        return TrainState(state.step + 1, model, opt_state, state.key), metrics

    def batches(self, shard: int = 0, shards: int = 1) -> grain.IterDataset:
        """Returns endless shuffled batches of random views, or one shard of them.

        A batch has `image` uint8[rows, size, size, 3], `text` int32[rows, t] and `concept`
        int32[rows]. The views of a group are adjacent.

        Raises:
          UserError: a folder is missing or damaged, or has too few documents for a batch.
        """
        config = self.config
        rows = rows_of_shard(config.batch_size // config.views, shards)
        components = document_data.open_components(config.data)
        views = encoder_data.make_views(
            components, config.views, config.augment, config.model, self.text
        )
        lengths = [len(transform) for transform in views]
        name = "documents" if config.views == 1 else "groups of documents"
        document_data.check_batch_size(config.batch_size, config.views, sum(lengths), name)
        return document_data.batches(
            components,
            lengths,
            views,
            rows=rows,
            seed=config.seed,
            shard=(shard, shards),
            threads=config.data.threads,
        ).map(_flatten)

    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes and dtypes of a batch of images with captions."""
        rows, model = self.config.batch_size, self.config.model
        side = model.vision.image_size
        return {
            "image": jax.ShapeDtypeStruct((rows, side, side, 3), jnp.uint8),
            "text": jax.ShapeDtypeStruct((rows, model.text.context_length), jnp.int32),
            "concept": jax.ShapeDtypeStruct((rows,), jnp.int32),
        }

    def evaluation(self) -> Evaluation | None:
        """Prepares the evaluation: each image searches all captions, and each caption all images.

        The metrics are `loss`, the contrastive loss over all documents, and the recalls at 1
        `image_to_text` and `text_to_image`, the shares of images and captions whose best match
        shows the same concept. The lowest `loss` is that of the best model.

        Returns:
          The evaluation; None: no folder has held-out documents.

        Raises:
          UserError: see `evaluation.choose_held_out`; or a document has no image or no text.
        """
        documents, description = document_data.held_out_documents(self.config.data)
        if not documents:
            return None
        rows = encoder_data.plain_pairs(documents, self.config.model, self.text)
        metrics = functools.partial(_retrieval_metrics, concepts=rows["concept"])
        rows = {name: rows[name] for name in ("image", "text")}
        return Evaluation(description, rows, self.config.batch_size, self.evaluate, metrics, "loss")

    def evaluate(self, model: CLIP, batch: dict[str, Array]) -> dict[str, Array]:
        """Returns the embeddings of images, times the scale of the logits, and of texts."""
        images = model.embed_image(batch["image"].astype(jnp.float32) / 255)
        return {"image": model.scale() * images, "text": model.embed_text(batch["text"])}

    def samples(self, state: TrainState) -> dict[str, np.ndarray]:
        """Returns no images, since an encoder generates none."""
        del state
        return {}

    def export(self, state: TrainState, directory: pathlib.Path) -> None:
        """Writes `encoder.safetensors` and its text tokenizer `text.json`."""
        config = configuration.to_dict(self.config.model)
        weight_files.save(directory / "encoder.safetensors", state.model, KIND, config)
        if jax.process_index() == 0:
            self.text.save(directory / "text.json")


def contrastive_loss(
    model: CLIP,
    images: Array,
    texts: Int[Array, "b t"],
    concepts: Int[Array, "b"],
    operands: DTypeLike | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns the symmetric InfoNCE loss over the global batch; equal concepts are positives.

    Args:
      model: the encoder.
      images: uint8[b, h, w, 3].
      texts: framed token ids.
      concepts: concept of each pair; equal numbers are the same concept.
      operands: dtype of the operands of the blocks' products; None: float32.

    Returns:
      The loss in nats, the mean of both directions, and the share of images whose most similar text
      has the same concept.
    """
    replicated, rows = spec(None, None), spec("batch", None)
    image = model.embed_image(images.astype(jnp.float32) / 255, operands)
    text = model.embed_text(texts, operands)
    same = (concepts[:, None] == jax.reshard(concepts, spec(None))[None, :]).astype(jnp.float32)
    target = same / same.sum(1, keepdims=True)  # `same` is symmetric, so is the row count

    def one_way(query: Array, key: Array) -> tuple[Array, Array]:
        key = jax.reshard(key, replicated)
        logits = model.scale() * jnp.einsum("ie,je->ij", query, key, out_sharding=rows)
        best = jnp.argmax(logits, axis=1)[:, None] == jnp.arange(logits.shape[1])[None, :]
        loss = -(target * jax.nn.log_softmax(logits, axis=1)).sum(1).mean()
        return loss, (best * same).sum(1).mean()

    to_text, accuracy = one_way(image, text)
    to_image, _ = one_way(text, image)
    return (to_text + to_image) / 2, accuracy


def _retrieval_metrics(
    embeddings: Mapping[str, np.ndarray], concepts: Int[np.ndarray, "n"]
) -> dict[str, float]:
    """Returns `contrastive_loss` of all pairs in float64, and the recalls at 1."""
    logits = embeddings["image"].astype(np.float64) @ embeddings["text"].astype(np.float64).T
    same = concepts[:, None] == concepts[None, :]
    losses, recalls = [], []
    for scores in (logits, logits.T):
        scores = scores - scores.max(1, keepdims=True)
        log_shares = scores - np.log(np.exp(scores).sum(1, keepdims=True))
        losses.append(-(same * log_shares).sum(1) / same.sum(1))
        recalls.append(same[np.arange(len(scores)), scores.argmax(1)].mean())
    return {
        "loss": float(np.mean(losses)),
        "image_to_text": float(recalls[0]),
        "text_to_image": float(recalls[1]),
    }


def _flatten(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Reshapes [groups, views, ...] to [images, ...]."""
    return {name: array.reshape(-1, *array.shape[2:]) for name, array in batch.items()}
