"""Finds the compiler for TPUs (`make tpu` installs it)."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def environment() -> dict[str, str]:
    """Returns the environment variables of a process that compiles for TPUs without having one.

    Without the compiler, the calling test is skipped, or fails if LEON_REQUIRE_PEERS is set.
    """
    library = ROOT / ".tpu" / "libtpu" / "libtpu.so"
    if not library.exists():
        reason = "compiles for TPUs, and their compiler is not installed; `make tpu` installs it"
        if os.environ.get("LEON_REQUIRE_PEERS", "") not in ("", "0"):
            pytest.fail(f"LEON_REQUIRE_PEERS is set, and this test {reason}")
        pytest.skip(reason)
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "TPU_LIBRARY_PATH": str(library),
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "JAX_PLATFORMS": "cpu",
    }
