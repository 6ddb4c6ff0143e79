"""Measures from which similarity on an encoder sees two documents as near copies.

The thresholds of `SelectionConfig` depend on the encoder and on the data. Here they are measured on
any documents. Renderings of one image are copies. Pairs of documents with different images and
groups are strangers. Documents with different images of one group are variations. They are no
copies, although an encoder learns to match them. A threshold lies halfway between the similarities
of copies and those of strangers and variations.
"""

import collections
import dataclasses
import io
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import PIL.Image
from jaxtyping import Float, Float32, Int, UInt8

from leon_jax.config import UserError
from leon_jax.documents import Document, Source
from leon_jax.retrieval.encoder import RetrievalEncoder, normalise
from leon_jax.retrieval.neighbour_selection import SelectionConfig, text_and_pixels

# Almost all strangers and variations are below their percentiles, most copies above theirs.
_STRANGERS, _VARIATIONS, _COPIES = 99.5, 95.0, 25.0
MIN_DOCUMENTS = 8


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """Measured thresholds.

    Attributes:
      document: for whole documents (text and image).
      image: for images alone.
      separates_documents, separates_images: whether copies are more similar than strangers and
        variations. False: the threshold is that of the latter, and some copies will not be
        recognised.
    """

    document: float
    image: float
    separates_documents: bool
    separates_images: bool

    def apply(self, selection: SelectionConfig) -> SelectionConfig:
        """Returns `selection` with these thresholds."""
        return dataclasses.replace(
            selection,
            near_copy_query=self.document,
            near_copy_document=self.document,
            near_copy_picture=self.image,
        )


def measure(
    encoder: RetrievalEncoder,
    documents: Source,
    limit: int = 500,
    seed: int = 0,
    groups: Sequence[str] = (),
) -> Thresholds:
    """Measures the thresholds of an encoder on documents. The mesh must be set.

    Args:
      encoder: the encoder.
      documents: documents with text and an image with pixels.
      limit: the largest number of documents to measure.
      seed: seed of the choice of documents and pairs.
      groups: the group of each document, "" for none; empty: there are no variations.

    Raises:
      UserError: there are fewer than 8 documents, or one lacks text or an image.
    """
    count = len(documents)
    if count < MIN_DOCUMENTS:
        raise UserError(
            f"there are {count} documents; thresholds need at least {MIN_DOCUMENTS} to be measured"
        )
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(count)[:limit]
    sample = [documents[row] for row in sorted({*chosen.tolist(), *_mates(chosen, groups, rng)})]
    texts, images = zip(*map(text_and_pixels, sample), strict=True)
    text_rows, image_rows = encoder.embed_texts(texts), encoder.embed_images(images)
    document_rows = normalise(text_rows + image_rows)
    strangers = _strangers(sample, images, rng)
    variations = _variations(sample, images)
    copies = [
        encoder.embed_images(list(copy)) for copy in zip(*map(renderings, images), strict=True)
    ]
    document, separates_documents = _threshold(
        _pair_similarity(document_rows, strangers),
        _pair_similarity(document_rows, variations),
        np.concatenate(
            [_similarity(document_rows, normalise(copy + text_rows)) for copy in copies]
        ),
    )
    image, separates_images = _threshold(
        _pair_similarity(image_rows, strangers),
        _pair_similarity(image_rows, variations),
        np.concatenate([_similarity(image_rows, copy) for copy in copies]),
    )
    return Thresholds(document, image, separates_documents, separates_images)


def renderings(pixels: UInt8[np.ndarray, "h w 3"]) -> list[UInt8[np.ndarray, "h w 3"]]:
    """Returns the image as JPEG of quality 60, at half size, shifted by two pixels, and darker."""
    image = PIL.Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, format="jpeg", quality=60)
    size = (max(1, image.width // 2), max(1, image.height // 2))
    small = image.resize(size, PIL.Image.Resampling.BILINEAR)
    return [
        np.asarray(PIL.Image.open(buffer).convert("RGB")),
        np.asarray(small),
        np.roll(pixels, (2, 2), (0, 1)),
        (pixels * np.float32(0.9)).astype(np.uint8),
    ]


def _mates(
    rows: Int[np.ndarray, "n"], groups: Sequence[str], rng: np.random.Generator
) -> Iterator[int]:
    """Yields for each row another row of its group, if there is one."""
    members = collections.defaultdict(list)
    for row, group in enumerate(groups):
        members[group].append(row)
    for row in rows.tolist():
        if groups and groups[row] and len(members[groups[row]]) > 1:
            others = [member for member in members[groups[row]] if member != row]
            yield others[rng.integers(len(others))]


def _groups(documents: Sequence[Document]) -> list[str]:
    return [document.provenance.group if document.provenance else "" for document in documents]


def _strangers(
    documents: Sequence[Document], images: Sequence[np.ndarray], rng: np.random.Generator
) -> Int[np.ndarray, "n 2"]:
    """Returns rows of pairs of documents with different images and different groups."""
    groups, pictures = _groups(documents), [image.tobytes() for image in images]
    pairs = [
        (one, other)
        for one, other in rng.integers(0, len(documents), (20 * len(documents), 2)).tolist()
        if pictures[one] != pictures[other] and (not groups[one] or groups[one] != groups[other])
    ]
    if not pairs:
        raise UserError("all documents have the same image or group, so there are no strangers")
    return np.array(pairs)


def _variations(
    documents: Sequence[Document], images: Sequence[np.ndarray]
) -> Int[np.ndarray, "n 2"]:
    """Returns rows of pairs of documents with different images and the same group."""
    members = collections.defaultdict(list)
    for row, group in enumerate(_groups(documents)):
        if group:
            members[group].append(row)
    pairs = [
        pair
        for rows in members.values()
        # Few of a large group, so that it does not outweigh the others.
        for pair in itertools.combinations(rows[:4], 2)
        if not np.array_equal(images[pair[0]], images[pair[1]])
    ]
    return np.array(pairs, np.int64).reshape(-1, 2)


def _threshold(
    strangers: Float[np.ndarray, "n"],
    variations: Float[np.ndarray, "k"],
    copies: Float[np.ndarray, "m"],
) -> tuple[float, bool]:
    """Returns the threshold, and whether copies are more similar than the others."""
    low, high = float(np.percentile(strangers, _STRANGERS)), float(np.percentile(copies, _COPIES))
    if len(variations):
        low = max(low, float(np.percentile(variations, _VARIATIONS)))
    separates = high > low
    return round((low + high) / 2 if separates else low, 4), separates


def _pair_similarity(
    rows: Float32[np.ndarray, "n d"], pairs: Int[np.ndarray, "m 2"]
) -> Float32[np.ndarray, "m"]:
    return _similarity(rows[pairs[:, 0]], rows[pairs[:, 1]])


def _similarity(
    first: Float32[np.ndarray, "n d"], second: Float32[np.ndarray, "n d"]
) -> Float32[np.ndarray, "n"]:
    return (first * second).sum(1)
