"""Every test runs under a one-device mesh unless it sets its own."""

import jax
import pytest

from leon_jax import sharding


@pytest.fixture(autouse=True)
def one_device_mesh():
    with jax.set_mesh(sharding.make_mesh((1, 1, 1, 1), jax.devices()[:1])):
        yield
