"""Compiles a program for a topology and estimates its memory, traffic and minimum time."""

import dataclasses
import math
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, Self

import jax
import numpy as np

from leon_jax.plan.collectives import Collective, collectives
from leon_jax.plan.roofline import Work
from leon_jax.plan.topology import Topology


class DoesNotFit(Exception):
    """The program needs more memory than a device has; the message gives both numbers."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Memory of one device in bytes.

    Attributes:
      parameters: the model's parameters.
      optimizer: the optimizer's state.
      activations: everything else that is allocated at the peak.
      peak: the peak allocation in the compiler's schedule.
      capacity: the device's memory.
      cache: cached keys and values during generation.
    """

    parameters: float
    optimizer: float
    activations: float
    peak: float
    capacity: float
    cache: float = 0.0


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Lower bounds on the time of a program in seconds, by resource.

    Attributes:
      compute: arithmetic at the chip's peak rate.
      memory: traffic at the bandwidth of device memory.
      links: collectives at the total bandwidth of the links to other chips.
    """

    compute: float
    memory: float
    links: float

    @classmethod
    def of(cls, work: Work, sent: float, topology: Topology) -> Self:
        """Computes the roofline of one device's work and of the bytes that it sends."""
        chip, share = topology.chip, topology.share
        return cls(
            work.flops / (chip.flops * share),
            work.hbm_bytes / (chip.hbm_bandwidth * share),
            sent / chip.ici_bandwidth,  # not shared: traffic between a chip's devices uses no link
        )

    @property
    def seconds(self) -> float:
        """The lower bound if the resources are used in parallel: the slowest one."""
        return max(self.compute, self.memory, self.links)

    @property
    def serial_seconds(self) -> float:
        """The lower bound if no collective overlaps with compute or memory traffic."""
        return max(self.compute, self.memory) + self.links

    @property
    def limit(self) -> str:
        """The name of the slowest resource."""
        return max(("compute", "memory", "links"), key=lambda name: getattr(self, name))


@dataclasses.dataclass(frozen=True)
class Plan:
    """The plan of one compiled program.

    Attributes:
      program: `train`, a training step, or `decode`, the images of a batch of prompts.
      topology: name of the topology.
      chips, devices: number of chips and of JAX devices in the topology.
      setting: mesh, remat, microbatches and other choices, by name.
      parameters: number of the model's parameters.
      memory: memory of one device.
      collectives: collectives of one device in one execution, by kind.
      rooflines: by part of the program; a training step has one part.
      figures: derived numbers by name (see docs/plans.md).
      compile_seconds: seconds of compiling on this machine.
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
        """Returns JSON values; each roofline also has its bound and its slowest resource."""
        values = dataclasses.asdict(self)
        for name, roofline in self.rooflines.items():
            values["rooflines"][name] |= {"seconds": roofline.seconds, "limit": roofline.limit}
        return values


def compile_for(
    lower: Callable[[], jax.stages.Lowered],
    state: dict[str, Any],
    topology: Topology,
    iterations: int = 1,
    options: Mapping[str, str] | None = None,
) -> tuple[Memory, dict[str, Collective], float]:
    """Compiles a program for the devices of a topology.

    Args:
      lower: lowers the program.
      state: trees of the program's abstract arrays: `parameters`, `optimizer` and `cache`.
      topology: the devices and their memory.
      iterations: see `leon_jax.plan.collectives.collectives`.
      options: options of the compiler (see `leon_jax.train.compiler_presets`).

    Returns:
      The memory of a device, the collectives by kind, and the seconds of compiling.

    Raises:
      DoesNotFit: the program needs more memory than a device has.
    """
    start = time.monotonic()
    lowered = lower()
    try:
        compiled = lowered.compile(compiler_options=dict(options or {}))
    except jax.errors.JaxRuntimeError as error:
        if "hbm" not in str(error).lower():
            raise
        raise DoesNotFit(memory_shortage(str(error))) from error
    seconds = time.monotonic() - start
    figures, text = compiled.memory_analysis(), compiled.as_text()
    assert figures is not None and text is not None  # the TPU compiler returns both
    peak = float(figures.peak_memory_in_bytes)
    sizes = {name: device_bytes(tree) for name, tree in state.items()}
    parameters, optimizer = sizes["parameters"], sizes.get("optimizer", 0.0)
    cache = sizes.get("cache", 0.0)
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
    """Returns the bytes of one device's shards of abstract arrays."""

    def size(leaf: Any) -> float:
        is_replicated = leaf.sharding is None or not leaf.shape
        shape = leaf.shape if is_replicated else leaf.sharding.shard_shape(leaf.shape)
        return math.prod(shape) * np.dtype(leaf.dtype).itemsize

    return float(sum(map(size, jax.tree.leaves(tree))))


def sent_bytes(by_kind: dict[str, Collective]) -> float:
    """Returns the bytes that a device sends in all collectives."""
    return sum(collective.bytes_sent for collective in by_kind.values())


def memory_shortage(message: str) -> str:
    """Returns a message with the needed and the available memory of a compiler's error message."""
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
