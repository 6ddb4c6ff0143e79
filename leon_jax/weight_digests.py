"""Digests that identify the weights of a file.

A digest covers the tensors under their full names, not the bytes of the file, so it stays the same
when a file is written again. Older versions took digests of bytes. Prepared folders and images of
those versions record them. A file that `upgrade` wrote lists its former digests in its header,
under `replaces`.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping

import numpy as np

from leon_jax import safetensors_format, storage, weight_files

# Number and size of the samples that `sampled_digest` reads.
_SAMPLES, _SAMPLE_BYTES = 64, 4096


def content_digest(path: str | os.PathLike) -> str:
    """Returns a hexadecimal SHA-256 of the kind, the configuration and the tensors of a file.

    It does not depend on the format, the order of the tensors, or `replaces`. The file is streamed,
    so it may be larger than memory.

    Raises:
      UserError: the file cannot be read or is not a weight file.
    """
    metadata, arrays = weight_files.read_mapped(path)
    digest = hashlib.sha256()
    config = json.dumps(json.loads(metadata["config"]), sort_keys=True)
    digest.update(f"{metadata['kind']}\n{config}\n".encode())
    for line, array in _described(arrays):
        digest.update(line)
        digest.update(safetensors_format.content(array).data)
    return digest.hexdigest()


def same_weights(path: str | os.PathLike, recorded: str) -> bool:
    """Returns whether a recorded digest is of this file: its contents, bytes or former bytes.

    Raises:
      UserError: the file cannot be read or is not a weight file.
    """
    metadata, _ = weight_files.read_mapped(path)
    return (
        recorded in _replaces(metadata)
        or recorded == content_digest(path)
        or recorded == _byte_digest(path)
    )


def sampled_digest(path: str | os.PathLike) -> str:
    """Returns 12 hexadecimal digits that identify the weights of a file.

    They are a digest of the tensors' full names, types and shapes, and of 64 samples of their
    contents, because reading all of a large model takes minutes. Training changes every weight. A
    file with only a few changed weights may have the same digest.

    Raises:
      UserError: the file cannot be read or is not a weight file.
    """
    _, arrays = weight_files.read_mapped(path)
    digest, contents = hashlib.sha256(), []
    for line, array in _described(arrays):
        digest.update(line)
        contents.append(safetensors_format.content(array))
    # The samples are taken from the concatenated contents.
    ends = np.cumsum([len(content) for content in contents], dtype=np.int64)
    total = int(ends[-1]) if contents else 0
    for sample in range(_SAMPLES):
        start = total * sample // _SAMPLES
        stop = min(start + _SAMPLE_BYTES, total)
        for content, end in zip(contents, ends, strict=True):
            offset = int(end) - len(content)
            digest.update(content[max(start - offset, 0) : max(stop - offset, 0)].data)
    return digest.hexdigest()[:12]


def former_sampled_digests(path: str | os.PathLike) -> list[str]:
    """Returns the 12-digit digests that older versions wrote into images for these weights.

    Raises:
      UserError: the file cannot be read or is not a weight file.
    """
    metadata, _ = weight_files.read_mapped(path)
    former = [digest for digest in _replaces(metadata) if len(digest) == 12]
    return [_sampled_bytes_digest(path), *former]


def upgrade(path: str | os.PathLike) -> bool:
    """Rewrites a file of the format `leon_jax/1` in the present format, with the same weights.

    The header lists the digests of the former bytes, so that recorded digests stay valid.

    Returns:
      Whether the file was rewritten. A file of the present format does not change.

    Raises:
      UserError: the file cannot be read or is not a weight file.
    """
    metadata, arrays = weight_files.read_mapped(path)
    if metadata["format"] == weight_files.FORMAT:
        return False
    replaces = [_byte_digest(path), _sampled_bytes_digest(path)]
    metadata = metadata | {"format": weight_files.FORMAT, "replaces": json.dumps(replaces)}
    safetensors_format.write(storage.path(path), arrays, metadata)
    return True


def _described(arrays: Mapping[str, np.ndarray]) -> Iterator[tuple[bytes, np.ndarray]]:
    """Yields the arrays by name, each with a line that has its name, type and shape."""
    for name, array in sorted(arrays.items()):
        yield f"{name} {array.dtype.name} {list(array.shape)}\n".encode(), array


def _replaces(metadata: Mapping[str, str]) -> list[str]:
    """Returns the digests of former bytes in a header."""
    return json.loads(metadata.get("replaces", "[]"))


def _byte_digest(path: str | os.PathLike) -> str:
    """Returns the SHA-256 of a file's bytes, which older versions recorded in prepared folders."""
    with storage.local(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sampled_bytes_digest(path: str | os.PathLike) -> str:
    """Returns the digest that older versions recorded in images: of the size and 64 samples."""
    digest, size = hashlib.sha256(), storage.local(path).stat().st_size
    digest.update(str(size).encode())
    with storage.local(path).open("rb") as file:
        for sample in range(_SAMPLES):
            file.seek(size * sample // _SAMPLES)
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:12]
