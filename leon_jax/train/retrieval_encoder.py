"""Trains the retrieval encoder: a small CLIP on captioned images.

The loss is CLIP's symmetric InfoNCE (arXiv 2103.00020, figure 3) with one change: all pairs of a
batch that show the same concept are positives of each other, as in supervised contrastive learning
(arXiv 2004.11362). Two designs of one concept should not be negatives.
"""

import dataclasses
import pathlib
import zlib
from collections.abc import Sequence

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from leon_jax import config as configuration
from leon_jax import weight_files
from leon_jax.config import UserError
from leon_jax.data.augment import AugmentConfig, augment
from leon_jax.datasets import demo
from leon_jax.documents import Document, Image, Source, Text
from leon_jax.models.clip import CLIP, CLIPConfig, create
from leon_jax.retrieval.encoder import KIND, SPECIALS, frame
from leon_jax.sharding import spec
from leon_jax.tokenizers.text import TextTokenizer
from leon_jax.train import optimizer
from leon_jax.train.optimizer import OptimizerConfig
from leon_jax.train.state import TrainState, rows_of_shard

# Images whose names contain one of these words show text or a direction. They are not mirrored.
DIRECTED = ("left", "right", "button", "clock", "o'clock", "flag", "east", "west", "input")

# Images of each concept in a batch. Two designs as positives make the encoder ignore the style.
VIEWS = 2


@dataclasses.dataclass(frozen=True)
class EncoderData:
    """The training data and the augmentation of captions.

    Attributes:
      dir: a dataset folder written by `leon prepare`.
      text: the text tokenizer's file.
      split: the split to train on.
      name_style: probability that a caption names a style. The style is random, so that the
        encoder learns to ignore it: retrieval should match concepts, not styles.
      drop_words: probability of dropping each word of the name; one word always remains.
    """

    dir: str = "data/emoji"
    text: str = "runs/emoji/text/export/text.json"
    split: str = "train"
    name_style: float = 0.5
    drop_words: float = 0.1


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Configuration of `EncoderProgram`; see `leon_jax.train.decoder_config` for shared keys."""

    model: CLIPConfig
    optimizer: OptimizerConfig
    batch_size: int
    steps: int
    seed: int = 0
    kind: str = KIND
    data: EncoderData = EncoderData()
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)

    def __post_init__(self):
        if self.batch_size < 2 * VIEWS or self.batch_size % VIEWS:
            raise ValueError(
                f"batch_size is {self.batch_size}; it must be a multiple of {VIEWS}, and at least "
                f"{2 * VIEWS}"
            )


class EncoderProgram:
    """The training program of the retrieval encoder; see `leon_jax.train.state.Program`.

    Raises:
      UserError: the text tokenizer is missing or does not fit `model.text.vocab_size`.
    """

    kind = KIND
    flops_per_token = 0.0

    def __init__(self, config: EncoderConfig) -> None:
        self.config = config
        self.text = TextTokenizer.load(config.data.text)
        vocab_size = self.text.size + SPECIALS
        if config.model.text.vocab_size != vocab_size:
            raise UserError(
                f"config.model.text.vocab_size is {config.model.text.vocab_size}; the tokenizer "
                f"{config.data.text} has {self.text.size} entries, so it must be {vocab_size}"
            )
        self.optimizer = optimizer.make(config.optimizer)

    def init(self, key: jax.Array) -> TrainState:
        """Returns a randomly initialised model with its optimizer state."""
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
        (loss, accuracy), gradients = jax.value_and_grad(contrastive_loss, has_aux=True)(
            state.model, batch["image"], batch["text"], batch["concept"]
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
        """Returns endless shuffled batches of random views, or one shard of them."""
        config = self.config
        concepts = Concepts(demo.source(config.data.split, config.data.dir))
        pairs = rows_of_shard(config.batch_size // VIEWS, shards)
        if config.batch_size % VIEWS or config.batch_size // VIEWS > len(concepts):
            raise UserError(
                f"config.batch_size is {config.batch_size}; it must be a multiple of {VIEWS}, and "
                f"at most {VIEWS} for each of the {len(concepts)} concepts of {config.data.dir}"
            )
        return (
            grain.MapDataset.source(concepts)
            .seed(config.seed)
            .shuffle()
            .slice(slice(shard, None, shards))
            .repeat()
            .random_map(Views(config, self.text, concepts.styles))
            .batch(pairs, drop_remainder=True)
            .map(_flatten)
            .to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4))
        )

    def samples(self, state: TrainState) -> dict[str, np.ndarray]:
        """Returns no images, since an encoder generates none."""
        del state
        return {}

    def export(self, state: TrainState, directory: pathlib.Path) -> None:
        """Writes `encoder.safetensors` and its text tokenizer `text.json`."""
        directory = pathlib.Path(directory)
        config = configuration.to_dict(self.config.model)
        weight_files.save(directory / "encoder.safetensors", state.model, KIND, config)
        if jax.process_index() == 0:
            self.text.save(directory / "text.json")


def contrastive_loss(
    model: CLIP,
    images: Array,
    texts: Int[Array, "b t"],
    concepts: Int[Array, "b"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns the symmetric InfoNCE loss over the global batch; equal concepts are positives.

    Args:
      model: the encoder.
      images: uint8[b, h, w, 3].
      texts: framed token ids.
      concepts: concept of each pair; equal numbers are the same concept.

    Returns:
      The loss in nats, the mean of both directions, and the share of images whose most similar text
      has the same concept.
    """
    replicated, rows = spec(None, None), spec("batch", None)
    image = model.embed_image(images.astype(jnp.float32) / 255)
    text = model.embed_text(texts)
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


def _flatten(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Reshapes [concepts, views, ...] to [images, ...]."""
    return {name: array.reshape(-1, *array.shape[2:]) for name, array in batch.items()}


class Concepts(Sequence[list[tuple[np.ndarray, str, int]]]):
    """Documents as (pixels, caption, concept), decoded once and grouped by concept.

    Args:
      documents: each must have a caption and an image with pixels.

    Raises:
      UserError: a document has no caption or no pixels.
    """

    def __init__(self, documents: Source):
        groups: dict[int, list[tuple[np.ndarray, str, int]]] = {}
        for index in range(len(documents)):
            example = training_example(documents[index])
            groups.setdefault(example[-1], []).append(example)
        self.groups = list(groups.values())
        captions = (caption for group in self.groups for _, caption, _ in group)
        self.styles = sorted(
            {caption.rpartition(", ")[2] for caption in captions if "," in caption}
        )

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index):
        return self.groups[index]

    def __repr__(self) -> str:
        return f"Concepts(count={len(self.groups)})"


def training_example(document: Document) -> tuple[np.ndarray, str, int]:
    """Returns a document's pixels, caption and concept number.

    The concept is the part of the provenance key after the first `/`, or the caption if there is
    no key. Its number is the CRC-32 of that string, as int32. (A set of 4,000 concepts has a
    collision with a probability of 1 in 500.)

    Raises:
      UserError: the document has no caption or no pixels.
    """
    caption = next((part.text for part in document.parts if isinstance(part, Text)), None)
    pixels = next(
        (p.pixels for p in document.parts if isinstance(p, Image) and p.pixels is not None), None
    )
    if caption is None or pixels is None:
        raise UserError("the encoder trains on documents with a caption and an image with pixels")
    key = document.provenance.key if document.provenance else caption
    concept = zlib.crc32(key.partition("/")[2].encode() or caption.encode())
    return pixels, caption, int(np.uint32(concept).view(np.int32))


class Views(grain.transforms.RandomMap):
    """Maps a concept to two random views, of two of its designs or twice of its only one."""

    def __init__(self, config: EncoderConfig, text: TextTokenizer, styles: Sequence[str]):
        self.config, self.text, self.styles = config, text, styles

    def random_map(
        self, group: list[tuple[np.ndarray, str, int]], rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        order = rng.permutation(len(group))
        views = [self._view(group[order[i % len(group)]], rng) for i in range(VIEWS)]
        return {name: np.stack([view[name] for view in views]) for name in views[0]}

    def _view(
        self, example: tuple[np.ndarray, str, int], rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        pixels, caption, concept = example
        model = self.config.model
        name = caption.lower()
        mirror = not any(word in name for word in DIRECTED)
        view = augment(pixels, model.vision.image_size, self.config.augment, rng, mirror)
        words = augment_caption(caption, self.config.data, rng, self.styles)
        return {
            "image": np.round(view * 255).astype(np.uint8),
            "text": frame(self.text.encode(words), model.text),
            "concept": np.array(concept, np.int32),
        }


def augment_caption(
    caption: str, data: EncoderData, rng: np.random.Generator, styles: Sequence[str] = ()
) -> str:
    """Drops words of the caption's name at random, and drops or replaces its style.

    Args:
      caption: `NAME, STYLE` or `NAME`.
      data: the probabilities.
      rng: random generator.
      styles: styles to choose from; () keeps the caption's own.
    """
    name, comma, style = caption.rpartition(", ")
    if not comma:
        name, style = caption, ""
    words = name.split()
    remaining = [word for word in words if rng.random() >= data.drop_words] or words
    has_style = rng.random() < data.name_style
    if styles:
        style = styles[int(rng.integers(len(styles)))]
    return " ".join(remaining) + (f", {style}" if has_style and style else "")
