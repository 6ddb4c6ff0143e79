"""Reads documents for the tokenizers and the encoder from weighted documents folders.

The order is that of the decoder's input pipeline (`leon_jax.data.pipeline.shuffled_mixture`):
shuffled every epoch, mixed by weight, split into data shards, and resumed exactly.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

import grain
import numpy as np
from jaxtyping import UInt8

from leon_jax.config import UserError
from leon_jax.data import pipeline
from leon_jax.data.config import FolderComponent, FoldersConfig, ImageDataConfig
from leon_jax.data.document_folder import DocumentFolder
from leon_jax.data.records import RecordSource
from leon_jax.documents import Document, Image
from leon_jax.train import evaluation


@dataclasses.dataclass(frozen=True)
class Component:
    """One open folder of a mixture.

    Attributes:
      settings: its folder, split and weight.
      folder: the folder.
      source: the documents of the split.
    """

    settings: FolderComponent
    folder: DocumentFolder
    source: RecordSource

    @property
    def name(self) -> str:
        """The folder and the split, for messages."""
        return f"{self.settings.folder} ({self.settings.split})"

    def error(self, index: int, reason: str) -> UserError:
        """Returns an error about a document."""
        provenance = self.source[index].provenance
        key = f" ({provenance.key})" if provenance else ""
        return UserError(f"document {index} of {self.name}{key} {reason}")

    def images(self, document: Document, index: int) -> list[UInt8[np.ndarray, "h w 3"]]:
        """Returns the pixels of all images of a document, at least one.

        Raises:
          UserError: the document has no image with pixels.
        """
        images = [
            part.pixels
            for part in document.parts
            if isinstance(part, Image) and part.pixels is not None
        ]
        if not images:
            raise self.error(index, "has no stored image")
        return images


def open_components(data: FoldersConfig) -> list[Component]:
    """Opens the folders of `data`.

    Raises:
      UserError: no folder is set, a folder, a split or a file is missing, or a split is empty; the
        message begins with the config key.
    """
    return [_open(key, part) for key, part in zip(data.keys, data.components, strict=True)]


def _open(key: str, settings: FolderComponent) -> Component:
    try:
        folder = DocumentFolder(settings.folder)
        component = Component(settings, folder, folder.records(settings.split))
        if not len(component.source):
            raise UserError(f"{component.name} has no documents")
        return component
    except UserError as error:
        raise UserError(f"{key}: {error}") from error


def sample_component(components: Sequence[Component]) -> Component:
    """Returns what sample images are made of: a held-out split, or else the first component.

    A held-out split is one that no component trains on, the first one of the first such folder.
    """
    trained = {(str(part.folder.address), part.settings.split) for part in components}
    for part in components:
        for split, count in part.folder.splits.items():
            if count and (str(part.folder.address), split) not in trained:
                settings = FolderComponent(part.settings.folder, split)
                return Component(settings, part.folder, part.folder.records(split))
    return components[0]


def held_out_documents(data: ImageDataConfig) -> tuple[list[tuple[Component, int]], str]:
    """Returns the documents that a run is evaluated on; see `evaluation.choose_held_out`.

    Args:
      data: the data settings.

    Returns:
      For each document, its folder and its number there; and all of them in words.

    Raises:
      UserError: see `evaluation.choose_held_out`.
    """
    held_out = evaluation.choose_held_out(data, DocumentFolder)
    documents: list[tuple[Component, int]] = []
    for part in held_out:
        settings = FolderComponent(str(part.folder.address), part.split)
        component = Component(settings, part.folder, part.folder.records(part.split))
        documents += [(component, number) for number in part.documents.tolist()]
    return documents, f"{len(documents)} documents of {evaluation.names(held_out)}"


def check_batch_size(batch_size: int, views: int, items: int, name: str) -> None:
    """Checks that a batch holds every item at most once.

    Args:
      batch_size: rows of a batch.
      views: rows of a batch that show the same item.
      items: number of items in all folders.
      name: name of the items in the message, for example "documents".

    Raises:
      UserError: there are too few items; the message says how many would do.
    """
    needed = batch_size // views
    if items < needed:
        raise UserError(
            f"config.batch_size is {batch_size}, which takes {needed} {name}, but the training "
            f"data has {items}; set config.batch_size to at most {items * views}, or train on at "
            f"least {needed} {name}"
        )


def batches(
    components: Sequence[Component],
    lengths: Sequence[int],
    transforms: Sequence[grain.transforms.RandomMap],
    *,
    rows: int,
    seed: int,
    shard: tuple[int, int],
    threads: int,
) -> grain.IterDataset:
    """Returns an endless dataset of batches, whose iterator can be checkpointed.

    Args:
      components: the folders of the mixture.
      lengths: number of items of each component.
      transforms: for each component, maps the index of an item to {name: array}.
      rows: items of a batch of this shard.
      seed: seed of the order and of the transforms.
      shard: (index, count) of this shard; shards have different items of the same order.
      threads: number of threads that make items in advance, up to two batches ahead.
    """
    settings = [component.settings for component in components]
    items = pipeline.shuffled_mixture(lengths, transforms, settings, seed=seed, shard=shard)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * rows)
    return items.to_iter_dataset(options).batch(rows, drop_remainder=True)


def weighted_texts(components: Sequence[Component]) -> Iterator[str]:
    """Yields the texts of all documents, so that the components have documents by their weights.

    The component with the most documents for its weight is read once; the others are read as often
    as their weights ask, the last time in part, with equal distances between the documents.

    Raises:
      UserError: a record is damaged.
    """
    sizes = [len(component.source) for component in components]
    weights = [component.settings.weight for component in components]
    scale = max(size / weight for size, weight in zip(sizes, weights, strict=True))
    for component, size, weight in zip(components, sizes, weights, strict=True):
        count = max(size, math.floor(scale * weight + 0.5))
        for number in range(count):
            yield from component.source.texts(number * size // count)


def group_rows(listing: Iterator[Mapping]) -> tuple[np.ndarray, np.ndarray]:
    """Sorts the documents of a split by group.

    A document without a group is grouped by its `picture`, the digest of its stored images, if the
    listing has it, and is otherwise a group of its own.

    Args:
      listing: the lines of `.documents.jsonl`.

    Returns:
      rows, int64[n], the documents group by group, and starts, int64[groups + 1]: group i is
      `rows[starts[i]:starts[i + 1]]`. Groups are in the order of their first documents.
    """
    numbers: dict[tuple[str, str | int], int] = {}
    group_ids = []
    for row, line in enumerate(listing):
        name: tuple[str, str | int] = ("row", row)
        if group := line.get("group"):
            name = ("group", group)
        elif picture := line.get("picture"):
            name = ("picture", picture)
        group_ids.append(numbers.setdefault(name, len(numbers)))
    ids = np.array(group_ids, np.int64)
    starts = np.concatenate([[0], np.cumsum(np.bincount(ids, minlength=len(numbers)))])
    return np.argsort(ids, kind="stable"), starts.astype(np.int64)
