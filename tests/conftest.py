"""Fixtures for all tests."""

import gc
import os
import pathlib
import re
from collections.abc import Iterator
from unittest import mock

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from leon_jax import sharding, storage
from tests import emoji_data


@pytest.fixture(autouse=True)
def one_device_mesh():
    """Every test runs under a one-device mesh unless it sets its own."""
    with jax.set_mesh(sharding.make_mesh((1, 1, 1, 1), jax.devices()[:1])):
        yield


@pytest.fixture(autouse=True, scope="session")
def programs_on_disk(tmp_path_factory, worker_id) -> Iterator[pathlib.Path]:
    """Tests and the processes they start share compiled programs, in a folder of this session."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder if worker_id == "master" else folder.parent) / "compiled"
    variables = {
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    with mock.patch.dict(os.environ, variables):
        _use_programs_in(folder)
        yield folder


@pytest.fixture(autouse=True)
def use_programs_on_disk(programs_on_disk):
    """A command that a test runs may use another folder, but the tests after it do not."""
    yield
    if jax.config.jax_compilation_cache_dir != str(programs_on_disk):
        _use_programs_in(programs_on_disk)


@pytest.fixture
def no_programs_on_disk(monkeypatch):
    """A test compiles everything, or uses a folder for compiled programs that it sets."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """Lets go of compiled programs after modules that made many.

    Each takes mappings of memory, of which Linux allows a process 65,530; past that the compiler
    crashes.
    """
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 15_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def emoji_data_dir() -> str:
    """The folder of the rendered emoji dataset."""
    return emoji_data.data_dir()


@pytest.fixture(scope="session")
def cloud_storage(tmp_path_factory) -> Iterator[str]:
    """The address of a Cloud Storage server; gcsfs and TensorStore use it in this session."""
    from tests import buckets

    with (
        buckets.cloud_storage(tmp_path_factory.mktemp("cloud_storage")) as url,
        mock.patch.dict(os.environ, buckets.cloud_storage_environment(url)),
    ):
        yield url


@pytest.fixture
def gs_folder(cloud_storage, request) -> str:
    """The address of an empty folder in a `gs://` bucket."""
    return f"gs://bucket/{_folder_name(request)}"


@pytest.fixture(scope="session")
def s3_server() -> Iterator[None]:
    from tests import buckets

    with buckets.s3() as variables, mock.patch.dict(os.environ, variables):
        yield


@pytest.fixture
def s3_folder(s3_server, request) -> str:
    """The address of an empty folder in an `s3://` bucket."""
    return f"s3://bucket/{_folder_name(request)}"


@pytest.fixture(params=["gs", "s3"])
def bucket(request, tmp_path, monkeypatch) -> pathlib.Path:
    """An empty folder in a bucket of each kind; copies of it are below `tmp_path`."""
    monkeypatch.setenv("LEON_CACHE", str(tmp_path / "cache"))
    return storage.path(request.getfixturevalue(f"{request.param}_folder"))


def _use_programs_in(folder: pathlib.Path) -> None:
    jax.config.update("jax_compilation_cache_max_size", -1)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    compilation_cache.reset_cache()


def _folder_name(request) -> str:
    return re.sub(r"[^a-z0-9]+", "_", request.node.name.lower()).strip("_")
