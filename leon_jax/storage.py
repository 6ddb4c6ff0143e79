"""Paths on disks and in buckets: `gs://` (Google Cloud Storage) and `s3://`.

`path` converts a string to a path. A path in a bucket is an `etils.epath.Path`, which has the
methods of `pathlib.Path`; the package is in the extra `buckets`. A bucket has objects, not folders:

- An object appears when all its bytes are there, so `write` needs no temporary name.
- Nothing is renamed. A group of objects is complete if the object that is written last exists.
- An object cannot be mapped into memory. `local` copies it to the disk first.

Requests that fail for a moment are repeated by gcsfs and s3fs, up to half a minute.
"""

import concurrent.futures
import contextlib
import hashlib
import importlib.util
import json
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

from leon_jax import file_lock
from leon_jax.compilation_cache import cache_folder
from leon_jax.config import UserError

# The folder of copies of objects in the cache folder.
CACHE = "buckets"
# The beginning of an address, and the package that reads it.
_PACKAGES = {"gs://": "gcsfs", "s3://": "s3fs"}
_THREADS = 8
# Copies of more bytes are announced on stderr.
_ANNOUNCED = 100_000_000


def is_bucket(path: str | os.PathLike) -> bool:
    """Returns whether a path is in a bucket."""
    return os.fspath(path).startswith(tuple(_PACKAGES))


def path(value: str | os.PathLike) -> pathlib.Path:
    """Converts a string to a path, on a disk or in a bucket.

    Returns:
      A `pathlib.Path`, or an `etils.epath.Path` for a bucket. The latter has no `rename` that is
      atomic; use the functions of this module to write.

    Raises:
      UserError: the address has another beginning than `gs://` and `s3://`, or the extra `buckets`
        is not installed.
    """
    text = os.fspath(value)
    if "://" not in text:
        return pathlib.Path(value)
    if not is_bucket(text):
        raise UserError(f"{text} is not a path; addresses begin with {' or '.join(_PACKAGES)}")
    package = _PACKAGES[text[:5]]
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"{text} needs the package {package}; install it with: pip install 'leon_jax[buckets]'"
        )
    _configure()
    from etils import epath

    return cast(pathlib.Path, epath.Path(text))


def absolute(value: str | os.PathLike) -> pathlib.Path:
    """Returns `path(value)`; on a disk from the root."""
    return path(value) if is_bucket(value) else pathlib.Path(value).absolute()


def join(folder: pathlib.Path, name: str) -> pathlib.Path:
    """Returns the path of `name`, which may be an address, or relative to `folder`."""
    return path(name) if is_bucket(name) else folder / name


def make_folder(folder: pathlib.Path) -> None:
    """Creates a folder and its parents. A bucket needs no folders."""
    if not is_bucket(folder):
        folder.mkdir(parents=True, exist_ok=True)


def write(target: pathlib.Path, content: bytes | str) -> None:
    """Writes a file, in UTF-8 if it is text. It is complete or absent, never partial.

    The folder of the file must exist, except in a bucket.

    Raises:
      OSError: the file cannot be written.
    """
    data = content.encode() if isinstance(content, str) else content
    if is_bucket(target):
        with as_os_errors(target):
            file_system(target).pipe_file(os.fspath(target), data)
        return
    with writing(target) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def writing(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields the path of a temporary file on a disk, which becomes `target` at the end.

    After an exception `target` is unchanged, and the temporary file is removed.

    Raises:
      OSError: the file cannot be written.
    """
    if is_bucket(target):
        with tempfile.TemporaryDirectory(prefix="leon-") as folder:
            temporary = pathlib.Path(folder, target.name)
            yield temporary
            with as_os_errors(target):
                file_system(target).put_file(str(temporary), os.fspath(target))
        return
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def remove(target: pathlib.Path) -> None:
    """Removes a file, or a folder with all its files; nothing if it does not exist.

    Raises:
      OSError: a file cannot be removed.
    """
    if not is_bucket(target):
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)
        return
    with as_os_errors(target):
        if names := list(_objects(os.fspath(target))):
            _remove_objects(target, names)


def move(source: pathlib.Path, target: pathlib.Path) -> None:
    """Moves a folder; an older `target` is removed.

    In a bucket the objects are copied and then removed. If it ends in between, both exist.

    Raises:
      OSError: a file cannot be moved.
    """
    remove(target)
    if not is_bucket(source):
        target.parent.mkdir(parents=True, exist_ok=True)
        os.rename(source, target)
        return
    with as_os_errors(source):
        files, start = file_system(source), os.fspath(source)
        names = list(_objects(start))
        _each(lambda name: files.cp_file(f"{start}/{name}", f"{target}/{name}"), names)
        _remove_objects(source, names)


@contextlib.contextmanager
def temporary_copy(value: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields the path of a file on a disk; a copy of a file in a bucket is removed at the end.

    Raises:
      OSError: it cannot be read.
    """
    if not is_bucket(value):
        yield pathlib.Path(value)
        return
    source = path(value)
    with tempfile.TemporaryDirectory(prefix="leon-") as folder:
        target = pathlib.Path(folder, source.name)
        with as_os_errors(source):
            file_system(source).get_file(os.fspath(source), str(target))
        yield target


def size_and_version(value: str | os.PathLike) -> tuple[int, str]:
    """Returns the size of an object in bytes, and a string that each write of it changes.

    Raises:
      OSError: it does not exist, or cannot be read.
    """
    source = path(value)
    with as_os_errors(source):
        about = file_system(source).info(os.fspath(source))
        return int(about["size"]), str(about.get("generation") or about.get("ETag"))


def glob(pattern: str) -> list[str]:
    """Returns the addresses of the objects in a bucket that match a pattern.

    Raises:
      OSError: the bucket cannot be read.
    """
    source = path(pattern)
    with as_os_errors(source):
        return [
            f"{pattern[:5]}{name}"
            for name, about in file_system(source).glob(pattern, detail=True).items()
            if about["type"] == "file"
        ]


def local(value: str | os.PathLike, without: str = "") -> pathlib.Path:
    """Returns the path of a file or folder on a disk, with a copy of what is in a bucket.

    The copy is in the cache folder and has the name of the original. Only objects that are new or
    have changed are copied again. Processes of one host share the copy.

    Args:
      value: a path on a disk, which is returned as it is, or in a bucket.
      without: the name of a folder in it that is not copied.

    Raises:
      UserError: nothing is there, it cannot be read, or the disk is full.
    """
    if not is_bucket(value):
        return pathlib.Path(value)
    source = path(value)
    address = os.fspath(source)
    folder = cache_folder() / CACHE / hashlib.sha256(address.encode()).hexdigest()[:16]
    target = folder / source.name

    def wait() -> None:
        print(f"waiting for another process that copies {address}", file=sys.stderr)

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with file_lock.hold(folder / "lock", wait):
            download(source, target, without)
    except FileNotFoundError as error:
        raise UserError(f"there is nothing at {address}") from error
    except OSError as error:
        sentence = f"{address} cannot be copied to {target.parent}: {reason(error)}"
        raise UserError(sentence) from error
    return target


def download(source: pathlib.Path, target: pathlib.Path, without: str = "") -> None:
    """Copies a file or folder from a bucket to a disk. What is there and unchanged is not copied.

    A file has the time of its object. The file `.NAME.objects` beside the target lists what was
    copied.

    Args:
      source: the file or folder in the bucket.
      target: its path on the disk.
      without: the name of a folder in it that is not copied.

    Raises:
      OSError: nothing is there, it cannot be read, or the disk is full.
    """
    log = target.with_name(f".{target.name}.objects")
    with as_os_errors(source):
        _update(os.fspath(source), target, log, without)


def upload(
    folder: pathlib.Path, target: pathlib.Path, last: str, is_complete_folder: bool = True
) -> None:
    """Copies a folder on a disk to a bucket, or a file of it last.

    Args:
      folder: the folder on a disk.
      target: the folder in the bucket.
      last: the name of a file. The target is complete if it exists: it is removed first and copied
        last.
      is_complete_folder: whether other objects in the target are removed.

    Raises:
      OSError: a file cannot be written.
    """
    names = [str(file.relative_to(folder)) for file in sorted(folder.rglob("*")) if file.is_file()]
    remove(target / last)
    with as_os_errors(target):
        files, start = file_system(target), os.fspath(target)

        def put(name: str) -> None:
            files.put_file(str(folder / name), f"{start}/{name}")

        if is_complete_folder and (others := sorted(set(_objects(start)) - set(names))):
            _remove_objects(target, others)
        _each(put, [name for name in names if name != last])
        put(last)


def reason(error: BaseException) -> str | None:
    """Returns the reason of an error of a disk or of a bucket; None for other errors."""
    package = type(error).__module__.partition(".")[0]
    text = " ".join(str(error).split())
    if isinstance(error, PermissionError) or text.startswith("Forbidden"):
        return "the permission is missing"
    if type(error).__name__ in ("DefaultCredentialsError", "RefreshError", "NoCredentialsError"):
        return "no valid credentials were found"
    if getattr(error, "code", None) in (401, "401"):
        return "the credentials are not valid"
    if isinstance(error, OSError):
        return error.strerror or text or type(error).__name__
    if package in ("gcsfs", "aiohttp", "botocore", "google", "requests"):
        return f"the storage does not answer as it should ({text or type(error).__name__})"
    return None


def _configure() -> None:
    """Sets the defaults of fsspec's file systems; before the first of them is made."""
    # Without credentials gcsfs waits a minute for the kind of the bucket.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    import fsspec.config

    for name in ("gs", "gcs", "s3"):
        # Other processes write too, so a listing may be old.
        fsspec.config.conf.setdefault(name, {}).setdefault("use_listings_cache", False)


def file_system(target: str | os.PathLike) -> Any:
    """Returns the file system of fsspec for a path in a bucket."""
    _configure()
    import fsspec

    return fsspec.filesystem(os.fspath(target)[:2])


def _objects(address: str) -> dict[str, tuple[int, str, int]]:
    """Returns the size, version and time (in ns) of the objects below an address, by relative name.

    The relative name of an object with this very address is "".
    """
    files, start = file_system(address), address[5:].rstrip("/")
    return {
        name.removeprefix(start).removeprefix("/"): (
            int(about["size"]),
            str(about.get("generation") or about.get("ETag")),
            # A generation is the time of the write in microseconds.
            1000 * int(about["generation"])
            if "generation" in about
            else int(about["LastModified"].timestamp()) * 10**9,
        )
        for name, about in files.find(start, detail=True).items()
        if about["type"] == "file"
    }


def _update(address: str, target: pathlib.Path, log: pathlib.Path, without: str) -> None:
    """Copies the objects of an address that `log` does not have, and adds them to it."""
    objects = _objects(address)
    if without:
        objects = {
            name: about for name, about in objects.items() if not name.startswith(f"{without}/")
        }
    if not objects:
        raise FileNotFoundError(None, "nothing is there")
    copied = {}
    if log.exists():
        for line in log.read_text().splitlines():
            with contextlib.suppress(ValueError):  # a process was killed while it wrote the line
                name, *about = json.loads(line)
                copied[name] = tuple(about)
    for name in set(copied) - set(objects):
        (target / name).unlink(missing_ok=True)
    if "" in objects and target.is_dir():
        shutil.rmtree(target)
    elif "" not in objects and target.is_file():
        target.unlink()
    missing = [
        name
        for name, about in objects.items()
        if copied.get(name) != about or not (target / name).exists()
    ]
    size = sum(objects[name][0] for name in missing)
    if size > _ANNOUNCED:
        print(f"copying {size / 1e9:.1f} GB from {address} to {target}", file=sys.stderr)
    files = file_system(address)

    def get(name: str) -> None:
        file = target / name
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f".{file.name}.part")
        files.get_file(f"{address}/{name}".rstrip("/"), str(part))
        if part.stat().st_size != objects[name][0]:
            raise OSError(None, f"{name} changed while it was copied; run the command again")
        os.utime(part, ns=(objects[name][2], objects[name][2]))
        os.replace(part, file)
        with log.open("a") as lines:  # one call of write, so lines of threads do not mix
            lines.write(json.dumps([name, *objects[name]]) + "\n")

    _each(get, missing)


def _remove_objects(target: pathlib.Path, names: Iterable[str]) -> None:
    start = os.fspath(target)
    file_system(target).rm([f"{start}/{name}".rstrip("/") for name in names])


def _each(function: Callable[[str], None], names: Iterable[str]) -> None:
    """Calls a function for each name, in threads; raises the first exception."""
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as executor:
        futures = [executor.submit(function, name) for name in names]
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()
        except BaseException:
            executor.shutdown(cancel_futures=True)
            raise


@contextlib.contextmanager
def as_os_errors(target: pathlib.Path) -> Iterator[None]:
    """Converts exceptions of the packages for buckets to OSErrors with a reason and the address."""
    try:
        yield
    except (FileNotFoundError, FileExistsError):
        raise
    except Exception as error:
        if (sentence := reason(error)) is None:
            raise
        raise OSError(getattr(error, "errno", None), sentence, os.fspath(target)) from error
