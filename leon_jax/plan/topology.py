"""Describes TPU slices for the compiler, without the hardware."""

import contextlib
import dataclasses
import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.experimental import topologies

from leon_jax.config import UserError
from leon_jax.train import peak_flops
from leon_jax.train.peak_flops import Chip


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice of a TPU pod.

    Attributes:
      name: the name, for example `v5p:8x8x4`.
      chip: the type of chip.
      chips: number of chips.
      devices: descriptions of the JAX devices; one chip may have two devices.
    """

    name: str
    chip: Chip
    chips: int
    devices: tuple[jax.Device, ...]

    @property
    def share(self) -> float:
        """The fraction of a chip that a device has: 1 or 1/2."""
        return self.chips / len(self.devices)


def find(name: str) -> Topology:
    """Returns the topology of this name, `CHIP:AxB` or `CHIP:AxBxC`.

    Raises:
      UserError: the chip or shape is unknown, or the TPU compiler is not installed.
    """
    tpus = [chip for chip in peak_flops.CHIPS if chip.ici_bandwidth]
    shape = re.fullmatch(r"(\w+):([1-9]\d*(?:x[1-9]\d*)+)", name)
    chip = next((chip for chip in tpus if shape and chip.name == shape[1]), None)
    if shape is None or chip is None or shape[2].count("x") != chip.torus - 1:
        known = ", ".join(f"{chip.name}:{'AxBxC'[: 2 * chip.torus - 1]}" for chip in tpus)
        raise UserError(
            f"--topology={name} must be a chip and a shape, for example v5p:8x8x4; "
            f"the chips are {known}"
        )
    # On v4 JAX uses both cores of a chip as one device; the default description has two.
    options: dict[str, Any] = {"chip_config_name": "megacore"} if chip.name == "v4" else {}
    sizes = [int(size) for size in shape[2].split("x")]
    if _wraps(sizes):
        options["wrap"] = (True, True, True)
    try:
        with _quiet():
            topology = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"--topology={name} is not a shape of {chip.name} that the compiler supports; the "
            "shape must consist of whole hosts, for example 4x4 or 4x4x4"
        ) from error
    except RuntimeError as error:
        raise UserError(
            "the TPU compiler is not installed; run pip install 'leon_jax[tpu]', or run make tpu "
            "and set TPU_LIBRARY_PATH=.tpu/libtpu/libtpu.so"
        ) from error
    return Topology(name, chip, math.prod(sizes), tuple(topology.devices))


def _wraps(sizes: Sequence[int]) -> bool:
    """Returns whether the links of a slice close to rings.

    Those of a three-dimensional slice do if it consists of whole cubes of 4x4x4 chips, which
    optical switches connect; those of a two-dimensional one if it is a whole pod of 16x16 chips.
    The compiler otherwise assumes that no links do.
    """
    if len(sizes) == 3:
        return all(size % 4 == 0 for size in sizes)
    return all(size == 16 for size in sizes)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides libtpu's warnings on file descriptor 2 about the missing TPU."""
    sys.stderr.flush()
    saved_stderr = os.dup(2)
    with open(os.devnull, "wb") as null_device:
        os.dup2(null_device.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved_stderr, 2)
        os.close(saved_stderr)
