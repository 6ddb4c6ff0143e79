"""Measures from which similarity on an encoder sees two documents as near copies.

The thresholds of `SelectionConfig` depend on the encoder and on the data. Here they are measured on
any documents: renderings of one image are copies, and pairs of documents with different images and
groups are strangers. A threshold lies halfway between the similarities of both.
"""

import dataclasses
import io
from collections.abc import Sequence

import numpy as np
import PIL.Image
from jaxtyping import Float, Float32, UInt8

from leon_jax.config import UserError
from leon_jax.documents import Document, Source
from leon_jax.retrieval.encoder import RetrievalEncoder, normalise
from leon_jax.retrieval.neighbour_selection import SelectionConfig, text_and_pixels

# Almost all strangers are below the first percentile, most copies above the second.
_STRANGERS, _COPIES = 99.5, 25.0
MIN_DOCUMENTS = 8


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """Measured thresholds.

    Attributes:
      document: for whole documents (text and image).
      image: for images alone.
      separates_documents, separates_images: whether copies are more similar than strangers. False:
        the threshold is that of the strangers, and some copies will not be recognised.
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
    encoder: RetrievalEncoder, documents: Source, limit: int = 500, seed: int = 0
) -> Thresholds:
    """Measures the thresholds of an encoder on documents. The mesh must be set.

    Args:
      encoder: the encoder.
      documents: documents with text and an image with pixels.
      limit: the largest number of documents to measure.
      seed: seed of the choice of documents and pairs.

    Raises:
      UserError: there are fewer than 8 documents, or one lacks text or an image.
    """
    count = len(documents)
    if count < MIN_DOCUMENTS:
        raise UserError(
            f"there are {count} documents; thresholds need at least {MIN_DOCUMENTS} to be measured"
        )
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.permutation(count)[:limit])
    sample = [documents[int(row)] for row in chosen]
    texts, images = zip(*map(text_and_pixels, sample), strict=True)
    text_rows, image_rows = encoder.embed_texts(texts), encoder.embed_images(images)
    document_rows = normalise(text_rows + image_rows)
    first, second = _strangers(sample, images, rng)
    copies = [
        encoder.embed_images(list(copy)) for copy in zip(*map(renderings, images), strict=True)
    ]
    document, separates_documents = _threshold(
        _similarity(document_rows[first], document_rows[second]),
        np.concatenate(
            [_similarity(document_rows, normalise(copy + text_rows)) for copy in copies]
        ),
    )
    image, separates_images = _threshold(
        _similarity(image_rows[first], image_rows[second]),
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


def _strangers(
    documents: Sequence[Document], images: Sequence[np.ndarray], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Returns rows of pairs of documents with different images and different groups."""
    groups = [document.provenance.group if document.provenance else "" for document in documents]
    pictures = [image.tobytes() for image in images]
    pairs = [
        (one, other)
        for one, other in rng.integers(0, len(documents), (20 * len(documents), 2)).tolist()
        if pictures[one] != pictures[other] and (not groups[one] or groups[one] != groups[other])
    ]
    if not pairs:
        raise UserError("all documents have the same image or group, so there are no strangers")
    first, second = np.array(pairs).T
    return first, second


def _threshold(
    strangers: Float[np.ndarray, "n"], copies: Float[np.ndarray, "m"]
) -> tuple[float, bool]:
    """Returns the threshold, and whether copies are more similar than strangers."""
    low, high = float(np.percentile(strangers, _STRANGERS)), float(np.percentile(copies, _COPIES))
    separates = high > low
    return round((low + high) / 2 if separates else low, 4), separates


def _similarity(
    first: Float32[np.ndarray, "n d"], second: Float32[np.ndarray, "n d"]
) -> Float32[np.ndarray, "n"]:
    return (first * second).sum(1)
