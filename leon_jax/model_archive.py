"""Unpacks a `.tar` of a model folder, once, into the cache folder."""

import hashlib
import os
import pathlib
import shutil

from leon_jax.compilation_cache import cache_folder
from leon_jax.config import UserError

# The folder of unpacked models in the cache folder.
CACHE = "models"
# A file that is in every model folder.
_MARK = "decoder.safetensors"


def unpack(path: pathlib.Path) -> pathlib.Path:
    """Returns the model folder of an archive.

    The first call unpacks it into `CACHE`, under a digest of the file and the file's own name. The
    archive holds the files of a model folder, or one folder with them. Members that lead out of the
    folder, devices and other special files are refused (`tarfile.data_filter`).

    Args:
      path: a tar file without compression.

    Raises:
      UserError: the file is no such archive, is damaged, or holds no model folder; or the cache
        cannot be written.
    """
    import tarfile  # most models are folders

    try:
        if not tarfile.is_tarfile(path):
            raise UserError(f"{path} is neither a model folder nor a .tar of one")
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    parent = cache_folder() / CACHE / digest
    folder = parent / (path.name.removesuffix(".tar") or "model")
    if not folder.is_dir():
        _unpack(path, folder)
    return folder


def _unpack(path: pathlib.Path, folder: pathlib.Path) -> None:
    """Unpacks the archive next to `folder`, and renames the result to `folder` at the end."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        _extract(path, temporary)
        unpacked = _model_folder(temporary, path)
        try:
            os.rename(unpacked, folder)
        except OSError:  # another process was faster
            if not folder.is_dir():
                raise
    except OSError as error:
        raise UserError(f"cannot unpack {path} into {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _extract(path: pathlib.Path, folder: pathlib.Path) -> None:
    import tarfile

    try:
        with tarfile.open(path, "r:") as archive:
            size = sum(member.size for member in archive.getmembers())
            if size > path.stat().st_size:  # a sparse file
                raise UserError(
                    f"{path} holds {size:,} bytes in {path.stat().st_size:,}; "
                    "make it again with tar, without --sparse"
                )
            archive.extractall(folder, filter="data")
    except tarfile.FilterError as error:
        raise UserError(f"{path} is not safe to unpack: {error}") from error
    except (tarfile.TarError, EOFError) as error:
        raise UserError(
            f"{path} cannot be unpacked: it is damaged, or compressed ({error}); "
            "make it with tar -cf"
        ) from error


def _model_folder(folder: pathlib.Path, path: pathlib.Path) -> pathlib.Path:
    """Returns `folder`, or the one folder in it that has the files of a model."""
    candidates = [folder, *sorted(child for child in folder.iterdir() if child.is_dir())]
    for candidate in candidates:
        if (candidate / _MARK).is_file():
            return candidate
    raise UserError(f"{path} holds no model folder: no {_MARK} at its top or in a folder there")
