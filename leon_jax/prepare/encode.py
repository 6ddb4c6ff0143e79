"""Encodes a documents folder: adds codes, vectors and neighbours in `FOLDER/encoded/DIGEST`.

DIGEST identifies the models, so the encodings of several models can stand side by side. When a
model changes, the documents are encoded again without reading their sources.
"""

import dataclasses
import hashlib
import os
import pathlib
from typing import Any

from leon_jax.config import UserError
from leon_jax.data.document_folder import DOCUMENTS_FORMAT, ENCODED, DocumentFolder
from leon_jax.data.sources.raw_record import SourceConfig
from leon_jax.prepare.config import DuplicatesConfig, PrepareConfig
from leon_jax.prepare.encoding_models import digest
from leon_jax.prepare.prepare import Runner, prepare
from leon_jax.retrieval.neighbour_selection import SelectionConfig


@dataclasses.dataclass(frozen=True)
class EncodeConfig:
    """Everything that determines the encoding of a documents folder.

    Attributes:
      tokenizer: path of the image tokenizer, `tokenizer.safetensors`.
      encoder: path of the retrieval encoder: `encoder.safetensors`, or a folder with OpenAI's CLIP.
      text: path of the text tokenizer, `text.json`.
      max_tokens: maximum number of token ids of a document, at least 3.
      near: similarity in (0, 1]; of two train documents above it with different images the later
        one is dropped. None disables the check.
      evaluation: similarity in (0, 1]; a train document above it to any held-out document is
        dropped. None disables the check.
      selection: how neighbours are selected.
      variants: number of encoded variants of each train image, at least 1.

    Raises:
      UserError: a value is out of its range.
    """

    tokenizer: str
    encoder: str
    text: str
    max_tokens: int = 4096
    near: float | None = None
    evaluation: float | None = None
    selection: SelectionConfig = dataclasses.field(default_factory=SelectionConfig)
    variants: int = 1

    def __post_init__(self):
        DuplicatesConfig(near=self.near, evaluation=self.evaluation)


def encode(
    folder: str | os.PathLike,
    config: EncodeConfig,
    *,
    run: Runner | None = None,
    progress: bool = True,
) -> tuple[pathlib.Path, dict[str, Any]]:
    """Encodes a documents folder, unless it is encoded with the same models and settings.

    Args:
      folder: the documents folder.
      config: the configuration.
      run: encodes the shards; by default in this process, one after the other.
      progress: whether to show progress bars.

    Returns:
      The prepared folder inside `folder`, and its manifest.

    Raises:
      UserError: `folder` is not a documents folder, a model file is missing, or the disk is full.
    """
    documents = DocumentFolder(folder)
    if documents.manifest["format"] != DOCUMENTS_FORMAT:
        raise UserError(f"{folder} is a prepared folder; its documents are encoded already")
    out = encoded_folder(documents.address, config)
    has_held_out = len(documents.splits) > 1
    # The documents were filtered and stored at their side when they were collected.
    collected = documents.manifest["config"]
    return out, prepare(
        PrepareConfig(
            sources=tuple(
                SourceConfig("documents", os.fspath(documents.address), split=split)
                for split in documents.splits
            ),
            tokenizer=config.tokenizer,
            encoder=config.encoder,
            text=config.text,
            licences=tuple(collected["licences"]),
            picture_side=collected["picture_side"],
            min_side=1,
            max_text=collected["max_text"],
            max_tokens=config.max_tokens,
            duplicates=DuplicatesConfig(
                False, config.near, config.evaluation if has_held_out else None
            ),
            selection=config.selection,
            variants=config.variants,
            pixels=False,
        ),
        out,
        run=run,
        progress=progress,
    )


def encoded_folder(folder: pathlib.Path, config: EncodeConfig) -> pathlib.Path:
    """Returns the path of the encoding of a documents folder by the models of `config`.

    Raises:
      UserError: a model file is missing.
    """
    digests = [digest(path) for path in (config.tokenizer, config.encoder, config.text)]
    return folder / ENCODED / hashlib.sha256("".join(digests).encode()).hexdigest()[:12]
