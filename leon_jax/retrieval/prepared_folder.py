"""A prepared folder, as training and answering read it; `leon_jax.prepare` makes it.

For every shard, SPLIT-NNNNN:

    .array_record     documents with stored pictures and image codes
    .documents.jsonl  key, source, licence, attribution, language and size of each
    .rejects.jsonl    what was not used, and why
    .neighbours.npy   for each record, the train documents it may read (`Neighbours`)
    .vectors.npy      of `train`: the rows that are searched (`VectorIndex`)
    .variants.npy     of `train`, if asked for: the codes of each picture in several variants

and for all manifest.json, card.md, card.html, and removed.jsonl (what was removed and stays away: a
source, or "" for any, and a key a line). Rows are numbered through the shards of a split.
"""

import json
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Int32

from leon_jax.config import UserError, build
from leon_jax.data import records
from leon_jax.data.image_variants import Variants
from leon_jax.data.records import RecordSource
from leon_jax.documents import Document
from leon_jax.retrieval.neighbour_table import Neighbours, row_type
from leon_jax.retrieval.selection import SelectionConfig
from leon_jax.retrieval.vector_index import VectorIndex, save_rows

FORMAT = 3
MANIFEST = "manifest.json"
TRAIN = "train"
_REMOVED = "removed.jsonl"
_KEYS = ("splits", "shards", "config", "sha256", "inputs", "counts")


class PreparedFolder:
    """The files of a prepared folder by what they are.

    Attributes:
      folder: where it is.
      manifest: `splits` (documents in each), `shards` (documents in each shard of each split),
        `sha256` (digests of the models; of weight files, of their contents), `config`, `counts`.

    Raises:
      UserError: the folder is not a prepared one, or one of an older version.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = pathlib.Path(folder)
        self.manifest = read_manifest(self.folder)

    @property
    def selection(self) -> SelectionConfig:
        """How its neighbours were found.

        Raises:
          UserError: they were not found by leon prepare.
        """
        if not self.manifest["config"]:
            raise UserError(f"{self.folder} was not made by leon prepare, so it cannot be searched")
        return build(SelectionConfig, self.manifest["config"]["selection"], "selection")

    def shards(self, split: str) -> dict[str, int]:
        """The shards of a split by name, and how many documents each has.

        Raises:
          UserError: there is no such split.
        """
        found = self.manifest["shards"]
        if split not in found:
            raise UserError(
                f"{self.folder} has no split {split!r}; its splits are {', '.join(found)}"
            )
        return found[split]

    def paths(self, split: str, ending: str) -> list[pathlib.Path]:
        """The files of one kind of a split, in the order of their rows."""
        return [self.folder / f"{shard}.{ending}" for shard in self.shards(split)]

    def listing(self, split: str = TRAIN) -> Iterator[dict[str, Any]]:
        """What `.documents.jsonl` says of the documents of a split, in their order."""
        for path in self.paths(split, "documents.jsonl"):
            try:
                file = path.open(encoding="utf-8")
            except OSError as error:
                raise UserError(f"cannot read {path}: {error.strerror}") from error
            with file:
                yield from map(json.loads, file)

    def records(self, split: str = TRAIN, *, pixels: bool = True) -> RecordSource:
        """The documents of a split."""
        lengths = self.shards(split).values()
        return RecordSource(self.paths(split, "array_record"), pixels=pixels, lengths=[*lengths])

    def bank(self) -> VectorIndex:
        """What is searched: row i is record i of `train`."""
        return VectorIndex.open(self.paths(TRAIN, "vectors.npy"))

    def variants(self, source: RecordSource, split: str = TRAIN) -> Variants:
        """The documents of a split, read from `source`, as their variants show them.

        Raises:
          UserError: the folder was prepared without variants.
        """
        paths = self.paths(split, "variants.npy")
        if not all(path.is_file() for path in paths):
            raise UserError(
                f"{self.folder} holds no variants of {split}; prepare it with --variants"
            )
        return Variants([np.load(path, mmap_mode="r") for path in paths], source)

    def neighbours(self, split: str = TRAIN) -> Neighbours:
        """The table of a split."""
        return Neighbours.open(self.paths(split, "neighbours.npy"))


def read_manifest(folder: pathlib.Path) -> dict[str, Any]:
    """The manifest of a prepared folder.

    Raises:
      UserError: there is none, or it is of another version.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        found = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder} is not a prepared folder (it has no {MANIFEST} that can be read); "
            "make one with leon prepare"
        ) from error
    if found != FORMAT:
        raise UserError(
            f"{folder} was prepared by another version (its format is {found}, this one reads "
            f"{FORMAT}); run leon prepare again"
        )
    return manifest


def read_removed(folder: pathlib.Path) -> set[tuple[str, str]]:
    """What was removed from a prepared folder: sources (or "" for any) and keys."""
    try:
        lines = (folder / _REMOVED).read_text(encoding="ascii").splitlines()
    except FileNotFoundError:
        return set()
    return {(source, key) for source, key in map(json.loads, lines)}


def write_removed(folder: pathlib.Path, removed: Iterable[tuple[str, str]]) -> None:
    """Writes what `read_removed` reads; no file where there is nothing."""
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
    """Adds a split of documents that have codes already to a prepared folder, in one shard.

    For data that another program made: nothing is checked, embedded or said of it, so it can be
    trained on, but not retrieved from.

    Args:
      folder: made if missing.
      split: its name; one of the same name is replaced.
      documents: with codes.
      ids: the train documents that each may read, found by its text and by its picture, best first,
        -1 for none; None: there is no table of neighbours.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shard = f"{split}-00000"
    temporary = folder / f"{shard}.documents.jsonl.tmp"
    with temporary.open("w", encoding="utf-8") as listing:

        def listed() -> Iterator[Document]:
            for document in documents:
                said = vars(document.provenance) if document.provenance else {}
                listing.write(json.dumps(said) + "\n")
                yield document

        count = records.write(folder / f"{shard}.array_record", listed())
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
