"""A tiny dataset for tests: 23 captions with images of six codes, and batches of them."""

import numpy as np

from leon_jax.data import pipeline
from leon_jax.data.config import DataConfig, MixtureComponent
from leon_jax.data.examples import Component
from leon_jax.data.masking import MaskingConfig
from leon_jax.documents import Document, Image, Text
from leon_jax.tokenizers.documents import DocumentTokenizer
from leon_jax.tokenizers.text import TextTokenizer
from leon_jax.vocabulary import Vocabulary

IMAGE_SHAPE = (2, 3)
WORDS = ("red", "green", "blue", "heart", "star", "cat")
COMPONENT_FIELDS = ("query_weights", "variant", "plain_variants")
NEVER = MaskingConfig(spans="fixed", count=0)


def make_documents(count, first=0):
    """Documents whose captions begin with their numbers, counted from `first`."""
    rng = np.random.default_rng(first)
    return [
        Document(
            (
                Text(f"{i} {' '.join(rng.choice(WORDS, 1 + i % 3))}"),
                Image(codes=rng.integers(0, 16, IMAGE_SHAPE).astype(np.int32)),
            )
        )
        for i in range(first, first + count)
    ]


def make_tokenizer():
    text = TextTokenizer.train(WORDS, 280)
    vocabulary = Vocabulary.compact(image_codes=16, text_tokens=text.size, sentinels=8)
    return DocumentTokenizer(vocabulary, text, IMAGE_SHAPE)


DOCUMENTS = make_documents(23)
CONFIG = DataConfig(length=80, threads=1)


def ring(rng, index, count):
    """A stub of retrieval: returns the next `count` documents."""
    return [(index + 1 + i) % len(DOCUMENTS) for i in range(count)]


def component(documents=DOCUMENTS, folder="little", neighbours=ring, **others):
    """A component whose examples have 0, 1 or 2 retrieved documents by default.

    `others` are fields of `Component`, or of its settings.
    """
    fields = {name: others.pop(name) for name in list(others) if name in COMPONENT_FIELDS}
    settings = MixtureComponent(folder, **{"retrieved": (0.4, 0.3, 0.3), **others})
    return Component(settings, documents, neighbours, **fields)


def make(
    tokenizer, config=CONFIG, masking=None, components=None, *, batch_size=4, max_positions=None,
    part_step=1, shard=(0, 1), **others,
):  # fmt: skip
    """Batches of `components`, or of one `component(**others)`."""
    return pipeline.make(
        components or [component(**others)], tokenizer, config, masking or MaskingConfig(),
        batch_size=batch_size, max_positions=max_positions, part_step=part_step, shard=shard,
    )  # fmt: skip


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def unpack(batch, eos, gaps=False):
    """Yields (ids, weights) of each example in a batch; ids are the inputs and the last target."""
    for row in range(len(batch["ids"])):
        segments = batch["segment_ids"][row]
        for segment in range(1, segments.max() + 1):
            columns = np.flatnonzero(segments == segment)
            assert (np.diff(columns) == 1).all()
            ids, targets = batch["ids"][row, columns], batch["targets"][row, columns]
            np.testing.assert_array_equal(ids[1:], targets[:-1])
            if not gaps:
                positions = batch["positions"][row, columns]
                np.testing.assert_array_equal(positions, np.arange(len(columns)))
            assert ids[0] == eos
            yield np.append(ids, targets[-1]), batch["weights"][row, columns]
