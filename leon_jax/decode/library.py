"""The documents a model may read while it answers: a prepared folder, found or made."""

import hashlib
import json
import os
import pathlib
import sys
from typing import Any

import numpy as np

from leon_jax.config import UserError, build
from leon_jax.data import emoji
from leon_jax.decode.checkpoint import encoder_path
from leon_jax.documents import Document, Image, Text
from leon_jax.prepare import prepare as preparing
from leon_jax.prepare.config import emoji_config
from leon_jax.prepare.models import digest, matches
from leon_jax.retrieval.encoder import Encoder, normalise
from leon_jax.retrieval.prepared import Prepared, read_manifest
from leon_jax.retrieval.selection import SelectionConfig, origin, select

# Where `leon prepare` puts its folder by default.
HERE = pathlib.Path("data/emoji_prepared")


class Library:
    """Documents with their index, and the rules by which some are selected.

    Args:
      folder: a prepared folder (see `leon_jax.retrieval.prepared`).
      encoder: the encoder its index was made with.

    Raises:
      UserError: the folder is not a prepared one, or a file of it is damaged.
    """

    def __init__(self, folder: pathlib.Path, encoder: Encoder):
        self.folder, self.encoder = folder, encoder
        prepared = Prepared(folder)
        self.config = prepared.selection
        self.bank = prepared.bank()
        self.records = prepared.records()
        self._captions = prepared.records(pixels=False)
        self._sources: dict[int, str] = {}
        if len(self.records) != len(self.bank):
            raise UserError(
                f"{folder} has {len(self.records)} documents, but its index has "
                f"{len(self.bank)} rows; run leon prepare again"
            )

    def select(self, document: Document, k: int) -> list[Document]:
        """At most `k` documents for a prompt, most relevant first.

        They are found through the prompt's texts and pictures (with pixels), whichever there are;
        near copies of each other are skipped, and of a prompt that has both.
        """
        texts = [part.text for part in document.parts if isinstance(part, Text)]
        pictures = [
            part.pixels
            for part in document.parts
            if isinstance(part, Image) and part.pixels is not None
        ]
        if k < 1 or not (texts or pictures):
            return []
        vectors = []
        if texts:
            vectors.append(self.encoder.embed_texts([" ".join(texts)]))
        if pictures:
            vectors.append(self.encoder.embed_images(pictures[:1]))
        query = normalise(np.sum(vectors, axis=0))[0]
        found = select(
            query,
            self.bank,
            k,
            self.config,
            document=query if texts and pictures else None,
            source_of=self._source,
        )
        return [self.records[index] for index in found]

    def _source(self, index: int) -> str:
        if index not in self._sources:
            self._sources[index] = origin(self._captions[index])
        return self._sources[index]


def find(model: pathlib.Path, index: str | os.PathLike | None) -> pathlib.Path:
    """The prepared folder for a model: the one named, one lying around, or one made now.

    Args:
      model: the model folder.
      index: a prepared folder; None looks for `HERE`, then in the cache ($LEON_CACHE, or
        ~/.cache/leon_jax), and at last makes one there from the emoji packages.

    Raises:
      UserError: the named folder is none, or was made with other model files; or one had to be
        made and could not.
    """
    if index is not None:
        check(pathlib.Path(index), model)
        return pathlib.Path(index)
    if _serves(HERE, model):
        return HERE
    paths = files(model)
    digests = [digest(paths[kind]) for kind in ("tokenizer", "encoder", "text")]
    folder = cache() / f"emoji-{hashlib.sha256(''.join(digests).encode()).hexdigest()[:12]}"
    # One that an older version made is named after other digests of the same files.
    for made in (folder, *sorted(cache().glob("emoji-*"))):
        if _serves(made, model):
            return made
    print(
        f"Making the documents to retrieve from in {folder}; this happens once and takes "
        "about three minutes on a CPU.",
        file=sys.stderr,
    )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the cache {folder.parent}: {error.strerror}") from error
    emoji.prepare(cache() / "emoji")
    preparing.prepare(emoji_config(str(cache() / "emoji"), **paths), folder)
    return folder


def check(index: pathlib.Path, model: pathlib.Path) -> None:
    """Checks that a prepared folder was made with these model files.

    Raises:
      UserError: it was not, or it is no prepared folder.
    """
    read_manifest(index)
    if name := _disagreement(index, model):
        raise UserError(
            f"{index} was prepared with another {name} file than the one in {model}; "
            "run leon prepare with the files of that folder"
        )


def selection(model: pathlib.Path) -> SelectionConfig:
    """How documents are selected with the encoder of a model folder.

    A near-copy threshold is a property of the encoder, so a folder may hold `selection.json` with
    fields of `SelectionConfig`; without one CLIP's thresholds are used.

    Raises:
      UserError: the file is damaged.
    """
    path = model / "selection.json"
    if not path.is_file():
        return SelectionConfig()
    try:
        return build(SelectionConfig, json.loads(path.read_text()), str(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {error}") from error


def cache() -> pathlib.Path:
    """Where things made on the way are kept: $LEON_CACHE, or ~/.cache/leon_jax."""
    return pathlib.Path(os.environ.get("LEON_CACHE") or "~/.cache/leon_jax").expanduser()


def files(model: pathlib.Path) -> dict[str, Any]:
    """The model files of a folder and how its encoder selects, as `PrepareConfig` takes them."""
    return {
        "tokenizer": str(model / "tokenizer.safetensors"),
        "encoder": str(encoder_path(model)),
        "text": str(model / "text.json"),
        "selection": selection(model),
    }


def _serves(folder: pathlib.Path, model: pathlib.Path) -> bool:
    """Whether there is a prepared folder, of this version, made with these model files."""
    try:
        return _disagreement(folder, model) is None
    except UserError:
        return False


def _disagreement(index: pathlib.Path, model: pathlib.Path) -> str | None:
    """The kind of file that index and model disagree about, if any."""
    recorded, paths = read_manifest(index)["sha256"], files(model)
    return next(
        (
            kind
            for kind in ("tokenizer", "encoder", "text")
            if not matches(paths[kind], recorded.get(kind))
        ),
        None,
    )
