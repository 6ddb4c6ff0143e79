"""The rendered emoji dataset for tests, which is rendered once and reused.

LEON_TEST_DATA names its folder; the default is the folder of `make demo`.
"""

import functools
import os
from pathlib import Path

from leon_jax.datasets import demo


@functools.cache
def data_dir() -> str:
    """Returns the `data_dir` of a rendered emoji dataset."""
    folder = os.environ.get("LEON_TEST_DATA", Path(__file__).resolve().parents[1] / "data/emoji")
    demo.make_dataset(folder)
    return os.fspath(folder)
