"""A source of documents in a sequence, for tests."""

import hashlib
from collections.abc import Iterator

from leon_jax.data.records import to_bytes, to_png
from leon_jax.data.sources.raw_record import RawRecord, Reject
from leon_jax.documents import Image, Source, Text


class Listed:
    """A source of documents that have a provenance, and images with pixels.

    Args:
      documents: a sequence of documents.
      shard_size: number of documents per shard.
    """

    def __init__(self, documents: Source, shard_size: int = 10_000):
        self.documents, self.shard_size = documents, shard_size

    def shards(self) -> list[str]:
        """Returns the names of all shards, ranges `start-stop`."""
        count, size = len(self.documents), self.shard_size
        return [f"{start}-{min(start + size, count)}" for start in range(0, count, size)]

    def version(self, shard: str) -> str:
        """Returns a digest of the documents."""
        digest = hashlib.sha256()
        for index in self._range(shard):
            digest.update(to_bytes(self.documents[index]))
        return digest.hexdigest()

    def read(self, shard: str) -> Iterator[RawRecord | Reject]:
        """Yields the records of a range of documents."""
        for index in self._range(shard):
            document = self.documents[index]
            provenance = document.provenance
            if provenance is None:
                yield Reject(f"document {index}", "missing_field", "it has no provenance")
                continue
            parts: list[str | bytes] = []
            for part in document.parts:
                if isinstance(part, Text):
                    parts.append(part.text)
                elif isinstance(part, Image) and part.pixels is not None:
                    parts.append(to_png(part.pixels))
            if len(parts) < len(document.parts):
                yield Reject(provenance.key, "missing_field", "a part has neither text nor pixels")
                continue
            fields = dict(vars(provenance))
            yield RawRecord(parts=tuple(parts), origin=fields.pop("source"), **fields)

    def _range(self, shard: str) -> range:
        start, stop = map(int, shard.split("-"))
        return range(start, stop)
