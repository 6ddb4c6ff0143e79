"""The files of a source: which ones a path names, and how one that a record names is read.

What a person gives is trusted, what a record says is not: a record reads regular files below its
own folder and nothing else.
"""

import glob
import hashlib
import itertools
import os
import re
import stat
from collections.abc import Iterable

from leon_jax.config import UserError
from leon_jax.data.sources.field_values import Fault

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_PATTERN = re.compile(r"[*?\[{]")


def find(path: str, endings: tuple[str, ...]) -> tuple[str, list[str]]:
    """The files that a path names.

    Args:
      path: a file, a folder, or a pattern with `*`, `?`, `**` or ranges such as `{000..010}`.
      endings: what the names of files end in; in a folder others are passed over.

    Returns:
      A folder, and the names of the files relative to it, sorted.

    Raises:
      UserError: there are none, one of a range is missing, or a file's name ends in something else.
    """
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
    found = []
    for pattern in _expand(path):
        matches = [match for match in glob.glob(pattern, recursive=True) if os.path.isfile(match)]
        if not matches:
            raise UserError(f"there is no file {pattern}")
        found += matches
    folder = os.path.dirname(path[: first.start()]) or "."
    return folder, sorted({os.path.relpath(match, folder) for match in found})


def version(paths: Iterable[str]) -> str:
    """A digest of the files' names, sizes and modification times.

    Raises:
      UserError: one is not there any more.
    """
    digest = hashlib.sha256()
    for path in paths:
        try:
            status = os.stat(path)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
        name = os.path.basename(path)
        digest.update(f"{name!r} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def read_inside(folder: str, name: str, most: int) -> bytes:
    """The bytes of a file that a record names.

    Args:
      folder: real path of the folder that the file must lie in.
      name: its path from there, as the record has it.
      most: how many bytes it may have.

    Raises:
      Fault: the name leads out of the folder, or there is no such file of that size.
    """
    if os.path.isabs(name) or ".." in name.split("/") or "\0" in name:
        raise Fault("unsafe_name", f"{name!r} is not a path below the folder of the record")
    try:
        path = os.path.realpath(os.path.join(folder, name))
        if os.path.commonpath([folder, path]) != folder:
            raise Fault("unsafe_name", f"{name!r} leads out of the folder of the record")
        # A pipe would be waited for, and a device may do anything when it is opened.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise Fault("missing_picture", f"{name!r} is not a file")
        with open(path, "rb") as file:
            data = file.read(most + 1) if os.fstat(file.fileno()).st_size <= most else None
    except OSError as error:
        raise Fault("missing_picture", f"{name!r}: {error.strerror}") from error
    if data is None or len(data) > most:
        raise Fault("record_too_large", f"{name!r} has more than the {most} bytes left to it")
    return data


def _expand(path: str) -> list[str]:
    """The paths that the ranges in a path stand for."""
    pieces = _RANGE.split(path)
    choices = []
    for first, last in zip(pieces[1::3], pieces[2::3], strict=True):
        width = len(first) if first.startswith("0") or len(first) == len(last) else 0
        choices.append([str(n).zfill(width) for n in range(int(first), int(last) + 1)])
        if not choices[-1]:
            raise UserError(f"the range {{{first}..{last}}} in {path} is empty")
    return [
        "".join(itertools.chain(*zip(pieces[::3], (*chosen, ""), strict=True)))
        for chosen in itertools.product(*choices)
    ]
