"""Turns the splits of a source into the folder that the decoder is trained from.

    {split}.array_record            documents with pixels and image codes, in the source's order
    index.safetensors               embeddings of the train documents, row i for record i
    neighbours_{split}.safetensors  for each record, rows of train to retrieve
    manifest.json                   counts, settings, and the SHA-256 of every model file used

Only `train` is indexed: what is held out is never retrieved. The folder appears complete or not at
all, and preparing again with the same inputs does nothing.
"""

import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from tqdm import tqdm

from leon_jax.config import UserError, to_dict
from leon_jax.data import emoji, records, variants
from leon_jax.documents import Document, Image, Source
from leon_jax.retrieval.encoder import Encoder
from leon_jax.retrieval.selection import SelectionConfig, build_neighbours, embed_views, origin
from leon_jax.tokenizers.image import ImageTokenizer
from leon_jax.tokenizers.text import TextTokenizer

FORMAT = 1
MANIFEST = "manifest.json"
TRAIN = "train"


def prepare(
    data_dir: str | os.PathLike,
    out_dir: str | os.PathLike,
    tokenizer_path: str | os.PathLike,
    encoder_path: str | os.PathLike,
    text_path: str | os.PathLike,
    *,
    selection: SelectionConfig | None = None,
    sources: Mapping[str, Source] | None = None,
    variant_count: int = 1,
    progress: bool = True,
) -> dict[str, Any]:
    """Prepares the emoji dataset, or other sources, for training with retrieval.

    Args:
      data_dir: the emoji dataset (see `leon_jax.data.emoji`).
      out_dir: where the prepared folder goes; an older one with other inputs is replaced.
      tokenizer_path: `tokenizer.safetensors`, which turns pictures into codes.
      encoder_path: `encoder.safetensors`, which embeds.
      text_path: the text tokenizer that the encoder was trained with.
      selection: how neighbours are chosen.
      sources: documents by split, `train` among them, instead of the emoji dataset.
      variant_count: how many variants of the train pictures are encoded beside them, for training
        (see `leon_jax.data.variants`); 1: none.
      progress: whether to show progress bars.

    Returns:
      The manifest.

    Raises:
      UserError: a file is missing, `train` is missing, a document lacks text or pixels, or
        `out_dir` is a folder that is not a prepared one.
    """
    selection = selection or SelectionConfig()
    out = pathlib.Path(out_dir)
    if sources is None:
        sources = {split: emoji.EmojiSource(split, data_dir) for split in emoji.SPLITS}
    if TRAIN not in sources:
        raise UserError(f"there is no split {TRAIN!r} among {', '.join(sources)}; it is the index")
    paths = {"tokenizer": tokenizer_path, "encoder": encoder_path, "text": text_path}
    wanted = {
        "format": FORMAT,
        "splits": {split: len(source) for split, source in sources.items()},
        "sources": {split: _fingerprint(source) for split, source in sources.items()},
        "sha256": {name: _sha256(path) for name, path in paths.items()},
        "selection": to_dict(selection),
        "variants": variant_count,
    }
    if out.exists():
        if (made := _read_manifest(out)) and serves(made, wanted):
            return made
        if not (out / MANIFEST).is_file() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out} is in the way: it is not a prepared folder")

    tokenizer = ImageTokenizer.load(tokenizer_path)
    encoder = Encoder.load(encoder_path, TextTokenizer.load(text_path))
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = pathlib.Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        for split, source in sources.items():
            label = f"image codes of {split}" if progress else None
            records.write(staging / f"{split}.array_record", with_codes(source, tokenizer, label))
        if variant_count > 1:
            label = "variants of train" if progress else None
            codes = variants.encode(sources[TRAIN], tokenizer, variant_count, label)
            variants.save(staging / variants.NAME.format(split=TRAIN), codes)
        label = "index of train" if progress else None
        views = embed_views(sources[TRAIN], encoder, label)
        views.save(staging / "index.safetensors")
        train = sources[TRAIN]
        origins = [origin(train[i]) for i in range(len(train))]
        for split, source in sources.items():
            label = f"neighbours of {split}" if progress else None
            table = build_neighbours(
                source,
                encoder,
                views,
                selection,
                own_rows=split == TRAIN,
                sources=origins,
                progress=label,
            )
            table.save(staging / f"neighbours_{split}.safetensors")
        (staging / MANIFEST).write_text(json.dumps(wanted, indent=1) + "\n")
        os.chmod(staging, 0o755)  # mkdtemp makes a folder that only its owner can read
        if out.exists():
            shutil.rmtree(out)
        os.replace(staging, out)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return wanted


def serves(made: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Whether a prepared folder is what is wanted, or that and more variants."""
    return (
        made | {"variants": wanted["variants"]} == wanted
        and made.get("variants", 1) >= wanted["variants"]
    )


def with_codes(
    documents: Source, tokenizer: ImageTokenizer, progress: str | None = None
) -> Iterator[Document]:
    """The documents, with the codes of each picture beside its pixels.

    Args:
      documents: with pixels.
      tokenizer: encodes the pictures, many at a time.
      progress: the label of a progress bar; None for no bar.
    """
    block = tokenizer.batch_size
    bar = tqdm(total=len(documents), desc=progress, unit="doc", disable=progress is None)
    with bar:
        for start in range(0, len(documents), block):
            some = [documents[i] for i in range(start, min(start + block, len(documents)))]
            places = [
                (row, place, part.pixels)
                for row, document in enumerate(some)
                for place, part in enumerate(document.parts)
                if isinstance(part, Image) and part.pixels is not None
            ]
            if places:
                pictures = [tokenizer.preprocess(pixels) for _, _, pixels in places]
                codes = tokenizer.encode(np.stack(pictures))
                for (row, place, pixels), grid in zip(places, codes, strict=True):
                    image = Image(pixels=pixels, codes=np.asarray(grid, np.int32))
                    some[row] = some[row].replace(place, image)
            yield from some
            bar.update(len(some))


def _fingerprint(source: Source) -> str:
    """SHA-256 of the documents, so that changed data are noticed (about 0.3 ms a document)."""
    digest = hashlib.sha256()
    for index in range(len(source)):
        document = source[index]
        for part in document.parts:
            digest.update(repr(part).encode())
            if isinstance(part, Image) and part.pixels is not None:
                digest.update(part.pixels.tobytes())
        digest.update(repr(document.provenance).encode())
    return digest.hexdigest()


def _sha256(path: str | os.PathLike) -> str:
    try:
        with pathlib.Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {os.fspath(path)}: {error.strerror}") from error


def _read_manifest(folder: pathlib.Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return None
