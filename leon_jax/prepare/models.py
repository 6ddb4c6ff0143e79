"""The models that encode, loaded once in a process."""

import dataclasses
import hashlib
import os
import pathlib
import threading

import jax

from leon_jax import sharding
from leon_jax.config import UserError
from leon_jax.retrieval.encoder import Encoder
from leon_jax.tokenizers.image import ImageTokenizer
from leon_jax.tokenizers.text import TextTokenizer


@dataclasses.dataclass(frozen=True)
class Models:
    """What encodes, and the devices it runs on.

    Attributes:
      mesh: this process's own devices: work on shards is independent of who else works.
    """

    mesh: jax.sharding.Mesh
    text: TextTokenizer
    tokenizer: ImageTokenizer
    encoder: Encoder


def load_models(tokenizer: str, encoder: str, text: str) -> Models:
    """The models of three paths; those used last are kept, so a process loads them once.

    Raises:
      UserError: a file is missing or damaged.
    """
    global _loaded
    digests = tuple(map(digest, (tokenizer, encoder, text)))
    with _loading:
        if _loaded is None or _loaded[0] != digests:
            mesh = sharding.make_mesh(devices=jax.local_devices())
            with jax.set_mesh(mesh):
                words = TextTokenizer.load(text)
                models = Models(
                    mesh, words, ImageTokenizer.load(tokenizer), Encoder.load(encoder, words)
                )
            _loaded = (digests, models)
        return _loaded[1]


_loaded: tuple[tuple[str, ...], Models] | None = None
_loading = threading.Lock()


def digest(path: str | os.PathLike) -> str:
    """SHA-256 of a file, or of all files of a folder with their names.

    Raises:
      UserError: it cannot be read.
    """
    path = pathlib.Path(path)
    try:
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_file())
            total = hashlib.sha256()
            for file in files:
                total.update(f"{file.relative_to(path)} {digest(file)}\n".encode())
            return total.hexdigest()
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
