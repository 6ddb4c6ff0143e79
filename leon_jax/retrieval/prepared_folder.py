"""Reads a prepared folder for training and generation; `leon_jax.prepare` makes the folder.

Each shard, SPLIT-NNNNN, has these files:

    .array_record     documents with image codes; outside of a documents folder also stored images
    .documents.jsonl  key, source, licence, attribution, language and size of each document
    .rejects.jsonl    rejected documents and the reasons
    .neighbours.npy   for each record, the train documents that it may retrieve (`Neighbours`)
    .vectors.npy      `train` only: the rows that are searched (`VectorIndex`)
    .rows.npy         encodings of a documents folder only: the row of each document in the shard
                      that its images are in
    .variants.npy     `train` only, with --variants: the codes of several variants of each image

The folder also has manifest.json, card.md, card.html and removed.jsonl. Each line of removed.jsonl
has the source (or "" for any source) and the key of a removed document, which later runs leave out.
Rows are numbered through the shards of a split.
"""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Int32

from leon_jax import storage
from leon_jax.config import UserError, build
from leon_jax.data import document_folder, records
from leon_jax.data.document_folder import (
    DOCUMENTS_FORMAT,
    ENCODED,
    MANIFEST,
    PREPARED_FORMAT,
    TRAIN,
    DocumentFolder,
)
from leon_jax.data.image_variants import Variants
from leon_jax.data.records import JoinedSource, RecordSource
from leon_jax.documents import Document
from leon_jax.retrieval.neighbour_selection import SelectionConfig
from leon_jax.retrieval.neighbour_table import Neighbours, row_type
from leon_jax.retrieval.vector_index import VectorIndex, save_rows

FORMAT = PREPARED_FORMAT
_REMOVED = "removed.jsonl"
_KEYS = ("splits", "shards", "config", "sha256", "inputs", "counts")


class PreparedFolder(DocumentFolder):
    """Opens the files of a prepared folder.

    Attributes:
      manifest: beside `splits` and `shards`, it has `sha256` (digests of the model files; for
        weight files, of the contents), `config` and `counts`.

    Args:
      folder: a prepared folder, or a documents folder with a single encoding, which is opened.
      address: the path that it will have, if it is not there yet.

    Raises:
      UserError: the folder is not a prepared folder, is one of another version, or has several
        encodings.
    """

    NAME = "a prepared folder"
    FORMATS = (PREPARED_FORMAT,)

    def __init__(self, folder: str | os.PathLike, address: pathlib.Path | None = None):
        super().__init__(resolve(folder), address)

    @property
    def selection(self) -> SelectionConfig:
        """The configuration that its neighbours were selected with.

        Raises:
          UserError: the folder was not made by leon prepare.
        """
        if not self.manifest["config"]:
            raise UserError(f"{self.folder} was not made by leon prepare, so it cannot be searched")
        return build(SelectionConfig, self.manifest["config"]["selection"], "selection")

    def records(self, split: str = TRAIN, *, pixels: bool = True) -> RecordSource:
        """Opens the documents of a split, with random access.

        The images of an encoding are read from its documents folder. If that is missing, the
        documents have codes only.

        Args:
          split: name of the split.
          pixels: whether to read and decode the pixels of images.

        Raises:
          UserError: there is no such split, or a file is missing or damaged.
        """
        records = super().records(split, pixels=pixels)
        paths = self.paths(split, "rows.npy")
        documents = self.documents_folder if pixels and all(p.is_file() for p in paths) else None
        if documents is None or not paths:
            return records
        inputs = [self.manifest["inputs"][shard]["shard"] for shard in self.shards(split)]
        lengths = documents.shards(split)
        stored = RecordSource(
            [documents.folder / f"{name}.array_record" for name in inputs],
            lengths=[lengths[name] for name in inputs],
        )
        starts = np.cumsum([0, *(lengths[name] for name in inputs[:-1])])
        rows = [np.load(path) + start for path, start in zip(paths, starts, strict=True)]
        return JoinedSource(records, stored, np.concatenate(rows))

    @property
    def documents_folder(self) -> DocumentFolder | None:
        """The documents folder that this folder is an encoding of; None if it is not inside one."""
        for parent in list(storage.absolute(self.address).parents)[:4]:
            with contextlib.suppress(UserError):
                name, formats = DocumentFolder.NAME, (DOCUMENTS_FORMAT,)
                document_folder.read_manifest(parent, name, formats)
                return DocumentFolder(parent)
        return None

    def vector_index(self) -> VectorIndex:
        """Opens the vector index; row i belongs to record i of `train`."""
        return VectorIndex.open(self.paths(TRAIN, "vectors.npy"))

    def variants(self, source: RecordSource, split: str = TRAIN) -> Variants:
        """Returns the documents of a split, read from `source`, with variants of their images.

        Raises:
          UserError: the folder has no variants.
        """
        paths = self.paths(split, "variants.npy")
        if not all(path.is_file() for path in paths):
            raise UserError(
                f"{self.folder} has no variants of {split}; encode its documents with --variants"
            )
        return Variants([np.load(path, mmap_mode="r") for path in paths], source)

    def neighbours(self, split: str = TRAIN) -> Neighbours:
        """Opens the neighbour table of a split."""
        return Neighbours.open(self.paths(split, "neighbours.npy"))


def resolve(folder: str | os.PathLike) -> pathlib.Path:
    """Returns the only encoding of a documents folder; any other folder is returned as it is.

    Raises:
      UserError: the folder has several encodings.
    """
    folder = storage.path(folder)
    paths = encodings(folder)
    if len(paths) > 1:
        raise UserError(f"{folder} has several encodings; name one of {', '.join(map(str, paths))}")
    return paths[0] if paths else folder


def encodings(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the prepared folders inside a documents folder, sorted; none in other folders."""
    return sorted(path.parent for path in (folder / ENCODED).glob(f"[!.]*/{MANIFEST}"))


def read_manifest(folder: pathlib.Path) -> dict[str, Any]:
    """Reads the manifest of a prepared folder.

    Raises:
      UserError: there is no manifest, or it is of another version.
    """
    return document_folder.read_manifest(
        resolve(folder), PreparedFolder.NAME, PreparedFolder.FORMATS
    )


def read_removed(folder: pathlib.Path) -> set[tuple[str, str]]:
    """Reads the source (or "" for any) and the key of each document that was removed."""
    try:
        lines = (folder / _REMOVED).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return set()
    return {(source, key) for source, key in map(json.loads, lines)}


def write_removed(folder: pathlib.Path, removed: Iterable[tuple[str, str]]) -> None:
    """Writes the file that `read_removed` reads. An empty list writes no file."""
    if lines := [json.dumps(name) + "\n" for name in sorted(removed)]:
        temporary = folder / f"{_REMOVED}.tmp"
        temporary.write_text("".join(lines), encoding="ascii")
        os.replace(temporary, folder / _REMOVED)


def write_split(
    folder: str | os.PathLike,
    split: str,
    documents: Iterable[Document],
    ids: Int32[np.ndarray, "2 n k"] | None = None,
) -> None:
    """Adds a split of encoded documents to a prepared folder, in one shard.

    This is for data of another program. The documents are not checked, embedded or described, so
    training can use them, but retrieval cannot.

    Args:
      folder: created if it is missing.
      split: name of the split. A split of the same name is replaced.
      documents: with image codes.
      ids: the train documents that each document may retrieve, selected by its text and by its
        image, best first; -1 for none. None: writes no table of neighbours.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shard = f"{split}-00000"
    temporary = folder / f"{shard}.documents.jsonl.tmp"
    with temporary.open("w", encoding="utf-8") as listing:

        def documents_listed() -> Iterator[Document]:
            for document in documents:
                provenance = document.provenance.to_dict() if document.provenance else {}
                listing.write(json.dumps(provenance) + "\n")
                yield document

        count = records.write(folder / f"{shard}.array_record", documents_listed())
    os.replace(temporary, folder / f"{shard}.documents.jsonl")
    if ids is not None:
        table = np.zeros(count, row_type(ids.shape[-1]))
        table["by_text_ids"], table["by_image_ids"] = ids
        save_rows(folder / f"{shard}.neighbours.npy", table)
    manifest: dict[str, Any] = {name: {} for name in _KEYS} | {"format": FORMAT}
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder)
    manifest["splits"][split], manifest["shards"][split] = count, {shard: count}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
