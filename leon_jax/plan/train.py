"""Plans training: compiles the training step for a topology and searches for settings that fit."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax

from leon_jax import sharding
from leon_jax.config import UserError
from leon_jax.plan import plan as plans
from leon_jax.plan import roofline
from leon_jax.plan.plan import DoesNotFit, Plan, Roofline
from leon_jax.plan.topology import Topology
from leon_jax.train.decoder import DecoderProgram, check_divisible
from leon_jax.train.decoder_config import DecoderTraining
from leon_jax.train.decoder_loss import BATCH_DTYPES
from leon_jax.train.training_loop import skip_nonfinite

# Remat policies, from the one that recomputes nothing to the one that stores least.
REMAT = ("none", "dots", "attention", "full")
MICROBATCHES = (1, 2, 4, 8)


@dataclasses.dataclass(frozen=True)
class Setting:
    """Settings that do not change the model or the update.

    Attributes:
      mesh: sizes of the axes (data, fsdp, context, tensor), without -1.
      remat: see `DecoderConfig`.
      microbatches: see `DecoderTraining`.
    """

    mesh: tuple[int, ...]
    remat: str
    microbatches: int

    def apply(self, config: DecoderTraining) -> DecoderTraining:
        """Returns the configuration with this remat policy and number of microbatches."""
        model = dataclasses.replace(config.model, remat=self.remat)  # type: ignore[arg-type]
        return dataclasses.replace(config, model=model, microbatches=self.microbatches)

    def changes(self, other: "Setting") -> str:
        """Returns the differences from another setting, as command-line flags."""
        flags = []
        if self.remat != other.remat:
            flags.append(f"--config.model.remat={self.remat}")
        if self.microbatches != other.microbatches:
            flags.append(f"--config.microbatches={self.microbatches}")
        if self.mesh != other.mesh:
            flags.append(f"--mesh={','.join(map(str, self.mesh))}")
        return " ".join(flags)


def plan(config: DecoderTraining, topology: Topology, setting: Setting) -> Plan:
    """Compiles a training step.

    Raises:
      UserError: the mesh cannot split the batch or the model evenly.
      DoesNotFit: the program needs more memory than a device has.
    """
    config = setting.apply(config)
    program = DecoderProgram(config)
    with jax.set_mesh(sharding.make_mesh(setting.mesh, topology.devices)):
        state = jax.eval_shape(program.init, jax.eval_shape(jax.random.key, 0))
        shape = config.batch_size, config.data.length
        batch = {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.batch_sharding())
            for name, dtype in BATCH_DTYPES.items()
        }
        memory, collectives, seconds = plans.compile_for(
            lambda: jax.jit(skip_nonfinite(program.step), donate_argnums=0).lower(state, batch),
            {"parameters": state.model, "optimizer": state.opt_state},
            topology,
        )
    state_bytes = memory.parameters + memory.optimizer
    bound = _roofline(config, topology, setting, state_bytes, plans.sent_bytes(collectives))
    return Plan(
        program="train",
        topology=topology.name,
        chips=topology.chips,
        devices=len(topology.devices),
        setting=dataclasses.asdict(setting),
        parameters=config.model.parameter_count(),
        memory=memory,
        collectives=collectives,
        rooflines={"step": bound},
        figures=_figures(config, topology, bound),
        compile_seconds=seconds,
    )


def search(
    config: DecoderTraining,
    topology: Topology,
    setting: Setting,
    report: Callable[[str], None],
    attempts: int = 32,
) -> Plan | None:
    """Searches for the fastest setting that fits, or for the smallest change that makes it fit.

    If `setting` fits, the result is the plan with the smallest sum of arithmetic and collective
    time. The search goes first over remat policies and microbatches, then over the sizes of `data`
    and `fsdp` with the best of those. If `setting` does not fit, the result is the plan of the
    smallest change that fits: the same mesh before another one, one key before two, and less
    recomputation before more.

    Args:
      config: the configuration of the run.
      topology: the devices.
      setting: where the search starts.
      report: is called with a line about each attempt.
      attempts: maximum number of changes to compile if `setting` does not fit.

    Returns:
      The plan, or None if nothing fits.
    """

    def attempt(other: Setting, name: str = "") -> Plan | None:
        name = name or other.changes(setting)
        try:
            result = plan(config, topology, other)
        except DoesNotFit as error:
            report(f"{name}: does not fit: {error}")
            return None
        bound = result.rooflines["step"]
        report(f"{name}: fits, {bound.seconds:.3g} to {bound.serial_seconds:.3g} s a step at least")
        return result

    def first(others: Iterable[Setting]) -> Plan | None:
        return next((result for other in others if (result := attempt(other))), None)

    def faster(best: Plan, other: Plan | None) -> Plan:
        seconds = best.rooflines["step"].serial_seconds
        return other if other and other.rooflines["step"].serial_seconds < seconds else best

    best = attempt(setting, "as configured")
    if best is None:
        smaller = [o for o in candidates(config, topology, setting) if _saves_memory(o, setting)]
        return first(sorted(smaller, key=lambda other: _distance(other, setting))[:attempts])
    for remat in REMAT[: REMAT.index(setting.remat) + 1]:
        # Fewer microbatches gather the weights less often, so the first that fits is the fastest.
        counts = [n for n in MICROBATCHES if remat != setting.remat or n < setting.microbatches]
        settings = (Setting(setting.mesh, remat, count) for count in counts)
        best = faster(best, first(other for other in settings if is_divisible(config, other)))
    best_setting = Setting(**best.setting)
    for mesh in _other_splits(setting.mesh):
        other = dataclasses.replace(best_setting, mesh=mesh)
        if is_divisible(config, other):
            best = faster(best, attempt(other))
    return best


def candidates(config: DecoderTraining, topology: Topology, setting: Setting) -> Iterator[Setting]:
    """Yields all other settings that split rows, weights and tokens evenly."""
    devices = len(topology.devices)
    meshes = [setting.mesh, *_other_splits(setting.mesh)]
    for tensor, context in itertools.product((1, 2, 4, 8), (1, 2, 4)):
        fsdp, remainder = divmod(devices, tensor * context)
        if not remainder:
            meshes.append((1, fsdp, context, tensor))
    counts = sorted({*MICROBATCHES, setting.microbatches})
    for mesh, remat, microbatches in itertools.product(dict.fromkeys(meshes), REMAT, counts):
        other = Setting(mesh, remat, microbatches)
        if other != setting and is_divisible(config, other):
            yield other


def is_divisible(config: DecoderTraining, setting: Setting) -> bool:
    """Returns whether a setting splits the batch and the model evenly."""
    try:
        check_divisible(setting.apply(config), setting.mesh)
    except UserError:
        return False
    return True


def _other_splits(mesh: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Returns meshes of the same devices with other sizes of `data` and `fsdp`."""
    product = mesh[0] * mesh[1]
    sizes = [fsdp for fsdp in (product, 64, 32, 16) if product % fsdp == 0]
    meshes = dict.fromkeys((product // fsdp, fsdp, *mesh[2:]) for fsdp in sizes)
    return [other for other in meshes if other != mesh]


def _saves_memory(other: Setting, setting: Setting) -> bool:
    """Returns whether another setting can need less memory."""
    return (
        REMAT.index(other.remat) >= REMAT.index(setting.remat)
        and other.microbatches >= setting.microbatches
        # Replicas along `data` save no memory.
        and other.mesh[0] <= setting.mesh[0]
    )


def _distance(other: Setting, setting: Setting) -> tuple:
    """Returns a sort key for the size of a change: the mesh, the number of keys, then the cost."""
    is_new_mesh = other.mesh != setting.mesh
    keys = (
        (other.remat != setting.remat) + (other.microbatches != setting.microbatches) + is_new_mesh
    )
    split = other.mesh[2] * other.mesh[3]
    return is_new_mesh, keys, split, REMAT.index(other.remat), other.microbatches


def _roofline(config, topology, setting, state_bytes, sent_bytes) -> Roofline:
    _, fsdp, _, tensor = setting.mesh
    tokens = config.batch_size * config.data.length * tensor // len(topology.devices)
    work = roofline.training_work(
        config.model,
        config.data.length,
        tokens,
        state_bytes,
        fsdp,
        tensor,
        setting.microbatches,
        config.loss_chunk,
    )
    return Roofline.of(work, sent_bytes, topology)


def _figures(config: DecoderTraining, topology: Topology, bound: Roofline) -> dict[str, Any]:
    tokens = config.batch_size * config.data.length
    needed = config.model.flops_per_token(config.data.length) * tokens
    executed = roofline.training_flops(config.model, config.data.length) * tokens
    seconds, peak = bound.seconds, topology.chip.flops * topology.chips
    days = config.steps * seconds / 86400
    return {
        "tokens_per_step": tokens,
        "flops_per_step": needed,
        "executed_flops_per_step": executed,
        "seconds_per_step": seconds,
        "mfu_bound": needed / (seconds * peak),
        "mfu_serial": needed / (bound.serial_seconds * peak),
        "tokens_per_second": tokens / seconds,
        "steps": config.steps,
        "days": days,
        "chip_hours": days * 24 * topology.chips,
    }
