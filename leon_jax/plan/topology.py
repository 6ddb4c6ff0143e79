"""TPU pods that are not there, as JAX's compiler for TPUs describes them."""

import contextlib
import dataclasses
import math
import os
import re
import sys
from collections.abc import Iterator

import jax
from jax.experimental import topologies

from leon_jax.config import UserError
from leon_jax.train import peak_flops
from leon_jax.train.peak_flops import Chip


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice of a pod.

    Attributes:
      name: for example `v5p:8x8x4`.
      chip: what it is made of.
      chips: how many.
      devices: descriptions of JAX devices; a chip may be two of them.
    """

    name: str
    chip: Chip
    chips: int
    devices: tuple[jax.Device, ...]

    @property
    def share(self) -> float:
        """The part of a chip that a device is."""
        return self.chips / len(self.devices)


def find(name: str) -> Topology:
    """The topology of this name, `CHIP:AxB` or `CHIP:AxBxC`.

    Raises:
      UserError: there is no such chip or shape, or the compiler for TPUs is not installed.
    """
    kinds = [chip for chip in peak_flops.CHIPS if chip.ici_bandwidth]
    shape = re.fullmatch(r"(\w+):([1-9]\d*(?:x[1-9]\d*)+)", name)
    chip = next((chip for chip in kinds if shape and chip.name == shape[1]), None)
    if shape is None or chip is None or shape[2].count("x") != chip.torus - 1:
        known = ", ".join(f"{chip.name}:{'AxBxC'[: 2 * chip.torus - 1]}" for chip in kinds)
        raise UserError(
            f"--topology={name} must be a chip and a shape, for example v5p:8x8x4; "
            f"there are {known}"
        )
    # On v4 JAX runs both cores of a chip as one device; the compiler would describe two.
    options = {"chip_config_name": "megacore"} if chip.name == "v4" else {}
    try:
        with _quiet():
            topology = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"--topology={name} is not a shape of {chip.name} that the compiler knows; its sides "
            "must be whole hosts, for example 4x4 or 4x4x4"
        ) from error
    except RuntimeError as error:
        raise UserError(
            "the compiler for TPUs is not installed: pip install 'leon_jax[tpu]', or make tpu and "
            "TPU_LIBRARY_PATH=.tpu/libtpu/libtpu.so"
        ) from error
    chips = math.prod(int(size) for size in shape[2].split("x"))
    return Topology(name, chip, chips, tuple(topology.devices))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides what libtpu says on file descriptor 2 when it finds no TPU, which is expected here."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
