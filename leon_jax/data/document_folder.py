"""Reads the documents of a documents folder or of a prepared folder.

A documents folder has no codes, vectors or neighbours; tokenizers and encoders train on it. Each
shard, SPLIT-NNNNN, has these files:

    .array_record     documents with stored images
    .documents.jsonl  key, source, licence, attribution, language, group, size and picture (a digest
                      of the stored images) of each document
    .rejects.jsonl    rejected records and the reasons

The folder also has manifest.json, card.md, card.html and removed.jsonl. `leon encode` writes
prepared folders into encoded/. A prepared folder also holds documents, which are read in the same
way.
"""

import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any, ClassVar

from leon_jax import storage
from leon_jax.config import UserError
from leon_jax.data.records import RecordSource

MANIFEST = "manifest.json"
# The folder inside a documents folder that `leon encode` writes its prepared folders into.
ENCODED = "encoded"
# Formats of the manifest: of documents folders, and of prepared folders.
DOCUMENTS_FORMAT, PREPARED_FORMAT = 4, 3
TRAIN = "train"


class DocumentFolder:
    """The documents of a documents folder, or of a prepared folder.

    Attributes:
      address: its path.
      folder: the same; of a folder in a bucket, the path of its copy on the disk.
      manifest: `splits` (documents in each), `shards` (documents in each shard of each split),
        `config`, `counts`.

    Args:
      folder: the folder.
      address: the path that it will have, if it is not there yet.

    Raises:
      UserError: the folder is neither, or is one of another version.
    """

    # What messages call such a folder, and the formats of manifest.json that are read.
    NAME: ClassVar[str] = "a documents folder"
    FORMATS: ClassVar[tuple[int, ...]] = (DOCUMENTS_FORMAT, PREPARED_FORMAT)

    def __init__(self, folder: str | os.PathLike, address: pathlib.Path | None = None):
        self.address = storage.path(folder) if address is None else address
        self.folder = storage.local(folder, without=ENCODED)
        self.manifest = read_manifest(self.folder, self.NAME, self.FORMATS)

    @property
    def splits(self) -> dict[str, int]:
        """The number of documents of each split."""
        return self.manifest["splits"]

    def shards(self, split: str) -> dict[str, int]:
        """Returns the shards of a split: the number of documents by shard name.

        Raises:
          UserError: there is no such split.
        """
        splits = self.manifest["shards"]
        if split not in splits:
            raise UserError(
                f"{self.folder} has no split {split!r}; its splits are {', '.join(splits)}"
            )
        return splits[split]

    def paths(self, split: str, ending: str) -> list[pathlib.Path]:
        """Returns the paths of one kind of file of a split, in row order.

        Raises:
          UserError: there is no such split.
        """
        return [self.folder / f"{shard}.{ending}" for shard in self.shards(split)]

    def listing(self, split: str = TRAIN) -> Iterator[dict[str, Any]]:
        """Yields the lines of `.documents.jsonl` of a split, one for each document, in order.

        Raises:
          UserError: there is no such split, or a file cannot be read.
        """
        for path in self.paths(split, "documents.jsonl"):
            try:
                file = path.open(encoding="utf-8")
            except OSError as error:
                raise UserError(f"cannot read {path}: {error.strerror}") from error
            with file:
                yield from map(json.loads, file)

    def records(self, split: str = TRAIN, *, pixels: bool = True) -> RecordSource:
        """Opens the documents of a split, with random access.

        Args:
          split: name of the split.
          pixels: whether to decode the pixels of images that have codes.

        Raises:
          UserError: there is no such split, or a file is missing or damaged.
        """
        lengths = self.shards(split).values()
        return RecordSource(self.paths(split, "array_record"), pixels=pixels, lengths=[*lengths])


def read_manifest(folder: pathlib.Path, name: str, formats: tuple[int, ...]) -> dict[str, Any]:
    """Reads the manifest of a documents folder or of a prepared folder.

    Args:
      folder: the folder.
      name: what the message calls such a folder, for example "a documents folder".
      formats: the formats that the caller can read.

    Raises:
      UserError: there is no manifest, or it has another format.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        version = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder} is not {name} (it has no {MANIFEST} that can be read); "
            "make one with leon prepare"
        ) from error
    if version == DOCUMENTS_FORMAT and version not in formats:
        raise UserError(f"{folder} has documents without codes; run: leon encode --folder={folder}")
    if version not in formats:
        raise UserError(
            f"{folder} was written by another version (its format is {version}, this one reads "
            f"{', '.join(map(str, formats))}); run leon prepare again"
        )
    return manifest
