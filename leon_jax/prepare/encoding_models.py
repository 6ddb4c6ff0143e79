"""Loads the models that encode documents, once per process, and computes digests of models."""

import dataclasses
import hashlib
import os
import pathlib
import threading

import jax

from leon_jax import sharding, storage, weight_digests, weight_files
from leon_jax.config import UserError
from leon_jax.retrieval.encoder import RetrievalEncoder
from leon_jax.tokenizers.image import ImageTokenizer
from leon_jax.tokenizers.text import TextTokenizer


@dataclasses.dataclass(frozen=True)
class Models:
    """The models that encode documents, and their device mesh.

    Attributes:
      mesh: mesh of the local devices; a process encodes shards independently of other processes.
      text: the text tokenizer.
      tokenizer: the image tokenizer.
      encoder: the retrieval encoder.
    """

    mesh: jax.sharding.Mesh
    text: TextTokenizer
    tokenizer: ImageTokenizer
    encoder: RetrievalEncoder


def load_models(tokenizer: str, encoder: str, text: str) -> Models:
    """Loads models, or returns the models of the previous call if their files have not changed.

    Args:
      tokenizer: path of the image tokenizer.
      encoder: path of the retrieval encoder.
      text: path of the text tokenizer.

    Raises:
      UserError: a file is missing or damaged.
    """
    global _loaded
    digests = tuple(map(digest, (tokenizer, encoder, text)))
    with _loading:
        if _loaded is None or _loaded[0] != digests:
            mesh = sharding.make_mesh(devices=jax.local_devices())
            with jax.set_mesh(mesh):
                text_tokenizer = TextTokenizer.load(text)
                models = Models(
                    mesh,
                    text_tokenizer,
                    ImageTokenizer.load(tokenizer),
                    RetrievalEncoder.load(encoder, text_tokenizer),
                )
            _loaded = (digests, models)
        return _loaded[1]


_loaded: tuple[tuple[str, ...], Models] | None = None
_loading = threading.Lock()


def digest(path: str | os.PathLike) -> str:
    """Returns the SHA-256 digest of a model, in hexadecimal.

    For a weight file the digest covers the weights, so saving the same weights again does not
    change it (see `weight_digests.content_digest`). For any other file it covers the bytes,
    and for a folder the names and bytes of all files.

    Raises:
      UserError: the model cannot be read.
    """
    path = storage.path(path)
    if weight_files.is_weight_file(path):
        return weight_digests.content_digest(path)
    return _bytes_digest(path)


def matches(path: str | os.PathLike, recorded: str | None) -> bool:
    """Tells whether a recorded digest belongs to this model.

    Older versions recorded the digest of a weight file's bytes; such a digest matches as well.

    Raises:
      UserError: the model cannot be read.
    """
    if recorded is None:
        return False
    path = storage.path(path)
    if weight_files.is_weight_file(path):
        return weight_digests.same_weights(path, recorded)
    return recorded == _bytes_digest(path)


def _bytes_digest(path: pathlib.Path) -> str:
    try:
        path = storage.local(path)
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_file())
            total = hashlib.sha256()
            for file in files:
                total.update(f"{file.relative_to(path)} {_bytes_digest(file)}\n".encode())
            return total.hexdigest()
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
