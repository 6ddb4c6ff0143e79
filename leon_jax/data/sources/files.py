"""Finds the files of a source, and reads files that records name.

Paths of the configuration are trusted; names in records are not. A record may only read regular
files below its folder.
"""

import glob
import hashlib
import itertools
import os
import re
import stat
from collections.abc import Iterable

from leon_jax import storage
from leon_jax.config import UserError
from leon_jax.data.sources.field_values import RecordError

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_PATTERN = re.compile(r"[*?\[{]")


def find_files(path: str, endings: tuple[str, ...]) -> tuple[str, list[str]]:
    """Finds the files that a path names.

    Args:
      path: a file, a folder, or a pattern with `*`, `?`, `**` or ranges such as `{000..010}`.
      endings: accepted file extensions; other files in a folder are ignored.

    Returns:
      A folder, and the sorted names of the files relative to it.

    Raises:
      UserError: there are no files, a file of a range is missing, or a file has another extension.
    """
    if storage.is_bucket(path):
        return _find_objects(path, endings)
    if os.path.isfile(path):
        if not path.endswith(endings):
            raise UserError(f"{path} is a file that does not end in {' or '.join(endings)}")
        return os.path.dirname(path) or ".", [os.path.basename(path)]
    if os.path.isdir(path):
        try:
            names = sorted(
                entry.name
                for entry in os.scandir(path)
                if entry.name.endswith(endings) and entry.is_file()
            )
        except OSError as error:
            raise UserError(f"cannot read the folder {path}: {error.strerror}") from error
        if not names:
            raise UserError(f"the folder {path} has no file ending in {' or '.join(endings)}")
        return path, names
    first = _PATTERN.search(path)
    if first is None:
        raise UserError(f"there is no file or folder {path}")
    paths = []
    for pattern in _expand(path):
        matches = [match for match in glob.glob(pattern, recursive=True) if os.path.isfile(match)]
        if not matches:
            raise UserError(f"there is no file {pattern}")
        paths += matches
    folder = os.path.dirname(path[: first.start()]) or "."
    return folder, sorted({os.path.relpath(match, folder) for match in paths})


def fingerprint(paths: Iterable[str]) -> str:
    """Returns a digest of the names, sizes and modification times (or versions) of files.

    Raises:
      UserError: a file does not exist any more.
    """
    digest = hashlib.sha256()
    for path in paths:
        try:
            if storage.is_bucket(path):
                size, version = storage.size_and_version(path)
            else:
                status = os.stat(path)
                size, version = status.st_size, str(status.st_mtime_ns)
        except OSError as error:
            raise UserError(f"cannot read {path}: {storage.reason(error)}") from error
        digest.update(f"{os.path.basename(path)!r} {size} {version}\n".encode())
    return digest.hexdigest()


def read_inside(folder: str, name: str, max_bytes: int) -> bytes:
    """Reads a file that a record names.

    Args:
      folder: real path of the folder that must contain the file (`real_folder`).
      name: path of the file relative to the folder, from the record.
      max_bytes: maximum size of the file.

    Raises:
      RecordError: the name leads out of the folder, or the file does not exist or is too large.
    """
    if os.path.isabs(name) or ".." in name.split("/") or "\0" in name:
        raise RecordError("unsafe_name", f"{name!r} is not a path below the folder of the record")
    if storage.is_bucket(folder):
        return _read_object(folder, name, max_bytes)
    try:
        path = os.path.realpath(os.path.join(folder, name))
        if os.path.commonpath([folder, path]) != folder:
            raise RecordError("unsafe_name", f"{name!r} leads out of the folder of the record")
        # Opening a pipe would block, and opening a device may have side effects.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise RecordError("missing_picture", f"{name!r} is not a file")
        with open(path, "rb") as file:
            too_large = os.fstat(file.fileno()).st_size > max_bytes
            data = None if too_large else file.read(max_bytes + 1)
    except OSError as error:
        raise RecordError("missing_picture", f"{name!r}: {error.strerror}") from error
    if data is None or len(data) > max_bytes:
        raise RecordError(
            "record_too_large", f"{name!r} has more than the remaining {max_bytes} bytes"
        )
    return data


def real_folder(path: str) -> str:
    """Returns the folder of a file, without links."""
    folder = os.path.dirname(path)
    return folder if storage.is_bucket(path) else os.path.realpath(folder or ".")


def _find_objects(path: str, endings: tuple[str, ...]) -> tuple[str, list[str]]:
    """Does what `find_files` does, in a bucket."""
    try:
        source = storage.path(path)
        first = _PATTERN.search(path)
        if first is None and source.is_file():
            if not path.endswith(endings):
                raise UserError(f"{path} is a file that does not end in {' or '.join(endings)}")
            return os.path.dirname(path), [os.path.basename(path)]
        if first is None:
            names = sorted(
                os.path.basename(name)
                for name in storage.glob(f"{path.rstrip('/')}/*")
                if name.endswith(endings)
            )
            if not names:
                raise UserError(
                    f"{path} is not a file, and no file in it ends in {' or '.join(endings)}"
                )
            return path.rstrip("/"), names
        folder = os.path.dirname(path[: first.start()])
        paths = []
        for pattern in _expand(path):
            matches = storage.glob(pattern)
            if not matches:
                raise UserError(f"there is no file {pattern}")
            paths += matches
        return folder, sorted({name.removeprefix(f"{folder}/") for name in paths})
    except OSError as error:
        raise UserError(f"cannot read {path}: {storage.reason(error)}") from error


def _read_object(folder: str, name: str, max_bytes: int) -> bytes:
    """Reads an object below a folder in a bucket."""
    try:
        size, _ = storage.size_and_version(f"{folder}/{name}")
        if size > max_bytes:
            raise RecordError(
                "record_too_large", f"{name!r} has more than the remaining {max_bytes} bytes"
            )
        return (storage.path(folder) / name).read_bytes()
    except FileNotFoundError as error:
        raise RecordError("missing_picture", f"{name!r} is not a file") from error


def _expand(path: str) -> list[str]:
    """Expands the ranges in a path."""
    pieces = _RANGE.split(path)
    choices = []
    for first, last in zip(pieces[1::3], pieces[2::3], strict=True):
        width = len(first) if first.startswith("0") or len(first) == len(last) else 0
        choices.append([str(n).zfill(width) for n in range(int(first), int(last) + 1)])
        if not choices[-1]:
            raise UserError(f"the range {{{first}..{last}}} in {path} is empty")
    return [
        "".join(itertools.chain(*zip(pieces[::3], (*numbers, ""), strict=True)))
        for numbers in itertools.product(*choices)
    ]
