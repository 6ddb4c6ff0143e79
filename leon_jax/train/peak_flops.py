"""Peak performance of accelerator chips, used for MFU and for plans.

Sources: Google Cloud's pages "TPU v4", "v5e", "v5p", "v6e" and "TPU7x" for peak compute, HBM
capacity and HBM bandwidth. Their bidirectional interchip bandwidth counts every byte twice, so half
of it is used here. NVIDIA's data sheets for A100, H100 and H200 (SXM, dense bfloat16).
"""

import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak figures of one chip.

    Attributes:
      name: the common name.
      kinds: its names in `jax.Device.device_kind`.
      flops: bfloat16 operations per second.
      hbm: bytes of device memory.
      hbm_bandwidth: bytes per second.
      ici_bandwidth: bytes sent per second over all links to other chips; 0 if unknown.
      devices: number of JAX devices per chip.
      torus: number of axes of a TPU slice's network.
    """

    name: str
    kinds: tuple[str, ...]
    flops: float
    hbm: float
    hbm_bandwidth: float
    ici_bandwidth: float = 0.0
    devices: int = 1
    torus: int = 3


CHIPS = (
    Chip("v4", ("TPU v4",), 275e12, 32 * 2**30, 1228e9, 300e9),
    Chip("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 16 * 2**30, 819e9, 200e9, torus=2),
    Chip("v5p", ("TPU v5", "TPU v5p"), 459e12, 95 * 2**30, 2765e9, 600e9),
    Chip("v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 32 * 2**30, 1600e9, 400e9, torus=2),
    Chip("tpu7x", ("TPU7x", "TPU v7x"), 2307e12, 192 * 2**30, 7380e9, 600e9, devices=2),
    Chip("A100", ("NVIDIA A100-SXM4-80GB", "NVIDIA A100-SXM4-40GB"), 312e12, 80e9, 2039e9),
    Chip("H100", ("NVIDIA H100 80GB HBM3",), 989.4e12, 80e9, 3350e9),
    Chip("H200", ("NVIDIA H200",), 989.4e12, 141e9, 4800e9),
)


def find(device: jax.Device) -> Chip | None:
    """Returns the chip that a device belongs to; None if it is not listed, for example a CPU."""
    return next((chip for chip in CHIPS if device.device_kind in chip.kinds), None)


def peak_flops(devices: list[jax.Device]) -> float | None:
    """Returns the total bfloat16 operations per second of devices; None if unknown."""
    chips = [find(device) for device in devices]
    if not all(chips):
        return None
    return sum(chip.flops / chip.devices for chip in chips if chip)
