"""The prepared folders that a decoder's configuration names, as parts of a mixture."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float64

from leon_jax.config import UserError
from leon_jax.data import examples, variants
from leon_jax.retrieval.prepared import TRAIN, Prepared
from leon_jax.retrieval.selection import sample_neighbours
from leon_jax.train.decoder_config import DecoderData, MixturePart


def parts(data: DecoderData) -> list[examples.Part]:
    """What `data` says to train on, opened.

    Raises:
      UserError: there is nothing to train on, a file is missing or damaged, or a setting does not
        fit what a folder holds; the sentence begins with the key.
    """
    if not data.folder and not data.mixture:
        raise UserError("config.data.folder is empty; name a prepared folder, or give data.mixture")
    alone = MixturePart(
        data.folder,
        data.split,
        retrieved=data.retrieved,
        variants=data.variants,
        unchanged=data.unchanged,
        balance=data.balance,
    )
    if not data.mixture:
        return [_part("config.data", alone, data.per_modality)]
    opened = []
    for number, part in enumerate(data.mixture):
        given = {name: value for name, value in vars(part).items() if value is not None}
        whole = dataclasses.replace(alone, **given)
        opened.append(_part(f"config.data.mixture[{number}]", whole, data.per_modality))
    return opened


def _part(key: str, part: MixturePart, per_modality: int) -> examples.Part:
    """`part`, in which nothing is left out; `key` is what a person calls it."""
    assert part.retrieved is not None and part.balance is not None
    assert part.variants is not None and part.unchanged is not None
    try:
        folder = Prepared(part.folder)
        source = folder.records(part.split, pixels=False)
        shown = folder.variants(source, part.split) if part.variants > 1 else None
        if shown is not None and shown.count < part.variants:
            raise UserError(f"variants is {part.variants}, but {part.folder} holds {shown.count}")
        draw = None
        if any(part.retrieved[1:]):
            draw = neighbours(folder, part.split, per_modality)
        return examples.Part(
            source,
            name=f"{part.folder} ({part.split})",
            weight=part.weight,
            retrieved=part.retrieved,
            neighbours=draw,
            balance=balanced(folder.listing(part.split), part.balance) if part.balance else None,
            variant=shown,
            variants=part.variants,
            plain_variants=min(variants.plain(shown.count), part.variants) if shown else 1,
            unchanged=part.unchanged,
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


def neighbours(folder: Prepared, split: str, per_modality: int) -> examples.Neighbours:
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
