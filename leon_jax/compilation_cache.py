"""Configures JAX's compilation cache: its folder and its maximum size."""

import fcntl
import os
import pathlib
import re
import shutil
import sys
import tempfile

from leon_jax.config import UserError

# Maximum size of the cache; beyond it the least recently used programs are removed.
DEFAULT_LIMIT = "5GB"
# Name of the cache folder in the folder of a training run.
RUN_FOLDER = "compile_cache"

_UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12}
# Files that JAX writes: programs, their access times, and on GPUs the results of autotuning.
_FILES = ("*-cache", "*-atime")
_FOLDERS = ("xla_gpu_per_fusion_autotune_cache_dir",)


def cache_folder() -> pathlib.Path:
    """Returns the folder for cached files: $LEON_CACHE, or ~/.cache/leon_jax."""
    return pathlib.Path(os.environ.get("LEON_CACHE") or "~/.cache/leon_jax").expanduser()


def compiled_folder() -> pathlib.Path:
    """Returns the folder where `leon generate` stores compiled programs.

    Raises:
      UserError: $JAX_COMPILATION_CACHE_DIR is an address, not a folder.
    """
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if folder and "://" in folder:
        raise UserError(f"JAX_COMPILATION_CACHE_DIR={folder} is an address; it must be a folder")
    return pathlib.Path(folder) if folder else cache_folder() / "compiled"


def limit() -> int:
    """Returns the maximum size of a cache in bytes: $LEON_CACHE_LIMIT, or `DEFAULT_LIMIT`.

    Raises:
      UserError: the variable is not a size.
    """
    value = os.environ.get("LEON_CACHE_LIMIT") or DEFAULT_LIMIT
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([MGT]B)", value.upper())
    if match is None:
        raise UserError(f"LEON_CACHE_LIMIT is '{value}'; it must be a size like 500MB or 5GB")
    return round(float(match[1]) * _UNITS[match[2]])


def use_compilation_cache(folder: str | os.PathLike) -> str | None:
    """Enables JAX's compilation cache for programs of any size. Call it before compiling.

    $JAX_COMPILATION_CACHE_DIR overrides the folder; JAX's variables then set its maximum size. A
    maximum size needs a lock on the folder for every access. The cache therefore has no maximum
    size on file systems without locks, and in runs of several processes, which would wait for each
    other.

    Args:
      folder: the cache folder; JAX creates it with the first program.

    Returns:
      The cache folder in use; None if it is not writable, with a message on stderr.

    Raises:
      UserError: $LEON_CACHE_LIMIT is not a size.
    """
    import jax

    max_size = limit()
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)  # no minimum
    if override := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return override
    if "://" in os.fspath(folder):
        jax.config.update("jax_compilation_cache_max_size", -1)  # a lock would need a disk
        jax.config.update("jax_compilation_cache_dir", os.fspath(folder))
        return os.fspath(folder)
    folder = pathlib.Path(folder).absolute()
    parent = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=parent) as file:
            has_limit = _can_lock(file.fileno()) and not jax.distributed.is_initialized()
    except OSError as error:
        reason = error.strerror or "the file system refuses it"
        print(f"compiled programs are not cached: cannot write {folder}: {reason}", file=sys.stderr)
        return None
    jax.config.update("jax_compilation_cache_max_size", max_size if has_limit else -1)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    return str(folder)


def size(path: pathlib.Path) -> int:
    """Returns the bytes of a file, or of all files below a folder; 0 if the path does not exist."""
    if path.is_dir() and not path.is_symlink():
        return sum(map(size, path.iterdir()))
    try:
        return path.lstat().st_size
    except FileNotFoundError:  # another process may have removed it
        return 0


def clear(folder: pathlib.Path) -> int:
    """Removes the compiled programs of a folder, but no other files.

    Returns:
      The number of bytes removed.

    Raises:
      UserError: a program cannot be removed.
    """
    paths = [path for pattern in _FILES for path in folder.glob(pattern)]
    paths += [folder / name for name in _FOLDERS if (folder / name).is_dir()]
    return sum(map(remove, paths))


def remove(path: pathlib.Path) -> int:
    """Removes a file or a folder.

    Returns:
      The number of bytes removed.

    Raises:
      UserError: the path cannot be removed.
    """
    removed = size(path)
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot remove {path}: {error.strerror}") from error
    return removed


def _can_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # some network file systems and mounted buckets
        return False
    return True
