"""Encodes one shard of a source into a folder; this is the unit of work of `leon prepare`.

    records.array_record   documents with stored images and, with models, image codes
    documents.jsonl        one line per document: key, source, licence, ..., size, picture
    content.npy, key.npy   uint8[n, 16] digests that identify duplicates
    picture.npy, group.npy uint8[n, 16] digests of the stored images, and of the group
    rejects.jsonl          one line per rejected record: key, reason, detail
    row.npy                int32[n], the number of each record in its source shard, if the records
                           have no images (`PrepareConfig.pixels`)

With models also

    document.npy           float16[n, d] unit rows, the vectors that are searched
    text.npy, image.npy    float16[n, d] unit rows, the query vectors

A folder is renamed into place once it is complete, so a shard whose folder exists is complete.
Encoding is deterministic on one kind of machine (other kinds round differently). Any engine that
calls a function for each shard can therefore run the work, and can repeat any part of it.
"""

import concurrent.futures
import contextlib
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

from leon_jax import storage
from leon_jax.data import records
from leon_jax.data.sources.raw_record import RawRecord, Reject, ShardedSource, SourceConfig
from leon_jax.documents import Document, Image, Text
from leon_jax.prepare.config import HELD_OUT, TRAIN, PrepareConfig
from leon_jax.prepare.encoding_models import Models, load_models
from leon_jax.prepare.record_reader import ModelInputs, PreprocessedDocument, RecordReader
from leon_jax.retrieval.encoder import normalise
from leon_jax.retrieval.neighbour_selection import drop_tokens
from leon_jax.retrieval.vector_index import save_rows
from leon_jax.tokenizers.image import normalize

RECORDS, DOCUMENTS = "records.array_record", "documents.jsonl"
REJECTS = "rejects.jsonl"
_LAST = DOCUMENTS
# A block of records ends once its encoded images exceed this size.
_BLOCK_BYTES = 256 * 2**20
VECTORS = ("document", "text", "image")
DIGESTS = ("content", "key", "picture", "group")
ROWS = "row.npy"


@dataclasses.dataclass(frozen=True)
class Shard:
    """One shard of one source.

    Attributes:
      name: name of its folder, for example "train-00003".
      source: index into the sources.
      shard: name of the shard in its source.
      held_out_name: name of the shard of its held-out documents; "" if none are held out.
    """

    name: str
    source: int
    shard: str
    held_out_name: str = ""


def plan(
    sources: Iterable[tuple[SourceConfig, ShardedSource]], holds_out: bool = False
) -> list[Shard]:
    """Returns all shards, numbered within their split in the order of the sources.

    Args:
      sources: the sources and their configurations.
      holds_out: whether documents of sources without a split are held out.
    """
    counts: dict[str, Iterator[int]] = {}

    def next_name(split: str) -> str:
        return f"{split}-{next(counts.setdefault(split, itertools.count())):05d}"

    return [
        Shard(
            next_name(config.split or TRAIN),
            number,
            shard,
            next_name(HELD_OUT) if holds_out and not config.split else "",
        )
        for number, (config, source) in enumerate(sources)
        for shard in source.shards()
    ]


class Worker:
    """Reads shards and, with models, encodes them; it holds the models.

    Args:
      config: the configuration.
      sources: the sources with their configurations, indexed by `Shard.source`.
      folder: existing folder for the folders of the shards.
      report: called after each block with its numbers of documents and rejects.

    Raises:
      UserError: a model file is missing or damaged.
    """

    def __init__(
        self,
        config: PrepareConfig,
        sources: list[tuple[SourceConfig, ShardedSource]],
        folder: str,
        report: Callable[[int, int], None] = lambda documents, rejects: None,
    ):
        self.config, self.sources, self.folder = config, sources, storage.path(folder)
        self.report = report
        self.models = (
            load_models(config.tokenizer, config.encoder, config.text)
            if config.has_models
            else None
        )

    def __call__(self, shard: Shard) -> dict[str, int]:
        """Encodes a shard unless it is complete.

        Returns:
          The numbers of its "documents" and "rejects".
        """
        path = self.folder / shard.name
        if not is_complete(path):
            parent = None if storage.is_bucket(path) else self.folder
            staging = pathlib.Path(tempfile.mkdtemp(dir=parent, prefix=f".{shard.name}."))
            try:
                with jax.set_mesh(self.models.mesh) if self.models else contextlib.nullcontext():
                    self._write(shard, staging)
                os.chmod(staging, 0o755)  # only the owner can read the folders of mkdtemp
                _publish(staging, path)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
        return {
            "documents": count_lines(path / DOCUMENTS),
            "rejects": count_lines(path / REJECTS),
        }

    def _write(self, shard: Shard, folder: pathlib.Path) -> None:
        config, source = self.sources[shard.source]
        config = dataclasses.replace(config, name=self.config.titles[shard.source])
        models = self.models
        reader = RecordReader(
            self.config, config, None if models is None else _model_inputs(models)
        )
        # Empty first chunks give the arrays of a shard without documents their shapes and dtypes.
        chunks: dict[str, list[np.ndarray]] = {
            name: [np.zeros((0, 16), np.uint8)] for name in DIGESTS
        }
        if models is not None:
            vectors = np.zeros((0, models.encoder.dimensions), np.float16)
            chunks |= {name: [vectors] for name in VECTORS}
        train = (config.split or TRAIN) == TRAIN
        source_rows: list[int] = []
        with (
            (folder / DOCUMENTS).open("w", encoding="utf-8") as listing,
            (folder / REJECTS).open("w", encoding="utf-8") as rejects,
            concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads,
        ):

            def read_documents() -> Iterator[Document]:
                start = 0
                for block in _blocks(source.read(shard.shard), self.config.block):
                    batch: list[PreprocessedDocument] = []
                    for row, result in enumerate(threads.map(reader, block), start):
                        if isinstance(result, Reject):
                            rejects.write(line(dataclasses.asdict(result)))
                        else:
                            batch.append(result)
                            source_rows.append(row)
                    start += len(block)
                    self.report(len(batch), len(block) - len(batch))
                    if not batch:
                        continue
                    documents = [item.document for item in batch]
                    digests = _digests(documents)
                    arrays = {name: np.stack(rows) for name, rows in digests.items()}
                    if models is not None:
                        documents = _encode_images(models, batch, self.config.pixels)
                        arrays |= self._vectors(models, batch, arrays["key"], train)
                    for name, array in arrays.items():
                        chunks[name].append(array)
                    for document, result, picture in zip(
                        documents, batch, digests["picture"], strict=True
                    ):
                        listing.write(line(describe(document, result.size, picture.tobytes())))
                        yield document

            records.write(folder / RECORDS, read_documents())
        for name, arrays in chunks.items():
            save_rows(folder / f"{name}.npy", np.concatenate(arrays))
        if not self.config.pixels:
            save_rows(folder / ROWS, np.array(source_rows, np.int32))

    def _vectors(
        self, models: Models, batch: list[PreprocessedDocument], keys: np.ndarray, train: bool
    ) -> dict[str, np.ndarray]:
        """Returns the embeddings of documents, by the names in `VECTORS`.

        For train documents a fraction `selection.query_dropout` of the tokens of the query text is
        dropped (CM3Leon, section 2.1). The document's key, uint8[16] in `keys`, seeds the random
        choice.
        """
        encoder, selection = models.encoder, self.config.selection
        encoder_inputs = [array for item in batch for array in item.encoder_inputs]
        rows = [row for row, item in enumerate(batch) for _ in item.encoder_inputs]
        image = np.zeros((len(batch), encoder.dimensions), np.float32)
        np.add.at(image, rows, encoder.embed_preprocessed(encoder_inputs))
        image = normalise(image)
        texts = [item.document.text for item in batch]
        text = encoder.embed_texts(texts)
        if train and selection.query_dropout:
            query_texts = [
                drop_tokens(document_text, encoder.text, selection.query_dropout,
                            np.random.default_rng([selection.seed, *key]))
                for document_text, key in zip(texts, keys, strict=True)
            ]  # fmt: skip
            query = encoder.embed_texts(query_texts)
        else:
            query = text
        return {
            "document": _half(normalise(text + image)),
            "text": _half(query),
            "image": _half(image),
        }


def _model_inputs(models: Models) -> ModelInputs:
    return ModelInputs(
        resolution=models.tokenizer.resolution,
        codes=int(np.prod(models.tokenizer.shape)),
        preprocess=models.encoder.preprocess,
        count_tokens=lambda text: len(models.text.encode(text)),
    )


def _encode_images(
    models: Models, batch: list[PreprocessedDocument], pixels: bool
) -> list[Document]:
    """Returns the documents with image codes beside the pixels of every image, or without them."""
    squares = [square for item in batch for square in item.squares]
    codes = iter(models.tokenizer.encode(normalize(np.stack(squares))))
    documents = []
    for item in batch:
        parts = [
            Image(part.pixels if pixels else None, next(codes)) if isinstance(part, Image) else part
            for part in item.document.parts
        ]
        documents.append(dataclasses.replace(item.document, parts=tuple(parts)))
    return documents


def _digests(documents: list[Document]) -> dict[str, list[np.ndarray]]:
    """Returns the digests of documents by the names in `DIGESTS`.

    The group is the family, if the document has one; without both it is that of its images.
    """
    pictures = [_picture_digest(document) for document in documents]
    groups = []
    for document, picture in zip(documents, pictures, strict=True):
        provenance = document.provenance
        assert provenance is not None
        group = provenance.family or provenance.group
        groups.append(_digest(group.encode()) if group else picture)
    return {
        "content": [_content_digest(document) for document in documents],
        "key": [_key_digest(document) for document in documents],
        "picture": pictures,
        "group": groups,
    }


def _blocks(
    records: Iterable[RawRecord | Reject], count: int
) -> Iterator[list[RawRecord | Reject]]:
    """Yields blocks of at most `count` records, fewer if their images exceed `_BLOCK_BYTES`."""
    block: list[RawRecord | Reject] = []
    size = 0
    for record in records:
        block.append(record)
        size += sum(map(len, record.parts)) if isinstance(record, RawRecord) else 0
        if len(block) == count or size > _BLOCK_BYTES:
            yield block
            block, size = [], 0
    if block:
        yield block


def describe(document: Document, size: tuple[int, int], picture: bytes) -> dict[str, Any]:
    """Returns the fields of a document's line in `documents.jsonl`.

    Args:
      document: a document with a provenance.
      size: (width, height) of its first original image in pixels.
      picture: the digest of its stored images, 16 bytes.
    """
    provenance = document.provenance
    assert provenance is not None, "documents of a source have a provenance"
    return provenance.to_dict() | {"size": list(size), "picture": picture.hex()}


def count_lines(path: pathlib.Path) -> int:
    """Returns the number of lines of a file."""
    with path.open("rb") as file:
        return sum(1 for _ in file)


def _key_digest(document: Document) -> np.ndarray:
    """Returns uint8[16], a digest of the source and key of a document."""
    provenance = document.provenance
    assert provenance is not None
    return _digest(provenance.source.encode(), provenance.key.encode())


def _content_digest(document: Document) -> np.ndarray:
    """Returns uint8[16], a digest of all texts and stored images, equal for exact duplicates."""
    pieces: list[bytes] = []
    for part in document.parts:
        if isinstance(part, Text):
            pieces.append(part.text.encode())
        elif isinstance(part, Image) and part.pixels is not None:
            pieces += [str(part.pixels.shape).encode(), part.pixels.tobytes()]
    return _digest(*pieces)


def _picture_digest(document: Document) -> np.ndarray:
    """Returns uint8[16], a digest of all stored images, in order."""
    pieces: list[bytes] = []
    for part in document.parts:
        if isinstance(part, Image) and part.pixels is not None:
            pieces += [str(part.pixels.shape).encode(), part.pixels.tobytes()]
    return _digest(*pieces)


def _digest(*pieces: bytes) -> np.ndarray:
    """Returns uint8[16], a digest of byte strings that also covers their boundaries."""
    digest = hashlib.blake2b(digest_size=16)
    for piece in pieces:
        digest.update(len(piece).to_bytes(8, "little") + piece)
    return np.frombuffer(digest.digest(), np.uint8)


def _half(rows: Float32[np.ndarray, "n d"]) -> np.ndarray:
    return rows.astype(np.float16)


def line(fields: dict[str, Any]) -> str:
    """Returns a line of a JSONL file, in ASCII, as some readers split lines at Unicode breaks."""
    return json.dumps(fields, ensure_ascii=True) + "\n"


def is_complete(folder: pathlib.Path) -> bool:
    """Returns whether the folder of a shard has all its files. In a bucket `_LAST` is the last."""
    return (folder / _LAST).is_file() if storage.is_bucket(folder) else folder.is_dir()


def _publish(staging: pathlib.Path, path: pathlib.Path) -> None:
    """Renames or copies a complete folder to `path`, unless another process was first."""
    if storage.is_bucket(path):
        storage.upload(staging, path, _LAST)
        return
    try:
        os.rename(staging, path)
    except OSError:
        if not path.is_dir():
            raise
