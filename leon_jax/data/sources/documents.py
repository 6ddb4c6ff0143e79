"""Reads a documents folder, or a prepared folder with pixels, as a source."""

from collections.abc import Iterator
from typing import Any

from leon_jax.config import UserError
from leon_jax.data.document_folder import TRAIN, DocumentFolder
from leon_jax.data.records import RecordSource, to_png
from leon_jax.data.sources.files import fingerprint
from leon_jax.data.sources.raw_record import RawRecord, Reject, SourceConfig
from leon_jax.documents import Document, Image, Text


class Documents:
    """A source of one split of a documents folder. A shard is a shard of the folder.

    The codes of a prepared folder are not used.

    Raises:
      UserError: `path` is neither folder, or lacks the split.
    """

    def __init__(self, config: SourceConfig):
        self.config = config
        self.folder = DocumentFolder(config.path)
        self.split = config.read_split or config.split or TRAIN
        self.folder.shards(self.split)

    def __getstate__(self) -> dict[str, Any]:
        """Another process opens the folder itself: its copy of a folder in a bucket is its own."""
        return {"config": self.config}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def shards(self) -> list[str]:
        """Returns the names of the folder's shards, in row order."""
        return list(self.folder.shards(self.split))

    def version(self, shard: str) -> str:
        """Returns a fingerprint of the shard's records."""
        return fingerprint([str(self.folder.folder / f"{shard}.array_record")])

    def read(self, shard: str) -> Iterator[RawRecord | Reject]:
        """Yields the documents of a shard, in row order."""
        path = self.folder.folder / f"{shard}.array_record"
        source = RecordSource(path, lengths=[self.folder.shards(self.split)[shard]])
        for row in range(len(source)):
            try:
                yield _raw_record(source[row])
            except UserError as error:
                yield Reject(f"{shard}/{row}", "unreadable_record", str(error))


def _raw_record(document: Document) -> RawRecord:
    provenance = document.provenance
    if provenance is None:
        raise UserError("the document has no provenance")
    parts: list[str | bytes] = []
    for part in document.parts:
        if isinstance(part, Text):
            parts.append(part.text)
        elif isinstance(part, Image) and part.pixels is not None:
            parts.append(to_png(part.pixels))
        else:
            raise UserError("the document has a hole, or an image without pixels")
    return RawRecord(
        provenance.key,
        tuple(parts),
        licence=provenance.licence,
        attribution=provenance.attribution,
        language=provenance.language,
        origin=provenance.source,
        group=provenance.group,
        captions=provenance.captions,
        family=provenance.family,
    )
