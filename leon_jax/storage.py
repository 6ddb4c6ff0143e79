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
import datetime
import email.utils
import errno
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
# The body of an upload: the description of the object, and its content.
_MULTIPART = (
    b"--part\r\nContent-Type: application/json\r\n\r\n%b\r\n"
    b"--part\r\nContent-Type: application/octet-stream\r\n\r\n%b\r\n--part--"
)
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
        with _as_os_errors(target):
            _file_system(target).pipe_file(os.fspath(target), data)
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
            with _as_os_errors(target):
                _file_system(target).put_file(str(temporary), os.fspath(target))
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
    with _as_os_errors(target):
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
    with _as_os_errors(source):
        files, start = _file_system(source), os.fspath(source)
        names = list(_objects(start))
        _each(lambda name: files.cp_file(f"{start}/{name}", f"{target}/{name}"), names)
        _remove_objects(source, names)


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
        with file_lock.hold(folder / "lock", wait), _as_os_errors(source):
            _update(address, target, folder / "objects.jsonl", without)
    except OSError as error:
        sentence = f"{address} cannot be copied to {target.parent}: {reason(error)}"
        raise UserError(sentence) from error
    return target


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
    with _as_os_errors(target):
        files, start = _file_system(target), os.fspath(target)

        def put(name: str) -> None:
            files.put_file(str(folder / name), f"{start}/{name}")

        if is_complete_folder and (others := sorted(set(_objects(start)) - set(names))):
            _remove_objects(target, others)
        _each(put, [name for name in names if name != last])
        put(last)


def read_generation(target: pathlib.Path) -> tuple[bytes, int, float]:
    """Reads an object of Cloud Storage and its generation, a number that each write changes.

    Returns:
      The content, the generation, and the seconds since it was written, by the server's clock.

    Raises:
      FileNotFoundError: there is no such object.
      OSError: it cannot be read.
    """
    files = _file_system(target)
    bucket, name = _bucket_and_name(target)
    with _as_os_errors(target):
        while True:
            headers, text = files.call("GET", "b/{}/o/{}", bucket, name)
            about = json.loads(text)
            generation = int(about["generation"])
            written = datetime.datetime.fromisoformat(about["updated"])
            age = email.utils.parsedate_to_datetime(headers["Date"]) - written
            with contextlib.suppress(FileNotFoundError):  # it was written again in between
                _, content = files.call(
                    "GET", "b/{}/o/{}", bucket, name, alt="media", generation=generation
                )
                return content, generation, max(0.0, age.total_seconds())


def write_generation(target: pathlib.Path, content: bytes, generation: int) -> int:
    """Writes an object of Cloud Storage if it has a generation.

    Args:
      target: the object.
      content: its new content, which no other process writes.
      generation: the generation that the object must have; 0: it must not exist.

    Returns:
      The new generation.

    Raises:
      FileExistsError: the object has another generation.
      OSError: it cannot be written.
    """
    files = _file_system(target)
    bucket, name = _bucket_and_name(target)
    with _as_os_errors(target):
        try:
            about = files.call(
                "POST",
                f"{files._location}/upload/storage/v1/b/{{}}/o",
                bucket,
                uploadType="multipart",
                ifGenerationMatch=str(generation),
                headers={"Content-Type": "multipart/related; boundary=part"},
                data=_MULTIPART % (json.dumps({"name": name}).encode(), content),
                json_out=True,
            )
            return int(about["generation"])
        except FileExistsError:
            # A request is repeated if its answer is lost, and then conflicts with itself.
            with contextlib.suppress(FileNotFoundError):
                written, new_generation, _ = read_generation(target)
                if written == content:
                    return new_generation
            raise


def remove_generation(target: pathlib.Path, generation: int) -> None:
    """Removes an object of Cloud Storage if it has a generation; nothing if it does not exist.

    Raises:
      FileExistsError: the object has another generation.
      OSError: it cannot be removed.
    """
    bucket, name = _bucket_and_name(target)
    with _as_os_errors(target), contextlib.suppress(FileNotFoundError):
        if read_generation(target)[1] != generation:
            raise FileExistsError(errno.EEXIST, "it has another generation", os.fspath(target))
        _file_system(target).call(
            "DELETE", "b/{}/o/{}", bucket, name, ifGenerationMatch=str(generation)
        )


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


def _file_system(target: str | os.PathLike) -> Any:
    _configure()
    import fsspec

    return fsspec.filesystem(os.fspath(target)[:2])


def _bucket_and_name(target: pathlib.Path) -> tuple[str, str]:
    bucket, _, name = os.fspath(target)[5:].partition("/")
    return bucket, name


def _objects(address: str) -> dict[str, tuple[int, str]]:
    """Returns the size and the version of each object below an address, by relative name.

    The relative name of an object with this very address is "".
    """
    files, start = _file_system(address), address[5:].rstrip("/")
    return {
        name.removeprefix(start).removeprefix("/"): (
            int(about["size"]),
            str(about.get("generation") or about.get("ETag") or ""),
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
                name, size, version = json.loads(line)
                copied[name] = (size, version)
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
    files = _file_system(address)

    def get(name: str) -> None:
        file = target / name
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f".{file.name}.part")
        files.get_file(f"{address}/{name}".rstrip("/"), str(part))
        if part.stat().st_size != objects[name][0]:
            raise OSError(None, f"{name} changed while it was copied; run the command again")
        os.replace(part, file)
        with log.open("a") as lines:  # one call of write, so lines of threads do not mix
            lines.write(json.dumps([name, *objects[name]]) + "\n")

    _each(get, missing)


def _remove_objects(target: pathlib.Path, names: Iterable[str]) -> None:
    start = os.fspath(target)
    _file_system(target).rm([f"{start}/{name}".rstrip("/") for name in names])


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
def _as_os_errors(target: pathlib.Path) -> Iterator[None]:
    """Converts exceptions of the packages for buckets to OSErrors with a reason and the address."""
    try:
        yield
    except (FileNotFoundError, FileExistsError):
        raise
    except Exception as error:
        if (sentence := reason(error)) is None:
            raise
        raise OSError(getattr(error, "errno", None), sentence, os.fspath(target)) from error
