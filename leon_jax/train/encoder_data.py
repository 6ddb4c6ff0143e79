"""The retrieval encoder's training examples: augmented images with captions and concepts."""

import hashlib
from collections.abc import Sequence

import grain
import numpy as np
from jaxtyping import Int64, UInt8

from leon_jax.data.augment import AugmentConfig, augment
from leon_jax.documents import Document
from leon_jax.models.clip import CLIPConfig
from leon_jax.retrieval.encoder import frame, plain_square
from leon_jax.tokenizers.text import TextTokenizer
from leon_jax.train import document_data
from leon_jax.train.document_data import Component


def make_views(
    components: Sequence[Component],
    views: int,
    config: AugmentConfig,
    model: CLIPConfig,
    text: TextTokenizer,
) -> list["Views"]:
    """Returns the `Views` of each component.

    Args:
      components: the folders to train on.
      views: 1 for the documents of each folder, else the number of views of each of its groups.
      config: random changes of the images.
      model: the sizes of the encoder's inputs.
      text: the text tokenizer.

    Raises:
      UserError: a listing of documents is missing, with `views` above 1.
    """
    # Groups of one folder have different names; groups of different folders may share a name.
    numbers: dict[str, int] = {}
    return [
        Views(
            part,
            document_data.group_rows(part.folder.listing(part.settings.split))
            if views > 1
            else None,
            views,
            config,
            model,
            text,
            numbers.setdefault(str(part.folder.address), len(numbers)),
        )
        for part in components
    ]


class Views(grain.transforms.RandomMap):
    """Maps the index of a group, or of a document, to random views.

    A view has a random image of the document, augmented, and a random one of its captions.

    Args:
      component: the folder with the documents.
      groups: rows and starts of all groups (see `document_data.group_rows`); None: an item is a
        document.
      views: number of views of an item. They show different documents of the group as long as
        there are any.
      config: random changes of the images.
      model: the sizes of the encoder's inputs.
      text: the text tokenizer.
      folder: number of the folder, which tells groups of equal names apart.
    """

    def __init__(
        self,
        component: Component,
        groups: tuple[Int64[np.ndarray, "n"], Int64[np.ndarray, "groups+1"]] | None,
        views: int,
        config: AugmentConfig,
        model: CLIPConfig,
        text: TextTokenizer,
        folder: int = 0,
    ):
        self.component, self.groups, self.views = component, groups, views
        self.config, self.model, self.text, self.folder = config, model, text, folder

    def __len__(self) -> int:
        return len(self.component.source) if self.groups is None else len(self.groups[1]) - 1

    def random_map(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Returns `image` uint8[views, size, size, 3], `text` and `concept`, int32[views, ...]."""
        if self.groups is None:
            rows = np.array([index])
        else:
            rows, starts = self.groups
            rows = rng.permutation(rows[starts[index] : starts[index + 1]])
        views = [self._view(int(rows[i % len(rows)]), rng) for i in range(self.views)]
        return {name: np.stack([view[name] for view in views]) for name in views[0]}

    def _view(self, row: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        document = self.component.source[row]
        images = self.component.images(document, row)
        captions = _captions(document)
        caption = captions[int(rng.integers(len(captions)))]
        if not caption:
            raise self.component.error(row, "has no text, but the encoder learns from captions")
        pixels = images[int(rng.integers(len(images)))]
        return {
            "image": augment(pixels, self.model.vision.image_size, self.config, rng),
            "text": frame(self.text.encode(caption), self.model.text),
            "concept": np.array(concept(document, images, self.folder), np.int32),
        }


def plain_pairs(
    documents: Sequence[tuple[Component, int]], model: CLIPConfig, text: TextTokenizer
) -> dict[str, np.ndarray]:
    """Returns the first image of each document, unchanged, and its first caption.

    Args:
      documents: for each document, its folder and its number there.
      model: the sizes of the encoder's inputs.
      text: the text tokenizer.

    Returns:
      `image` uint8[n, size, size, 3], `text` int32[n, t] and `concept` int32[n].

    Raises:
      UserError: a document has no image or no text.
    """
    numbers: dict[str, int] = {}
    pairs = []
    for component, row in documents:
        document = component.source[row]
        images, caption = component.images(document, row), _captions(document)[0]
        if not caption:
            raise component.error(row, "has no text, but the encoder is evaluated with captions")
        folder = numbers.setdefault(str(component.folder.address), len(numbers))
        pairs.append(
            {
                "image": plain_square(images[0], model.vision.image_size),
                "text": frame(text.encode(caption), model.text),
                "concept": np.array(concept(document, images, folder), np.int32),
            }
        )
    return {name: np.stack([pair[name] for pair in pairs]) for name in pairs[0]}


def _captions(document: Document) -> tuple[str, ...]:
    """Returns the captions of a document, at least one; without captions it is the text."""
    provenance = document.provenance
    return (provenance.captions if provenance else ()) or (document.text,)


def concept(document: Document, images: Sequence[UInt8[np.ndarray, "h w 3"]], folder: int) -> int:
    """Returns a number that documents of one group, or with equal images, share.

    It is a 32-bit hash of the group or, without a group, of the images. In a batch of 32,768
    concepts, two have the same number with a probability of 1 in 8, which makes one pair of half a
    billion a positive by mistake.

    Args:
      document: the document.
      images: all of its images.
      folder: number of its folder; equal names of groups in different folders are different groups.
    """
    digest = hashlib.blake2b(digest_size=4)
    if document.provenance and document.provenance.group:
        digest.update(f"group {folder} {document.provenance.group}".encode())
    else:
        for pixels in images:
            digest.update(str(pixels.shape).encode() + pixels.tobytes())
    return int.from_bytes(digest.digest(), "little", signed=True)
