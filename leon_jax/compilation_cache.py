"""Compiled programs on disk: where they are kept between processes, and how large they may grow."""

import fcntl
import os
import pathlib
import re
import shutil
import sys
import tempfile

from leon_jax.config import UserError

# What the programs may take before the least recently used ones are removed.
DEFAULT_LIMIT = "5GB"
# The folder of a training run that holds its programs.
RUN_FOLDER = "compile_cache"

_UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12}
# What JAX writes: a program, when it was last read, and on GPUs what the compiler measured.
_FILES = ("*-cache", "*-atime")
_FOLDERS = ("xla_gpu_per_fusion_autotune_cache_dir",)


def cache_folder() -> pathlib.Path:
    """What is made on the way is kept in here: $LEON_CACHE, or ~/.cache/leon_jax."""
    return pathlib.Path(os.environ.get("LEON_CACHE") or "~/.cache/leon_jax").expanduser()


def compiled_folder() -> pathlib.Path:
    """Where `leon generate` keeps compiled programs.

    Raises:
      UserError: $JAX_COMPILATION_CACHE_DIR is an address, not a folder.
    """
    named = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if named and "://" in named:
        raise UserError(f"JAX_COMPILATION_CACHE_DIR={named} is an address; it must be a folder")
    return pathlib.Path(named) if named else cache_folder() / "compiled"


def limit() -> int:
    """What the programs of a folder may take, in bytes: $LEON_CACHE_LIMIT, or `DEFAULT_LIMIT`.

    Raises:
      UserError: the variable is not a size.
    """
    written = os.environ.get("LEON_CACHE_LIMIT") or DEFAULT_LIMIT
    size = re.fullmatch(r"(\d+(?:\.\d+)?) ?([MGT]B)", written.upper())
    if size is None:
        raise UserError(f"LEON_CACHE_LIMIT is '{written}'; it must be a size like 500MB or 5GB")
    return round(float(size[1]) * _UNITS[size[2]])


def use_compilation_cache(folder: str | os.PathLike) -> str | None:
    """Keeps what this process compiles, also small programs, and finds it again.

    Call it before anything is compiled. $JAX_COMPILATION_CACHE_DIR names another folder; JAX's own
    variables then say how large it may grow. A limit needs a lock on the folder for every access.
    So there is none where locks are not to be had, and none in a run of several processes, which
    would wait for each other.

    Args:
      folder: made with the first program, if missing.

    Returns:
      Where programs are kept; None if the folder cannot be written, which is said on stderr.

    Raises:
      UserError: $LEON_CACHE_LIMIT is not a size.
    """
    import jax

    most = limit()
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)  # as small as they may be
    if named := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return named
    folder = pathlib.Path(folder).absolute()
    parent = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=parent) as file:
            limited = _can_lock(file.fileno()) and not jax.distributed.is_initialized()
    except OSError as error:
        reason = error.strerror or "the file system refuses it"
        print(f"compiled programs are not kept: cannot write {folder}: {reason}", file=sys.stderr)
        return None
    jax.config.update("jax_compilation_cache_max_size", most if limited else -1)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    return str(folder)


def size(path: pathlib.Path) -> int:
    """Bytes of a file, or of all files below a folder; 0 if there is none."""
    if path.is_dir() and not path.is_symlink():
        return sum(map(size, path.iterdir()))
    try:
        return path.lstat().st_size
    except FileNotFoundError:  # another process may remove it meanwhile
        return 0


def clear(folder: pathlib.Path) -> int:
    """Removes the compiled programs of a folder and leaves everything else; returns their bytes.

    Raises:
      UserError: one of them cannot be removed.
    """
    paths = [path for pattern in _FILES for path in folder.glob(pattern)]
    paths += [folder / name for name in _FOLDERS if (folder / name).is_dir()]
    return sum(map(remove, paths))


def remove(path: pathlib.Path) -> int:
    """Removes a file or a folder; returns its bytes.

    Raises:
      UserError: it cannot be removed.
    """
    taken = size(path)
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot remove {path}: {error.strerror}") from error
    return taken


def _can_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # some network file systems and mounted buckets
        return False
    return True
