import pytest

from tests import emoji_data


@pytest.fixture(scope="session")
def emoji_data_dir() -> str:
    return emoji_data.data_dir()
