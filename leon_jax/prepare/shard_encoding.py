"""The one unit of work of `leon prepare`: a shard of a source becomes a folder of its own.

    records.array_record   documents with stored pictures and image codes
    documents.jsonl        one line a record: key, source, licence, attribution, language, size
    document.npy           float16[n, d] unit rows: what is searched
    text.npy, image.npy    float16[n, d] unit rows: what searches
    content.npy, key.npy   uint8[n, 16], digests that tell repetitions
    rejects.jsonl          one line a record that is not used: key, reason, detail

The folder appears complete or not at all, and holds the same bytes whenever it is made (and
wherever, on machines of one kind: others round differently). A shard whose folder exists is done.
Any engine that can call a function for every shard can therefore run the work, and any part of it
again.
"""

import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Float32

from leon_jax.data import records
from leon_jax.data.sources.raw_record import Raw, Reject, Shards, SourceConfig
from leon_jax.documents import Document, Image, Text
from leon_jax.prepare.config import TRAIN, PrepareConfig
from leon_jax.prepare.encoding_models import load_models
from leon_jax.prepare.record_reader import Reader, Ready
from leon_jax.retrieval.encoder import normalise
from leon_jax.retrieval.selection import drop_tokens
from leon_jax.retrieval.vector_index import save_rows
from leon_jax.tokenizers.image import normalize

RECORDS, DOCUMENTS = "records.array_record", "documents.jsonl"
REJECTS = "rejects.jsonl"
# Encoded pictures held at a time; one more record than this may be.
_BLOCK_BYTES = 256 * 2**20
ARRAYS = ("document", "text", "image", "content", "key")


@dataclasses.dataclass(frozen=True)
class Shard:
    """One shard of one source.

    Attributes:
      name: of its folder, for example "train-00003".
      source: index into the sources.
      shard: what the source calls it.
    """

    name: str
    source: int
    shard: str


def plan(sources: Iterable[tuple[SourceConfig, Shards]]) -> list[Shard]:
    """All shards, numbered within their split in the order of the sources."""
    counts: dict[str, Iterator[int]] = {}
    return [
        Shard(f"{config.split}-{next(counts.setdefault(config.split, itertools.count())):05d}",
              number, shard)
        for number, (config, source) in enumerate(sources)
        for shard in source.shards()
    ]  # fmt: skip


class Worker:
    """The function that does a shard, and the models it needs.

    Args:
      config: what to do.
      sources: each with its configuration, in the order of `Shard.source`.
      folder: where the shards' folders go; it exists.
      report: told after every block how many documents and rejects it had.

    Raises:
      UserError: a model file is missing or damaged.
    """

    def __init__(
        self,
        config: PrepareConfig,
        sources: list[tuple[SourceConfig, Shards]],
        folder: str,
        report: Callable[[int, int], None] = lambda documents, rejects: None,
    ):
        self.config, self.sources, self.folder = config, sources, pathlib.Path(folder)
        self.report = report
        self.models = load_models(config.tokenizer, config.encoder, config.text)

    def __call__(self, shard: Shard) -> dict[str, int]:
        """Does a shard, unless it is done; returns how many documents it has, and rejects."""
        done = self.folder / shard.name
        if not done.is_dir():
            staging = pathlib.Path(tempfile.mkdtemp(dir=self.folder, prefix=f".{shard.name}."))
            try:
                with jax.set_mesh(self.models.mesh):
                    self._write(shard, staging)
                os.chmod(staging, 0o755)  # mkdtemp makes a folder that only its owner can read
                _put(staging, done)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
        return {
            "documents": count_lines(done / DOCUMENTS),
            "rejects": count_lines(done / REJECTS),
        }

    def _write(self, shard: Shard, folder: pathlib.Path) -> None:
        config, source = self.sources[shard.source]
        config = dataclasses.replace(config, name=self.config.titles[shard.source])
        models = self.models
        reader = Reader(
            self.config,
            config,
            resolution=models.tokenizer.resolution,
            codes=int(np.prod(models.tokenizer.shape)),
            preprocess=models.encoder.preprocess,
            count_tokens=lambda text: len(models.text.encode(text)),
        )
        nothing = {"content": np.zeros((0, 16), np.uint8), "key": np.zeros((0, 16), np.uint8)}
        unit = np.zeros((0, models.encoder.dimensions), np.float16)
        rows = {name: [nothing.get(name, unit)] for name in ARRAYS}
        train = config.split == TRAIN
        with (
            (folder / DOCUMENTS).open("w", encoding="utf-8") as listing,
            (folder / REJECTS).open("w", encoding="utf-8") as rejects,
            concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads,
        ):

            def documents() -> Iterator[Document]:
                for block in _blocks(source.read(shard.shard), self.config.block):
                    ready: list[Ready] = []
                    for result in threads.map(reader, block):
                        if isinstance(result, Reject):
                            rejects.write(line(dataclasses.asdict(result)))
                        else:
                            ready.append(result)
                    self.report(len(ready), len(block) - len(ready))
                    if not ready:
                        continue
                    encoded = self._codes(ready)
                    for name, array in self._rows(ready, train).items():
                        rows[name].append(array)
                    for document, result in zip(encoded, ready, strict=True):
                        listing.write(line(describe(document, result.size)))
                        yield document

            records.write(folder / RECORDS, documents())
        for name, arrays in rows.items():
            save_rows(folder / f"{name}.npy", np.concatenate(arrays))

    def _codes(self, ready: list[Ready]) -> list[Document]:
        """The documents with the codes of every picture beside its pixels."""
        squares = [square for one in ready for square in one.squares]
        codes = iter(self.models.tokenizer.encode(normalize(np.stack(squares))))
        documents = []
        for one in ready:
            parts = [
                Image(part.pixels, next(codes)) if isinstance(part, Image) else part
                for part in one.document.parts
            ]
            documents.append(dataclasses.replace(one.document, parts=tuple(parts)))
        return documents

    def _rows(self, ready: list[Ready], train: bool) -> dict[str, np.ndarray]:
        """The arrays of these documents, by the names of their files.

        In training a fifth of the query's tokens is dropped (CM3Leon, section 2.1), drawn anew for
        every document from its key.
        """
        encoder, selection = self.models.encoder, self.config.selection
        views = [view for one in ready for view in one.views]
        owner = [row for row, one in enumerate(ready) for _ in one.views]
        image = np.zeros((len(ready), encoder.dimensions), np.float32)
        np.add.at(image, owner, encoder.embed_preprocessed(views))
        image = normalise(image)
        texts = [one.document.text for one in ready]
        text = encoder.embed_texts(texts)
        keys = [_name(one.document) for one in ready]
        if train and selection.query_dropout:
            dropped = [
                drop_tokens(words, encoder.text, selection.query_dropout,
                            np.random.default_rng([selection.seed, *key]))
                for words, key in zip(texts, keys, strict=True)
            ]  # fmt: skip
            asking = encoder.embed_texts(dropped)
        else:
            asking = text
        return {
            "document": _half(normalise(text + image)),
            "text": _half(asking),
            "image": _half(image),
            "content": np.stack([_content(one.document) for one in ready]),
            "key": np.stack(keys),
        }


def _blocks(records: Iterable[Raw | Reject], count: int) -> Iterator[list[Raw | Reject]]:
    """Lists of at most `count` records, fewer where their bytes would fill the memory."""
    block: list[Raw | Reject] = []
    size = 0
    for record in records:
        block.append(record)
        size += sum(map(len, record.parts)) if isinstance(record, Raw) else 0
        if len(block) == count or size > _BLOCK_BYTES:
            yield block
            block, size = [], 0
    if block:
        yield block


def describe(document: Document, size: tuple[int, int]) -> dict[str, Any]:
    """What `documents.jsonl` says of a document."""
    provenance = document.provenance
    assert provenance is not None, "prepared documents have a provenance"
    return vars(provenance) | {"size": list(size)}


def count_lines(path: pathlib.Path) -> int:
    """How many lines a file has."""
    with path.open("rb") as file:
        return sum(1 for _ in file)


def _name(document: Document) -> np.ndarray:
    provenance = document.provenance
    assert provenance is not None
    return _digest(provenance.source.encode(), provenance.key.encode())


def _content(document: Document) -> np.ndarray:
    """A digest of all texts and stored pictures, which exact copies share."""
    pieces: list[bytes] = []
    for part in document.parts:
        if isinstance(part, Text):
            pieces.append(part.text.encode())
        elif isinstance(part, Image) and part.pixels is not None:
            pieces += [str(part.pixels.shape).encode(), part.pixels.tobytes()]
    return _digest(*pieces)


def _digest(*pieces: bytes) -> np.ndarray:
    """uint8[16] of a list of byte strings; no two lists run together."""
    digest = hashlib.blake2b(digest_size=16)
    for piece in pieces:
        digest.update(len(piece).to_bytes(8, "little") + piece)
    return np.frombuffer(digest.digest(), np.uint8)


def _half(rows: Float32[np.ndarray, "n d"]) -> np.ndarray:
    return rows.astype(np.float16)


def line(fields: dict[str, Any]) -> str:
    """One line of a JSONL file, ASCII alone, so that lines are what everybody takes for lines."""
    return json.dumps(fields, ensure_ascii=True) + "\n"


def _put(staging: pathlib.Path, done: pathlib.Path) -> None:
    """Puts a finished folder in place; one that another process finished first is as good."""
    try:
        os.rename(staging, done)
    except OSError:
        if not done.is_dir():
            raise
