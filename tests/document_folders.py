"""Small documents folders for tests of training: drawings, and crops of a photograph."""

import pathlib

import matplotlib.cbook
import numpy as np
import PIL.Image

from leon_jax.documents import Document, Image, Provenance, Text
from leon_jax.retrieval.prepared_folder import write_split

NAMES = ("red heart", "blue square", "green tree", "black cat", "yellow sun", "left arrow")


def drawings(grouped: bool = True) -> list[Document]:
    """Returns twelve captioned images of several sizes, two of each name.

    Args:
      grouped: whether the two images of a name are a group.
    """
    rng = np.random.default_rng(0)
    documents = []
    for number, name in enumerate(NAMES):
        base = rng.integers(0, 256, (2, 3, 3), np.uint8)
        for style, scale in (("flat", 12), ("outlined", 20)):
            pixels = np.repeat(np.repeat(base, scale, 0), scale, 1)
            pixels = np.clip(pixels.astype(int) + rng.integers(-9, 9, pixels.shape), 0, 255)
            provenance = Provenance(
                f"{style}/{number}",
                "test",
                "CC0-1.0",
                "",
                group=name if grouped else "",
                captions=(name, f"{name}, {style}") if grouped else (),
            )
            parts = (Text(f"{name}, {style} style"), Image(pixels=pixels.astype(np.uint8)))
            documents.append(Document(parts, provenance))
    return documents


def photographs(count: int, side: int) -> list[Document]:
    """Returns captioned crops of a photograph of a person, with `side` as the shorter side."""
    path = matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    photograph = PIL.Image.open(path)
    rng = np.random.default_rng(0)
    documents = []
    for number in range(count):
        width = int(rng.integers(150, 400))
        height = int(width * rng.uniform(0.7, 1.4))
        left = int(rng.integers(0, photograph.width - width))
        top = int(rng.integers(0, photograph.height - height))
        image = photograph.crop((left, top, left + width, top + height))
        scale = side / min(image.size)
        image = image.resize((round(width * scale) or 1, round(height * scale) or 1))
        provenance = Provenance(f"{number}", "photographs", "CC0-1.0", "")
        caption = Text(f"the part of a portrait at column {left} and row {top}")
        documents.append(Document((caption, Image(pixels=np.asarray(image))), provenance))
    return documents


def write(folder: pathlib.Path, documents: list[Document], **held_out: list[Document]) -> str:
    """Writes a folder with a train split, and with other splits by name; returns its path."""
    for split, members in {"train": documents, **held_out}.items():
        write_split(folder, split, members)
    return str(folder)
