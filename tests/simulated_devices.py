"""The environment of a process with several devices, which XLA simulates on the CPU."""

import os
import pathlib

ROOT = pathlib.Path(__file__).parents[1]


def environment(count: int = 8) -> dict[str, str]:
    """Returns this process's environment, with `count` devices and with the repository's modules.

    Other flags of XLA stay. `make test` and `make slowtest` set one that makes compiling faster.
    """
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": flags.strip(),
    }
