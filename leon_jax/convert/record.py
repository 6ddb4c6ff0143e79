"""Writes the result of a conversion: a folder that is complete when conversion.json is there."""

import contextlib
import hashlib
import json
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from leon_jax import safetensors_format, storage
from leon_jax.config import UserError
from leon_jax.model_folder import CONVERSION as RECORD


def write(
    out: pathlib.Path, write_files: Callable[[pathlib.Path], None], record: Mapping[str, Any]
) -> None:
    """Writes a folder. It appears, or replaces that of an earlier conversion, when it is complete.

    Args:
      out: the folder.
      write_files: writes the other files into a folder, which has conversion.json.
      record: the content of conversion.json.

    Raises:
      UserError: `out` has files but no conversion.json, or cannot be written.
    """
    out = storage.absolute(storage.path(out))
    if storage.is_bucket(out):
        raise UserError(f"--out is {out}; convert into a folder on a disk, then copy it there")
    check_out(out)
    temporary = out.with_name(f".{out.name}.writing")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        (temporary / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        write_files(temporary)
        if out.exists():
            shutil.rmtree(out)
        temporary.rename(out)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(temporary)


def check_out(out: pathlib.Path) -> None:
    """Checks that a folder is free, or has an earlier conversion.

    Raises:
      UserError: it has other files.
    """
    out = pathlib.Path(out)
    if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or (out / RECORD).exists())):
        raise UserError(f"--out is {out}, which has other files; name a new folder")


def of_files(files: tuple[pathlib.Path, ...]) -> list[dict[str, Any]]:
    """Returns name, size and SHA-256 of each file."""
    records = []
    for path in files:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        records.append({"file": path.name, "bytes": path.stat().st_size, "sha256": digest})
    return records


def of_tensors(
    tensors: Mapping[str, np.ndarray | safetensors_format.PartedArray],
) -> dict[str, dict[str, Any]]:
    """Returns dtype, shape and SHA-256 of each tensor by name."""
    records = {}
    for name, tensor in tensors.items():
        digest = hashlib.sha256()
        for part in safetensors_format.contents(tensor):
            digest.update(part)
        records[name] = {
            "dtype": tensor.dtype.name,
            "shape": list(tensor.shape),
            "sha256": digest.hexdigest(),
        }
    return records
