"""Training of the retrieval encoder: a small CLIP on captioned pictures.

The loss is CLIP's symmetric InfoNCE (arXiv 2103.00020, figure 3) with one change: all pairs of a
batch that show the same concept are positives of each other (the targets of supervised contrastive
learning, arXiv 2004.11362), because two designs of one thing are no negatives.
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

# Pictures whose names hold one of these words are not mirrored: they show writing or a direction.
DIRECTED = ("left", "right", "button", "clock", "o'clock", "flag", "east", "west", "input")

# Pictures of each concept in a batch. Two designs side by side teach that the style says nothing.
VIEWS = 2


@dataclasses.dataclass(frozen=True)
class EncoderData:
    """What the encoder is trained on.

    Attributes:
      dir: the dataset folder made by `leon prepare`.
      text: the text tokenizer's file.
      split: which split of it.
      name_style: how often a caption names a style: any one, drawn at random, not its own. A
        retriever is to find what is shown in whatever style, so the style must say nothing.
      drop_words: how often each word of the name is dropped (never all of them).
    """

    dir: str = "data/emoji"
    text: str = "runs/emoji/text/export/text.json"
    split: str = "train"
    name_style: float = 0.5
    drop_words: float = 0.1


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Everything a run of `EncoderProgram` depends on."""

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
                f"batch_size is {self.batch_size}; it must be a multiple of {VIEWS}, and a "
                f"contrast needs {2 * VIEWS}"
            )


class EncoderProgram:
    """See `leon_jax.train.state.Program`.

    Raises:
      UserError: the text tokenizer is missing or does not fit `model.text.vocab_size`.
    """

    kind = KIND
    flops_per_token = 0.0

    def __init__(self, config: EncoderConfig) -> None:
        self.config = config
        self.text = TextTokenizer.load(config.data.text)
        needed = self.text.size + SPECIALS
        if config.model.text.vocab_size != needed:
            raise UserError(
                f"config.model.text.vocab_size is {config.model.text.vocab_size}; the tokenizer "
                f"{config.data.text} has {self.text.size} entries, so it must be {needed}"
            )
        self.optimizer = optimizer.make(config.optimizer)

    def init(self, key: jax.Array) -> TrainState:
        """A new model and the optimizer's state."""
        model_key, run_key = jax.random.split(key)
        model = create(self.config.model, model_key)
        return TrainState(jnp.zeros((), jnp.int32), model, self.optimizer.init(model), run_key)

    def step(
        self, state: TrainState, batch: dict[str, Array]
    ) -> tuple[TrainState, dict[str, Array]]:
        """One update.

        `batch` holds `image` uint8[b, h, w, 3], `text` int32[b, t] and `concept` int32[b].
        """
        (loss, accuracy), gradients = jax.value_and_grad(contrast, has_aux=True)(
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
        """Endless shuffled batches of random views, or a part, seeded by `config.seed`."""
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
        """None: an encoder draws no pictures."""
        del state
        return {}

    def export(self, state: TrainState, directory: pathlib.Path) -> None:
        """Writes `encoder.safetensors`, and `text.json`, which it cannot be used without."""
        directory = pathlib.Path(directory)
        config = configuration.to_dict(self.config.model)
        weight_files.save(directory / "encoder.safetensors", state.model, KIND, config)
        if jax.process_index() == 0:
            self.text.save(directory / "text.json")


def contrast(
    model: CLIP,
    images: Array,
    texts: Int[Array, "b t"],
    concepts: Int[Array, "b"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Symmetric InfoNCE over the global batch, with several positives where a concept repeats.

    Args:
      images: uint8[b, h, w, 3].
      texts: framed token ids.
      concepts: equal numbers mark documents that show the same thing.

    Returns:
      The loss in nats, the mean of both directions, and how often a picture's best text is right.
    """
    everywhere, rows = spec(None, None), spec("batch", None)
    image = model.embed_image(images.astype(jnp.float32) / 255)
    text = model.embed_text(texts)
    same = (concepts[:, None] == jax.reshard(concepts, spec(None))[None, :]).astype(jnp.float32)
    target = same / same.sum(1, keepdims=True)  # `same` is symmetric, so is the row count

    def one_way(query: Array, key: Array) -> tuple[Array, Array]:
        key = jax.reshard(key, everywhere)
        logits = model.scale() * jnp.einsum("ie,je->ij", query, key, out_sharding=rows)
        best = jnp.argmax(logits, axis=1)[:, None] == jnp.arange(logits.shape[1])[None, :]
        loss = -(target * jax.nn.log_softmax(logits, axis=1)).sum(1).mean()
        return loss, (best * same).sum(1).mean()

    to_text, accuracy = one_way(image, text)
    to_image, _ = one_way(text, image)
    return (to_text + to_image) / 2, accuracy


def _flatten(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """[concepts, views, ...] to [pictures, ...]."""
    return {name: array.reshape(-1, *array.shape[2:]) for name, array in batch.items()}


class Concepts(Sequence[list[tuple[np.ndarray, str, int]]]):
    """All documents decoded once, (pixels, caption, concept), and grouped by concept.

    A document must hold a caption and a picture with pixels.
    """

    def __init__(self, documents: Source):
        groups: dict[int, list[tuple[np.ndarray, str, int]]] = {}
        for index in range(len(documents)):
            described = describe(documents[index])
            groups.setdefault(described[-1], []).append(described)
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
        return f"Concepts({len(self.groups)} of them)"


def describe(document: Document) -> tuple[np.ndarray, str, int]:
    """The pixels, the caption, and a number that documents of the same concept share.

    The concept is what follows the first `/` of the provenance key, or the caption where there is
    no key; its CRC-32 stands for it (two of 4,000 concepts collide once in 500 such sets).

    Raises:
      UserError: there is no caption or no picture with pixels.
    """
    caption = next((part.text for part in document.parts if isinstance(part, Text)), None)
    picture = next(
        (p.pixels for p in document.parts if isinstance(p, Image) and p.pixels is not None), None
    )
    if caption is None or picture is None:
        raise UserError("the encoder learns from documents with a caption and a picture's pixels")
    key = document.provenance.key if document.provenance else caption
    concept = zlib.crc32(key.partition("/")[2].encode() or caption.encode())
    return picture, caption, int(np.uint32(concept).view(np.int32))


class Views(grain.transforms.RandomMap):
    """A concept to two random views: of two of its designs, or of the same one twice."""

    def __init__(self, config: EncoderConfig, text: TextTokenizer, styles: Sequence[str]):
        self.config, self.text, self.styles = config, text, styles

    def random_map(
        self, group: list[tuple[np.ndarray, str, int]], rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        order = rng.permutation(len(group))
        views = [self._view(group[order[i % len(group)]], rng) for i in range(VIEWS)]
        return {name: np.stack([view[name] for view in views]) for name in views[0]}

    def _view(
        self, described: tuple[np.ndarray, str, int], rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        pixels, caption, concept = described
        model = self.config.model
        name = caption.lower()
        mirror = not any(word in name for word in DIRECTED)
        view = augment(pixels, model.vision.image_size, self.config.augment, rng, mirror)
        words = vary(caption, self.config.data, rng, self.styles)
        return {
            "image": np.round(view * 255).astype(np.uint8),
            "text": frame(self.text.encode(words), model.text),
            "concept": np.array(concept, np.int32),
        }


def vary(
    caption: str, data: EncoderData, rng: np.random.Generator, styles: Sequence[str] = ()
) -> str:
    """The caption with words of its name dropped, and with no style or one of `styles`."""
    name, comma, style = caption.rpartition(", ")
    if not comma:
        name, style = caption, ""
    words = name.split()
    kept = [word for word in words if rng.random() >= data.drop_words] or words
    named = rng.random() < data.name_style
    if styles:
        style = styles[int(rng.integers(len(styles)))]
    return " ".join(kept) + (f", {style}" if named and style else "")
