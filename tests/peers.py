"""Runs other projects' implementations in `.venv-peers` (`make peers`).

The two environments share only files: arrays are passed in both directions as safetensors.
"""

import os
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]

# Runs in the peers' interpreter: loads arrays, calls the script's `main`, saves its result.
_HARNESS = """
import runpy, sys
from safetensors.numpy import load_file, save_file
script, inputs, outputs = sys.argv[1:]
save_file(runpy.run_path(script)["main"](load_file(inputs)), outputs)
"""


def peers_python() -> Path:
    """Returns the interpreter of the peers' environment.

    Without the environment, the calling test is skipped. It fails if LEON_REQUIRE_PEERS is set, so
    that a machine that must compare never skips the comparison unnoticed.
    """
    if (ROOT / ".venv-peers" / ".installed").exists():
        return ROOT / ".venv-peers" / "bin" / "python"
    reason = "compares with PyTorch, which is not installed here; `make peers` installs it"
    if os.environ.get("LEON_REQUIRE_PEERS", "") not in ("", "0"):
        pytest.fail(f"LEON_REQUIRE_PEERS is set, and this test {reason}")
    pytest.skip(reason)


def run_peer(script: Path, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Runs a script of the peers and returns the arrays it computed.

    Args:
      script: a Python file that defines `main(arrays: dict) -> dict`, both of NumPy arrays by name.
        It may import the packages in requirements/peers.in, but not leon_jax.
      arrays: the argument of `main`.

    Raises:
      AssertionError: the script failed; the message ends with its error output.
    """
    python = peers_python()
    with tempfile.TemporaryDirectory() as folder:
        inputs, outputs = Path(folder, "inputs.safetensors"), Path(folder, "outputs.safetensors")
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, inputs)
        # Our environment variables must not leak in, and libraries there must not use the network.
        environment = {
            k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")
        }
        environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        result = subprocess.run(
            [python, "-c", _HARNESS, script, inputs, outputs],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert result.returncode == 0, f"{script.name} failed:\n{result.stderr[-4000:]}"
        return load_file(outputs)
