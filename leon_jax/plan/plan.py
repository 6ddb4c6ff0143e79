"""What is known of a program before it runs: memory, traffic, and how fast it can be at most."""

import dataclasses
import math
import re
import time
from collections.abc import Callable
from typing import Any, Literal, Self

import jax
import numpy as np

from leon_jax.plan.collectives import Collective, collectives
from leon_jax.plan.roofline import Work
from leon_jax.plan.topology import Topology


class DoesNotFit(Exception):
    """The compiler found no room; the message says how much is needed and there."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device.

    Attributes:
      parameters, optimizer: of the state.
      activations: everything else that lives at the peak.
      peak: the most that lives at once, in the compiler's schedule.
      capacity: what the device has.
      cache: keys and values while answering.
    """

    parameters: float
    optimizer: float
    activations: float
    peak: float
    capacity: float
    cache: float = 0.0


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds that a program cannot be faster than, by what limits it.

    Attributes:
      compute: its arithmetic at the chip's peak.
      memory: its traffic at the bandwidth of device memory.
      links: its collectives at the bandwidth of all links to other chips together.
    """

    compute: float
    memory: float
    links: float

    @classmethod
    def of(cls, work: Work, sent: float, topology: Topology) -> Self:
        """The roofline of one device's work and the bytes it sends."""
        chip, share = topology.chip, topology.share
        return cls(
            work.flops / (chip.flops * share),
            work.hbm_bytes / (chip.hbm_bandwidth * share),
            sent / chip.ici_bandwidth,  # what stays within a chip does not use its links
        )

    @property
    def seconds(self) -> float:
        """With everything else hidden behind what takes longest: no run is faster."""
        return max(self.compute, self.memory, self.links)

    @property
    def serial_seconds(self) -> float:
        """With no collective hidden behind arithmetic."""
        return max(self.compute, self.memory) + self.links

    @property
    def limit(self) -> str:
        """What takes longest."""
        return max(("compute", "memory", "links"), key=lambda name: getattr(self, name))


@dataclasses.dataclass(frozen=True)
class Plan:
    """One compiled program.

    Attributes:
      program: `train`: a step; `decode`: pictures for a batch of prompts.
      topology, chips, devices: where it would run.
      setting: what was chosen: mesh, remat, microbatches, ...
      parameters: of the model.
      memory: of a device.
      collectives: by kind, one device, one execution.
      rooflines: by part of the program; a training step has one.
      figures: what follows from them, by name (see docs/plans.md).
      compile_seconds: what compiling took here.
    """

    program: Literal["train", "decode"]
    topology: str
    chips: int
    devices: int
    setting: dict[str, Any]
    parameters: int
    memory: Memory
    collectives: dict[str, Collective]
    rooflines: dict[str, Roofline]
    figures: dict[str, float]
    compile_seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain values, rooflines with their bound."""
        plain = dataclasses.asdict(self)
        for name, roofline in self.rooflines.items():
            plain["rooflines"][name] |= {"seconds": roofline.seconds, "limit": roofline.limit}
        return plain


def compile_for(
    lower: Callable[[], jax.stages.Lowered],
    state: dict[str, Any],
    topology: Topology,
    iterations: int = 1,
) -> tuple[Memory, dict[str, Collective], float]:
    """(memory, collectives, seconds of compiling) of a program on a topology's devices.

    Args:
      lower: lowers the program.
      state: trees of abstract arrays that it holds, `parameters`, `optimizer` and `cache`.
      topology: gives the capacity.
      iterations: see `leon_jax.plan.collectives.collectives`.

    Raises:
      DoesNotFit: it needs more memory than a device has.
    """
    start = time.monotonic()
    lowered = lower()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "hbm" not in str(error).lower():
            raise
        raise DoesNotFit(memory_shortage(str(error))) from error
    seconds = time.monotonic() - start
    figures, text = compiled.memory_analysis(), compiled.as_text()
    assert figures is not None and text is not None  # the compiler for TPUs gives both
    peak = float(figures.peak_memory_in_bytes)
    held = {name: device_bytes(tree) for name, tree in state.items()}
    parameters, optimizer = held["parameters"], held.get("optimizer", 0.0)
    cache = held.get("cache", 0.0)
    memory = Memory(
        parameters,
        optimizer,
        peak - parameters - optimizer - cache,
        peak,
        topology.chip.hbm * topology.share,
        cache,
    )
    return memory, collectives(text, iterations), seconds


def device_bytes(tree: Any) -> float:
    """Bytes of one device's part of abstract arrays with shardings."""

    def size(leaf: Any) -> float:
        whole = leaf.sharding is None or not leaf.shape
        shape = leaf.shape if whole else leaf.sharding.shard_shape(leaf.shape)
        return math.prod(shape) * np.dtype(leaf.dtype).itemsize

    return float(sum(map(size, jax.tree.leaves(tree))))


def sent_bytes(found: dict[str, Collective]) -> float:
    """Bytes that a device sends in all kinds of collectives."""
    return sum(collective.bytes_sent for collective in found.values())


def memory_shortage(message: str) -> str:
    """How much memory is needed and there, with the numbers of the compiler's message."""
    # "Used 23G of 15.75G hbm", or "... (23G) exceeds available HBM (15.75G)".
    sizes = r"([\d.]+)([KMGT])(?: of |\) exceeds available HBM \()([\d.]+)([KMGT])"
    numbers = re.search(sizes, message)
    if numbers is None:
        return "it needs more memory than a device has"
    needed, needed_unit, capacity, capacity_unit = numbers.groups()
    return (
        f"it needs at least {needed} {needed_unit}iB of memory, and a device has "
        f"{capacity} {capacity_unit}iB"
    )
