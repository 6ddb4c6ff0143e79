"""Named options of the XLA compiler for the training step, by accelerator.

The options are given to the compilation of the step (`jax.stages.Lowered.compile`), so they need no
environment variable, and `leon plan` uses the same ones. By default the compiler runs collectives
one after the other with the arithmetic. The presets let them run at the same time.

Sources: MaxText's collection of flags for TPUs (github.com/AI-Hypercomputer/maxtext,
benchmarks/xla_flags_library.py), and NVIDIA's page on JAX
(docs.nvidia.com/jax-toolbox/performance-profiling/gpu-performance). The effects on memory and on
the number of asynchronous collectives are in docs/plans.md.
"""

from collections.abc import Mapping

import jax

from leon_jax.config import UserError

AUTO = "auto"

# The SparseCores gather and scatter while the TensorCores compute.
_SPARSE_CORES = {
    **{
        f"xla_tpu_enable_sparse_core_collective_offload_{kind}": "true"
        for kind in ("all_gather", "2d_all_gather", "reduce_scatter", "all_reduce")
    },
    "xla_tpu_use_tc_device_shape_on_sc": "true",
    "xla_sc_disable_megacore_partitioning": "true",
}
PRESETS: dict[str, Mapping[str, str]] = {
    # The chip has no SparseCores; matrix products are split to hide pieces of collectives. These
    # are the defaults of libtpu 0.0.50, written down.
    "v5e": {
        "xla_tpu_enable_async_collective_fusion": "true",
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
        "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
        "xla_tpu_overlap_compute_collective_tc": "true",
        "xla_enable_async_all_gather": "true",
    },
    "v5p": _SPARSE_CORES,
    # Larger tiles of matrix products in the larger vector memory.
    "v6e": {**_SPARSE_CORES, "xla_tpu_scoped_vmem_limit_kib": "98304"},
    "tpu7x": {**_SPARSE_CORES, "xla_tpu_scoped_vmem_limit_kib": "65536"},
    "gpu": {
        "xla_gpu_enable_latency_hiding_scheduler": "true",
        "xla_gpu_enable_pipelined_all_gather": "true",
        "xla_gpu_enable_pipelined_reduce_scatter": "true",
        "xla_gpu_enable_pipelined_all_reduce": "true",
        "xla_gpu_enable_while_loop_double_buffering": "true",
    },
}
# Beginnings of `jax.Device.device_kind` of TPUs.
_KINDS = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v6": "v6e",
    "TPU7": "tpu7x",
    "TPU v7": "tpu7x",
}


def options(name: str, device: jax.Device) -> Mapping[str, str]:
    """Returns the compiler options of a preset.

    Args:
      name: a key of `PRESETS`; "auto": the preset of the device, or none if it has none; "": none.
      device: a device of the mesh.

    Raises:
      UserError: the preset does not exist, or is for other devices.
    """
    fitting = preset_of(device)
    if name in ("", AUTO):
        return PRESETS.get(fitting, {}) if name else {}
    if name not in PRESETS:
        choices = ", ".join((AUTO, *PRESETS))
        raise UserError(f"config.loop.compiler is {name!r}; it must be empty or one of {choices}")
    if name != fitting:
        raise UserError(
            f"config.loop.compiler is {name!r}, but the devices are {device.device_kind}; "
            + (f"set {fitting!r} or {AUTO!r}" if fitting else f"leave it empty, or set {AUTO!r}")
        )
    return PRESETS[name]


def preset_of(device: jax.Device) -> str:
    """Returns the name of the preset of a device; "" if there is none."""
    if device.platform in ("gpu", "cuda", "rocm"):
        return "gpu"
    return next((name for kind, name in _KINDS.items() if device.device_kind.startswith(kind)), "")
