"""Retrieves documents for a prompt from a prepared folder, which is found or made."""

import functools
import hashlib
import json
import os
import pathlib
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from leon_jax.compilation_cache import cache_folder
from leon_jax.config import UserError, build
from leon_jax.datasets import demo
from leon_jax.documents import Document, Image, Text
from leon_jax.model_folder import encoder_path
from leon_jax.prepare.encoding_models import digest, matches
from leon_jax.retrieval.encoder import RetrievalEncoder, normalise
from leon_jax.retrieval.neighbour_selection import SelectionConfig, select
from leon_jax.retrieval.prepared_folder import MANIFEST, PreparedFolder, read_manifest

# Where `leon prepare` puts its folder by default.
DEFAULT_FOLDER = pathlib.Path("data/emoji_prepared")
# How many captions tell the spellings of an index.
_CAPTIONS_READ = 100_000


class Retriever:
    """Documents with their index, and the rules by which some are selected.

    Args:
      folder: a prepared folder (see `leon_jax.retrieval.prepared_folder`).
      encoder: the encoder that its index was made with.

    Raises:
      UserError: the folder is not a prepared one, or a file of it is damaged.
    """

    def __init__(self, folder: pathlib.Path, encoder: RetrievalEncoder):
        self.folder, self.encoder = folder, encoder
        prepared = PreparedFolder(folder)
        self.config = prepared.selection
        self.index = prepared.vector_index()
        self.records = prepared.records()
        self._captions = prepared.records(pixels=False)
        self._sources: dict[int, str] = {}
        if len(self.records) != len(self.index):
            raise UserError(
                f"{folder} has {len(self.records)} documents, but its index has "
                f"{len(self.index)} rows; run leon prepare again"
            )

    def retrieve(self, document: Document, num_docs: int) -> list[Document]:
        """At most `num_docs` documents for a prompt, the most relevant first.

        The query is made of the prompt's texts and its first image with pixels, whichever there
        are. Near copies of each other are skipped, and of a prompt that has both. The mesh must be
        set.
        """
        texts = [part.text for part in document.parts if isinstance(part, Text)]
        images = [
            part.pixels
            for part in document.parts
            if isinstance(part, Image) and part.pixels is not None
        ]
        if num_docs < 1 or not (texts or images):
            return []
        vectors = []
        if texts:
            vectors.append(self.encoder.embed_texts([self.spell(" ".join(texts))]))
        if images:
            vectors.append(self.encoder.embed_images(images[:1]))
        query = normalise(np.sum(vectors, axis=0))[0]
        rows = select(
            query,
            self.index,
            num_docs,
            self.config,
            document=query if texts and images else None,
            sources_of=self._sources_of,
        )
        return [self.records[row] for row in rows]

    def spell(self, text: str) -> str:
        """The text with a word in lower case where the captions of the index spell it so only.

        An encoder knows words as its captions spell them. "Cat Face" is far from "cat face" to it.
        A word stays as it is unless two captions have it in lower case: one alone may be of another
        language.
        """
        if text == text.lower():
            return text
        return _WORD.sub(lambda match: self._spell_word(match.group()), text)

    def _spell_word(self, word: str) -> str:
        lower = word.lower()
        is_known = word in self.word_counts or self.word_counts.get(lower, 0) < 2
        return word if is_known else lower

    @functools.cached_property
    def word_counts(self) -> Mapping[str, int]:
        """How many captions have each word, as it is spelled there.

        They are counted in up to 100,000 captions when they are first needed, and kept in the
        cache.
        """
        manifest = (self.folder / MANIFEST).read_bytes()
        path = cache_folder() / "words" / f"{hashlib.sha256(manifest).hexdigest()[:16]}.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            pass
        step = -(-len(self._captions) // _CAPTIONS_READ)
        counts: Counter[str] = Counter()
        for document in self._captions.read(range(0, len(self._captions), step)):
            counts.update(set(_WORD.findall(document.text)))
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(counts), encoding="utf-8")
            os.replace(temporary, path)
        except OSError:
            pass  # without a cache the captions are read again next time
        return counts

    def _sources_of(self, rows: Sequence[int]) -> dict[int, str]:
        """The source of each of these documents; "" where it is not known."""
        missing = [row for row in rows if row not in self._sources]
        for row, document in zip(missing, self._captions.read(missing), strict=True):
            provenance = document.provenance
            self._sources[row] = provenance.source if provenance else ""
        return {row: self._sources[row] for row in rows}


# Letters of any script with the marks that stand over or under them.
_WORD = re.compile(r"[^\W\d_]+")


def find_index(model: pathlib.Path, index: str | os.PathLike | None) -> pathlib.Path:
    """The prepared folder for a model: the one named, one that is there, or one made now.

    Args:
      model: the model folder.
      index: a prepared folder; None looks for `DEFAULT_FOLDER`, then in the cache ($LEON_CACHE, or
        ~/.cache/leon_jax), and at last makes one there from the emoji packages.

    Raises:
      UserError: the named folder is none, or was made with other model files; or one had to be
        made and could not.
    """
    if index is not None:
        check_index(pathlib.Path(index), model)
        return pathlib.Path(index)
    if _suits(DEFAULT_FOLDER, model):
        return DEFAULT_FOLDER
    paths = model_files(model)
    digests = [digest(paths[kind]) for kind in ("tokenizer", "encoder", "text")]
    folder = cache_folder() / f"emoji-{hashlib.sha256(''.join(digests).encode()).hexdigest()[:12]}"
    # A folder that an older version made is named after other digests of the same files.
    for existing in (folder, *sorted(cache_folder().glob("emoji-*"))):
        if _suits(existing, model):
            return existing
    print(
        f"Making the documents to retrieve from in {folder}; this happens once and takes "
        "about three minutes on a CPU.",
        file=sys.stderr,
    )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the cache {folder.parent}: {error.strerror}") from error
    demo.prepare_documents(cache_folder() / "emoji", folder, **paths)
    return folder


def check_index(index: pathlib.Path, model: pathlib.Path) -> None:
    """Checks that a prepared folder was made with these model files.

    Raises:
      UserError: it was not, or it is no prepared folder.
    """
    read_manifest(index)
    if kind := _differing_file(index, model):
        raise UserError(
            f"{index} was prepared with another {kind} file than the one in {model}; "
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
        raise UserError(
            f"{path} is not JSON (line {error.lineno}, column {error.colno})"
        ) from error


def model_files(model: pathlib.Path) -> dict[str, Any]:
    """The model files of a folder and how its encoder selects, as `PrepareConfig` takes them."""
    return {
        "tokenizer": str(model / "tokenizer.safetensors"),
        "encoder": str(encoder_path(model)),
        "text": str(model / "text.json"),
        "selection": selection(model),
    }


def _suits(folder: pathlib.Path, model: pathlib.Path) -> bool:
    """Whether there is a prepared folder, of this version, made with these model files."""
    try:
        return _differing_file(folder, model) is None
    except UserError:
        return False


def _differing_file(index: pathlib.Path, model: pathlib.Path) -> str | None:
    """The kind of file that is not the one the index was made with, if any."""
    recorded, paths = read_manifest(index)["sha256"], model_files(model)
    return next(
        (
            kind
            for kind in ("tokenizer", "encoder", "text")
            if not matches(paths[kind], recorded.get(kind))
        ),
        None,
    )
