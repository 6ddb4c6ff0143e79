"""Fixtures of the tests of preparing."""

import pytest

from tests import tiny


@pytest.fixture(scope="module")
def checkpoint():
    return tiny.folders()[0]


@pytest.fixture
def out(tmp_path):
    return tmp_path / "prepared"
