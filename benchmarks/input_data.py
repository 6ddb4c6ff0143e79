"""Writes synthetic web-like documents into prepared folders for benchmarks/input_pipeline.py.

Captions are English. Codes and images compress as badly as real ones. Neighbours are random, so
that few documents are read twice.
"""

import pathlib
import re
from collections.abc import Iterator
from pydoc_data import topics

import numpy as np
import PIL.Image

from leon_jax.data.document_folder import MANIFEST
from leon_jax.documents import Document, Image, Provenance, Text
from leon_jax.retrieval.prepared_folder import PreparedFolder, write_split
from leon_jax.tokenizers.text import TextTokenizer

COLUMNS = 20  # neighbours of a document in each modality
FOLDERS = {"codes": False, "pictures": True}


def words() -> list[str]:
    """Returns the words of Python's help topics, as English prose."""
    text = " ".join(topics.topics.values())
    return [word for word in text.split() if re.fullmatch(r"[A-Za-z,.'()-]+", word)]


def photograph(rng: np.random.Generator, side: int = 256) -> np.ndarray:
    """Returns smooth shapes with a little noise, whose PNG is as large as a photograph's."""
    shapes = PIL.Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
    smooth = np.asarray(shapes.resize((side, side), PIL.Image.Resampling.BICUBIC))
    return np.clip(smooth + rng.normal(0, 3, smooth.shape), 0, 255).astype(np.uint8)


def documents(count: int, text: TextTokenizer, with_pixels: bool) -> Iterator[Document]:
    """Yields documents with captions of 20 to 60 tokens, 32 x 32 codes and optional pixels."""
    rng, prose = np.random.default_rng(0), words()
    for number in range(count):
        caption = ""
        while not 20 <= len(text.encode(caption)) <= 60:
            start, length = rng.integers(len(prose) - 50), rng.integers(12, 40)
            caption = " ".join(prose[start : start + length])
        codes = rng.integers(0, 8192, (32, 32), np.int32)
        pixels = photograph(rng) if with_pixels else None
        yield Document(
            (Text(caption), Image(pixels=pixels, codes=codes)),
            Provenance(f"web/{number}", "web", "CC-BY-4.0", "somebody"),
        )


def write(folder: pathlib.Path, count: int) -> None:
    """Writes `text.json` and the prepared folders `codes` and `pictures`, unless they exist."""
    folder.mkdir(parents=True, exist_ok=True)
    text = TextTokenizer.train(words(), 8192)
    text.save(folder / "text.json")
    ids = np.random.default_rng(1).integers(0, count, (2, count, COLUMNS), np.int32)
    for name, with_pixels in FOLDERS.items():
        prepared = folder / name
        splits = (prepared / MANIFEST).exists() and PreparedFolder(prepared).manifest["splits"]
        if splits != {"train": count}:
            print(f"writing {count:,} documents into {prepared}", flush=True)
            write_split(prepared, "train", documents(count, text, with_pixels), ids)
