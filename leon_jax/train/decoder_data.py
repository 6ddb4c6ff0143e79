"""Opens the prepared folders that a decoder's configuration names."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float64

from leon_jax.config import UserError
from leon_jax.data import image_variants
from leon_jax.data.config import DataConfig, MixtureComponent
from leon_jax.data.examples import Component, Neighbours
from leon_jax.retrieval.prepared_folder import TRAIN, PreparedFolder
from leon_jax.retrieval.selection import sample_neighbours


def open_components(data: DataConfig) -> list[Component]:
    """Opens the prepared folders that `data` says to train on.

    Raises:
      UserError: there is nothing to train on, a file is missing or damaged, or a setting does not
        fit what a folder holds; the sentence begins with the key.
    """
    if not data.components:
        raise UserError("config.data.folder is empty; name a prepared folder, or give data.mixture")
    if not data.mixture:
        return [_open("config.data", data.components[0], data.per_modality)]
    return [
        _open(f"config.data.mixture[{number}]", settings, data.per_modality)
        for number, settings in enumerate(data.components)
    ]


def _open(key: str, settings: MixtureComponent, per_modality: int) -> Component:
    """Opens one folder; `key` is what a person calls it, and `settings` has no None."""
    assert settings.retrieved is not None and settings.variants is not None
    try:
        folder = PreparedFolder(settings.folder)
        source = folder.records(settings.split, pixels=False)
        shown = folder.variants(source, settings.split) if settings.variants > 1 else None
        if shown is not None and shown.count < settings.variants:
            raise UserError(
                f"variants is {settings.variants}, but {settings.folder} holds {shown.count}"
            )
        draw = None
        if any(settings.retrieved[1:]):
            draw = neighbours(folder, settings.split, per_modality)
        weights = None
        if settings.balance:
            weights = balanced(folder.listing(settings.split), settings.balance)
        return Component(
            settings,
            source,
            neighbours=draw,
            query_weights=weights,
            variant=shown,
            plain_variants=min(image_variants.plain(shown.count), settings.variants)
            if shown
            else 1,
        )
    except UserError as error:
        raise UserError(f"{key}: {error}") from error


def balanced(
    listing: Iterable[Mapping[str, Any]], exponent: float
) -> Float64[np.ndarray, "documents"]:
    """A weight for each document: (documents of its group) ** -exponent; without one it is alone.

    Without weights a model learns mostly what comes in the most variations, such as skin tones.
    """
    numbers: dict[str, int] = {}
    names = (document.get("group") for document in listing)
    groups = np.fromiter(
        (numbers.setdefault(name, len(numbers)) if name else -1 for name in names), np.int64
    )
    counts = np.bincount(groups[groups >= 0], minlength=1)
    sizes = np.where(groups >= 0, counts[groups], 1)
    return sizes.astype(np.float64) ** -exponent


def neighbours(folder: PreparedFolder, split: str, per_modality: int) -> Neighbours:
    """Draws the documents to put before a query from the folder's neighbour table.

    Args:
      folder: a prepared folder.
      split: whose documents are queries; only the indexed one, whose documents neighbours are.
      per_modality: how many columns of the table are drawn from, in each modality.

    Raises:
      UserError: the table is missing, is none, or is that of other documents.
    """
    if split != TRAIN:
        raise UserError(
            f"split is {split}, but neighbours are documents of {TRAIN}; set retrieved to (1.0,)"
        )
    table, documents = folder.neighbours(split), folder.manifest["splits"][split]
    if len(table) != documents:
        raise UserError(
            f"the neighbours in {folder.folder} are of {len(table)} documents, not {documents}"
        )

    def draw(rng: np.random.Generator, index: int, number: int) -> list[int]:
        row = table[index]
        return sample_neighbours(rng, row["by_text_ids"], row["by_image_ids"], number, per_modality)

    return draw
