"""Fixtures for all tests."""

import jax
import pytest

from leon_jax import sharding
from tests import emoji_data


@pytest.fixture(autouse=True)
def one_device_mesh():
    """Every test runs under a one-device mesh unless it sets its own."""
    with jax.set_mesh(sharding.make_mesh((1, 1, 1, 1), jax.devices()[:1])):
        yield


@pytest.fixture(scope="session")
def emoji_data_dir() -> str:
    """The folder of the rendered emoji dataset."""
    return emoji_data.data_dir()
