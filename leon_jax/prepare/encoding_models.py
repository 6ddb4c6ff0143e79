"""The models that encode, loaded once in a process."""

import dataclasses
import hashlib
import os
import pathlib
import threading

import jax

from leon_jax import sharding, weight_files
from leon_jax.config import UserError
from leon_jax.retrieval.encoder import RetrievalEncoder
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
    encoder: RetrievalEncoder


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
                    mesh,
                    words,
                    ImageTokenizer.load(tokenizer),
                    RetrievalEncoder.load(encoder, words),
                )
            _loaded = (digests, models)
        return _loaded[1]


_loaded: tuple[tuple[str, ...], Models] | None = None
_loading = threading.Lock()


def digest(path: str | os.PathLike) -> str:
    """SHA-256 of a model: of a weight file's contents, of another file or folder as it is.

    Weights that are saved again keep their digest (see `leon_jax.weight_files.content_digest`). Of
    a folder all files count, with their names.

    Raises:
      UserError: it cannot be read.
    """
    path = pathlib.Path(path)
    if weight_files.is_weight_file(path):
        return weight_files.content_digest(path)
    return _bytes_digest(path)


def matches(path: str | os.PathLike, recorded: str | None) -> bool:
    """Whether a recorded digest is that of this model, now or in an older version.

    Older versions recorded the digest of a weight file's bytes.

    Raises:
      UserError: the model cannot be read.
    """
    if recorded is None:
        return False
    path = pathlib.Path(path)
    if weight_files.is_weight_file(path):
        return weight_files.same_weights(path, recorded)
    return recorded == _bytes_digest(path)


def _bytes_digest(path: pathlib.Path) -> str:
    try:
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
