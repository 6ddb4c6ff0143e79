"""Plans of training: the very step of `leon_jax.train.loop`, compiled for absent chips."""

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
from leon_jax.train.loop import skip_nonfinite

# From the one that computes nothing again to the one that keeps least.
REMAT = ("none", "dots", "attention", "full")
MICROBATCHES = (1, 2, 4, 8)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a plan may change without changing the model or the update.

    Attributes:
      mesh: sizes of (data, fsdp, context, tensor), without -1.
      remat: see `DecoderConfig`.
      microbatches: see `DecoderTraining`.
    """

    mesh: tuple[int, ...]
    remat: str
    microbatches: int

    def apply(self, config: DecoderTraining) -> DecoderTraining:
        """The configuration with this remat policy and so many microbatches."""
        model = dataclasses.replace(config.model, remat=self.remat)  # type: ignore[arg-type]
        return dataclasses.replace(config, model=model, microbatches=self.microbatches)

    def changes(self, other: "Setting") -> str:
        """What is different from another one, as flags."""
        found = []
        if self.remat != other.remat:
            found.append(f"--config.model.remat={self.remat}")
        if self.microbatches != other.microbatches:
            found.append(f"--config.microbatches={self.microbatches}")
        if self.mesh != other.mesh:
            found.append(f"--mesh={','.join(map(str, self.mesh))}")
        return " ".join(found)


def plan(config: DecoderTraining, topology: Topology, setting: Setting) -> Plan:
    """Compiles a training step.

    Raises:
      UserError: the batch cannot be dealt to the mesh.
      DoesNotFit: it needs more memory than a device has.
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
        memory, found, seconds = plans.compile_for(
            lambda: jax.jit(skip_nonfinite(program.step), donate_argnums=0).lower(state, batch),
            {"parameters": state.model, "optimizer": state.opt_state},
            topology,
        )
    bound = _roofline(config, topology, setting, memory.parameters + memory.optimizer, found)
    return Plan(
        program="train",
        topology=topology.name,
        chips=topology.chips,
        devices=len(topology.devices),
        setting=dataclasses.asdict(setting),
        parameters=config.model.parameter_count(),
        memory=memory,
        collectives=found,
        rooflines={"step": bound},
        figures=_figures(config, topology, bound),
        compile_seconds=seconds,
    )


def search(
    config: DecoderTraining,
    topology: Topology,
    setting: Setting,
    say: Callable[[str], None],
    attempts: int = 32,
) -> Plan | None:
    """The fastest plan if `setting` fits, else that of the smallest change that does; None if none.

    The fastest is that with the least arithmetic and collectives, added up: first over remat
    policies and microbatches, then, with what was best, over how `data` and `fsdp` share the
    devices. The smallest change keeps the mesh if it can; one key before two, cheap before dear.

    Args:
      config, topology, setting: where to start.
      say: is told of every attempt.
      attempts: how many changes are tried at most if it does not fit; each is compiled.
    """

    def attempt(other: Setting, name: str = "") -> Plan | None:
        name = name or other.changes(setting)
        try:
            found = plan(config, topology, other)
        except DoesNotFit as error:
            say(f"{name}: does not fit: {error}")
            return None
        bound = found.rooflines["step"]
        say(f"{name}: fits, {bound.seconds:.3g} to {bound.serial_seconds:.3g} s a step at least")
        return found

    def first(others: Iterable[Setting]) -> Plan | None:
        return next((found for other in others if (found := attempt(other))), None)

    def faster(one: Plan, other: Plan | None) -> Plan:
        seconds = one.rooflines["step"].serial_seconds
        return other if other and other.rooflines["step"].serial_seconds < seconds else one

    best = attempt(setting, "as configured")
    if best is None:
        smaller = [o for o in candidates(config, topology, setting) if _saves(o, setting)]
        return first(sorted(smaller, key=lambda other: _distance(other, setting))[:attempts])
    for remat in REMAT[: REMAT.index(setting.remat) + 1]:
        # The fewest microbatches that fit gather the weights least often.
        counts = [n for n in MICROBATCHES if remat != setting.remat or n < setting.microbatches]
        same = (Setting(setting.mesh, remat, count) for count in counts)
        best = faster(best, first(other for other in same if deals(config, other)))
    chosen = Setting(**best.setting)
    for mesh in _splits(setting.mesh):
        other = dataclasses.replace(chosen, mesh=mesh)
        if deals(config, other):
            best = faster(best, attempt(other))
    return best


def candidates(config: DecoderTraining, topology: Topology, setting: Setting) -> Iterator[Setting]:
    """All other settings that deal rows, weights and tokens evenly."""
    devices = len(topology.devices)
    meshes = [setting.mesh, *_splits(setting.mesh)]
    for tensor, context in itertools.product((1, 2, 4, 8), (1, 2, 4)):
        rest, odd = divmod(devices, tensor * context)
        if not odd:
            meshes.append((1, rest, context, tensor))
    counts = sorted({*MICROBATCHES, setting.microbatches})
    for mesh, remat, parts in itertools.product(dict.fromkeys(meshes), REMAT, counts):
        other = Setting(mesh, remat, parts)
        if other != setting and deals(config, other):
            yield other


def deals(config: DecoderTraining, setting: Setting) -> bool:
    """Whether a mesh and microbatches split the batch and the model evenly."""
    try:
        check_divisible(setting.apply(config), setting.mesh)
    except UserError:
        return False
    return True


def _splits(mesh: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The same devices with other shares of `data` and `fsdp`."""
    both = mesh[0] * mesh[1]
    shares = [fsdp for fsdp in (both, 64, 32, 16) if both % fsdp == 0]
    found = dict.fromkeys((both // fsdp, fsdp, *mesh[2:]) for fsdp in shares)
    return [other for other in found if other != mesh]


def _saves(other: Setting, setting: Setting) -> bool:
    """Whether another setting can need less memory."""
    return (
        REMAT.index(other.remat) >= REMAT.index(setting.remat)
        and other.microbatches >= setting.microbatches
        # Copies along `data` save nothing.
        and other.mesh[0] <= setting.mesh[0]
    )


def _distance(other: Setting, setting: Setting) -> tuple:
    """How large a change is: the mesh comes last, then how many keys, then what it costs."""
    remesh = other.mesh != setting.mesh
    keys = (other.remat != setting.remat) + (other.microbatches != setting.microbatches) + remesh
    split = other.mesh[2] * other.mesh[3]
    return remesh, keys, split, REMAT.index(other.remat), other.microbatches


def _roofline(config, topology, setting, state_bytes, found) -> Roofline:
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
    return Roofline.of(work, plans.sent_bytes(found), topology)


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
