"""Opens the prepared folders of a decoder's configuration."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float64

from leon_jax.config import UserError
from leon_jax.data import image_variants
from leon_jax.data.config import DataConfig, MixtureComponent
from leon_jax.data.document_folder import TRAIN
from leon_jax.data.examples import Component, Neighbours
from leon_jax.retrieval.neighbour_selection import sample_neighbours
from leon_jax.retrieval.prepared_folder import PreparedFolder


def open_components(data: DataConfig) -> list[Component]:
    """Opens the prepared folders of `data`.

    Raises:
      UserError: no folder is set, a file is missing or damaged, or a setting does not fit a
        folder; the message begins with the config key.
    """
    return [
        _open(key, settings, data.per_modality)
        for key, settings in zip(data.keys, data.components, strict=True)
    ]


def _open(key: str, settings: MixtureComponent, per_modality: int) -> Component:
    """Opens one folder; `key` is its config key for messages, and `settings` has no None."""
    assert settings.retrieved is not None and settings.variants is not None
    try:
        folder = PreparedFolder(settings.folder)
        source = folder.records(settings.split, pixels=False)
        variants = folder.variants(source, settings.split) if settings.variants > 1 else None
        if variants is not None and variants.count < settings.variants:
            raise UserError(
                f"variants is {settings.variants}, but {settings.folder} holds {variants.count}"
            )
        neighbours = None
        if any(settings.retrieved[1:]):
            neighbours = neighbour_sampler(folder, settings.split, per_modality)
        weights = None
        if settings.balance:
            weights = family_weights(folder.listing(settings.split), settings.balance)
        return Component(
            settings,
            source,
            neighbours=neighbours,
            query_weights=weights,
            variant=variants,
            plain_variants=min(image_variants.plain(variants.count), settings.variants)
            if variants
            else 1,
        )
    except UserError as error:
        raise UserError(f"{key}: {error}") from error


def family_weights(
    listing: Iterable[Mapping[str, Any]], exponent: float
) -> Float64[np.ndarray, "documents"]:
    """Returns a sampling weight for each document: (size of its family) ** -exponent.

    Without a family, the group of a document counts as its family. A document without a group has
    weight 1. Without weights, things with many variants would dominate the training data.
    """
    family_ids: dict[str, int] = {}
    names = (document.get("family") or document.get("group") for document in listing)
    families = np.fromiter(
        (family_ids.setdefault(name, len(family_ids)) if name else -1 for name in names), np.int64
    )
    counts = np.bincount(families[families >= 0], minlength=1)
    sizes = np.where(families >= 0, counts[families], 1)
    return sizes.astype(np.float64) ** -exponent


def neighbour_sampler(folder: PreparedFolder, split: str, per_modality: int) -> Neighbours:
    """Returns a function that samples retrieved documents from the folder's neighbour table.

    Args:
      folder: a prepared folder.
      split: the split of the queries; must be the train split, which is the indexed one.
      per_modality: number of nearest neighbours to sample from, in each modality.

    Raises:
      UserError: `split` is not the train split, or the table is missing, damaged, or of another
        number of documents.
    """
    if split != TRAIN:
        raise UserError(
            f"split is {split}, but neighbours are documents of {TRAIN}; set retrieved to (1.0,)"
        )
    table, num_documents = folder.neighbours(split), folder.manifest["splits"][split]
    if len(table) != num_documents:
        raise UserError(
            f"{folder.folder} has neighbours of {len(table)} documents, but {num_documents} "
            "documents; encode its documents again"
        )

    def sample(rng: np.random.Generator, index: int, count: int) -> list[int]:
        row = table[index]
        return sample_neighbours(rng, row["by_text_ids"], row["by_image_ids"], count, per_modality)

    return sample
