"""Fixtures for all tests."""

import gc
import pathlib

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from leon_jax import sharding
from tests import emoji_data


@pytest.fixture(autouse=True)
def one_device_mesh():
    """Every test runs under a one-device mesh unless it sets its own."""
    with jax.set_mesh(sharding.make_mesh((1, 1, 1, 1), jax.devices()[:1])):
        yield


@pytest.fixture(autouse=True)
def no_programs_on_disk():
    """A command that a test runs keeps compiled programs on disk; the tests after it do not."""
    yield
    if jax.config.jax_compilation_cache_dir is not None:
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
