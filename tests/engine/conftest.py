"""Small engines."""

import pytest

from leon_jax.engine.engine import Engine
from leon_jax.models.weight_conversion import unstack
from tests.engine.small import VOCABULARY, make


@pytest.fixture(params=[1, 4])
def either(request) -> Engine:
    """With parts that start anywhere, and with parts that start at every fourth position."""
    return make(request.param)


@pytest.fixture
def engine() -> Engine:
    """With layers that are split, as `Leon` has them."""
    made = make(4)
    return Engine(unstack(made.decoder), VOCABULARY, buckets=(8, 16))
