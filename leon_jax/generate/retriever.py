"""Retrieves documents for a prompt from a prepared folder, and finds or creates that folder."""

import dataclasses
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

from leon_jax import storage
from leon_jax.compilation_cache import cache_folder
from leon_jax.config import UserError, build
from leon_jax.data.document_folder import MANIFEST
from leon_jax.datasets import demo
from leon_jax.documents import Document, Hole, Image, Text
from leon_jax.generate.image_settings import ImageSettings
from leon_jax.model_description import GenerationDefaults
from leon_jax.model_folder import ModelFolder, encoder_path
from leon_jax.prepare.encoding_models import digest, matches
from leon_jax.retrieval.encoder import RetrievalEncoder, normalise
from leon_jax.retrieval.neighbour_selection import SelectionConfig, select
from leon_jax.retrieval.prepared_folder import PreparedFolder, read_manifest

# The default output folder of `leon prepare`.
DEFAULT_FOLDER = pathlib.Path("data/emoji_prepared")
# Maximum number of captions that are read to count the spellings of words.
_CAPTIONS_READ = 100_000


class Retriever:
    """The documents of a prepared folder, their index, and the configuration of the selection.

    Args:
      folder: a prepared folder (see `leon_jax.retrieval.prepared_folder`).
      encoder: the encoder that made the index.

    Raises:
      UserError: the folder is not a prepared folder with an index, or one of its files is damaged.
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
        """Returns at most `num_docs` documents for a prompt, most relevant first.

        The query is the sum of the embeddings of the prompt's texts and of its first image with
        pixels, normalised. Near copies of a selected document are skipped. If the prompt has both
        text and an image, near copies of the prompt are skipped too. A prompt with neither gets no
        documents. The mesh must be set.

        Raises:
          UserError: the embeddings do not fit the index.
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
        """Returns the text with words in lower case if the captions spell them only so.

        An encoder knows words as captions spell them: its embedding of "Cat Face" is far from that
        of "cat face". A word changes only if no caption has it as it is and at least two captions
        have it in lower case, because a single caption may be in another language.
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
        """The number of captions with each word, by its spelling.

        The words of at most 100,000 captions are counted at the first access. The counts are stored
        in the cache folder.
        """
        manifest = (self.folder / MANIFEST).read_bytes()
        path = cache_folder() / "words" / f"{hashlib.sha256(manifest).hexdigest()[:16]}.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            pass
        step = max(1, -(-len(self._captions) // _CAPTIONS_READ))
        counts: Counter[str] = Counter()
        for document in self._captions.read(range(0, len(self._captions), step)):
            counts.update(set(_WORD.findall(document.text)))
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(counts), encoding="utf-8")
            os.replace(temporary, path)
        except OSError:
            pass  # without a cache, the next process counts again
        return counts

    def _sources_of(self, rows: Sequence[int]) -> dict[int, str]:
        """Returns the source of each document by its row; "" if it is not known."""
        missing = [row for row in rows if row not in self._sources]
        for row, document in zip(missing, self._captions.read(missing), strict=True):
            provenance = document.provenance
            self._sources[row] = provenance.source if provenance else ""
        return {row: self._sources[row] for row in rows}


# A run of letters of any script. Digits and combining marks are not letters here.
_WORD = re.compile(r"[^\W\d_]+")


def find_index(folder: ModelFolder, index: str | os.PathLike | None = None) -> pathlib.Path:
    """Returns the prepared folder that a model retrieves from.

    Args:
      folder: the model folder.
      index: a prepared folder; None: the index in `model.json`. If that is the emoji
        documents, they are prepared if necessary.

    Raises:
      UserError: the model reads no documents or has no index; or the index is not a prepared
        folder, was made with other model files, or cannot be made.
    """
    folder.tokenizer.check_task(Document((Hole("image"),)), num_docs=1)
    if index is not None:
        path = storage.path(index)
    elif folder.index.prepare:
        return _demo_documents(folder.path)
    elif reason := missing_index(folder):
        raise UserError(f"{reason}; give {_INDEX_ADVICE}, or use num_docs=0")
    else:
        path = folder.index_path
    check_index(path, folder.path)
    return path


_INDEX_ADVICE = "--index=FOLDER (index=FOLDER in Python), a prepared folder made with its files"


def missing_index(folder: ModelFolder) -> str | None:
    """Returns why a model has no index of its own, the beginning of a sentence; None: it has one.

    Args:
      folder: the model folder.
    """
    name = storage.absolute(folder.path).name
    if folder.index.prepare:
        return None
    if not folder.index.folder:
        return f"the model {name} has no index"
    if not (folder.index_path / MANIFEST).is_file():
        return f"the index of the model {name}, {folder.index_path}, is not on this machine"
    return None


def usable_defaults(
    folder: ModelFolder, index: str | os.PathLike | None = None
) -> GenerationDefaults:
    """Returns a model's generation defaults, with 0 documents if it has no index.

    In that case it says so on stderr, once in a process.

    Args:
      folder: the model folder.
      index: the prepared folder that is used instead of the model's index; None: no other.
    """
    defaults = folder.defaults
    if index is not None or not defaults.num_docs or not (reason := missing_index(folder)):
        return defaults
    _say_once(
        f"{reason}, so it generates without retrieved documents; to change this, give "
        f"{_INDEX_ADVICE}"
    )
    return dataclasses.replace(defaults, num_docs=0)


def fill_settings(
    settings: ImageSettings, folder: ModelFolder, index: str | os.PathLike | None = None
) -> ImageSettings:
    """Returns settings with the defaults of a model for `params` and `num_docs` of None.

    Args:
      settings: the settings.
      folder, index: see `usable_defaults`.
    """
    has_number = settings.num_docs is not None
    return settings.filled(folder.defaults if has_number else usable_defaults(folder, index))


@functools.cache
def _say_once(sentence: str) -> None:
    print(sentence, file=sys.stderr)


def _demo_documents(model: pathlib.Path) -> pathlib.Path:
    """Returns a prepared folder of the emoji, made with a model's files.

    It is `DEFAULT_FOLDER`, or else a folder in the cache ($LEON_CACHE, or ~/.cache/leon_jax), if it
    was made with the same model files; otherwise a new folder in the cache, made from the emoji
    packages.

    Raises:
      UserError: a new folder cannot be made.
    """
    if _suits(DEFAULT_FOLDER, model):
        return DEFAULT_FOLDER
    paths = model_files(model)
    digests = [digest(paths[kind]) for kind in ("tokenizer", "encoder", "text")]
    folder = cache_folder() / f"emoji-{hashlib.sha256(''.join(digests).encode()).hexdigest()[:12]}"
    # Older versions named the folder after other digests of the same files.
    for existing in (folder, *sorted(cache_folder().glob("emoji-*"))):
        if _suits(existing, model):
            return existing
    print(
        f"Preparing the emoji documents in {folder}; this happens once and takes about three "
        "minutes on a CPU.",
        file=sys.stderr,
    )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the cache {folder.parent}: {error.strerror}") from error
    demo.prepare_documents(cache_folder() / "emoji", folder, **paths)
    return folder


def check_index(index: str | os.PathLike, model: pathlib.Path) -> None:
    """Checks that a prepared folder was made with the files of a model folder.

    Raises:
      UserError: it was made with other files, or is not a prepared folder.
    """
    index = storage.path(index)
    read_manifest(index)
    if kind := _differing_file(index, model):
        raise UserError(
            f"{index} was encoded with another {kind} file than the one in {model}; "
            "encode its documents with the files of that folder"
        )


def selection(model: pathlib.Path) -> SelectionConfig:
    """Returns the selection configuration for the encoder of a model folder.

    The near-copy thresholds depend on the encoder, so the folder may have a file `selection.json`
    with fields of `SelectionConfig`. Without the file, CLIP's thresholds are used.

    Raises:
      UserError: the file is not JSON, or a field is unknown or invalid.
    """
    path = model / "selection.json"
    if not path.is_file():
        return SelectionConfig()
    try:
        return build(SelectionConfig, json.loads(path.read_text(encoding="utf-8")), str(path))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is not JSON (line {error.lineno}, column {error.colno})"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start})") from error


def model_files(model: pathlib.Path) -> dict[str, Any]:
    """Returns the model files and the selection configuration as fields of `PrepareConfig`.

    Raises:
      UserError: the model folder has no encoder, or `selection.json` is damaged.
    """
    return {
        "tokenizer": str(model / "tokenizer.safetensors"),
        "encoder": str(encoder_path(model)),
        "text": str(model / "text.json"),
        "selection": selection(model),
    }


def _suits(folder: pathlib.Path, model: pathlib.Path) -> bool:
    """Returns whether `folder` is a prepared folder of this version, made with these files."""
    try:
        return _differing_file(folder, model) is None
    except UserError:
        return False


def _differing_file(index: pathlib.Path, model: pathlib.Path) -> str | None:
    """Returns the kind of the first model file that differs from the one the index was made with.

    The kinds are "tokenizer", "encoder" and "text". None: no file differs.

    Raises:
      UserError: `index` is not a prepared folder, or a model file cannot be read.
    """
    recorded, paths = read_manifest(index)["sha256"], model_files(model)
    return next(
        (
            kind
            for kind in ("tokenizer", "encoder", "text")
            if not matches(paths[kind], recorded.get(kind))
        ),
        None,
    )
