"""Where tests find the rendered emoji dataset: it is made once and kept.

LEON_TEST_DATA names the folder; without it, it is the one that `make demo` uses.
"""

import functools
import os
from pathlib import Path

from leon_jax.datasets import demo


@functools.cache
def data_dir() -> str:
    """The `data_dir` of a prepared emoji dataset."""
    folder = os.environ.get("LEON_TEST_DATA", Path(__file__).resolve().parents[1] / "data/emoji")
    demo.make_dataset(folder)
    return os.fspath(folder)
