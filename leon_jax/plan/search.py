"""Searches for the fastest settings of a training run that fit, or for the smallest change."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator

from leon_jax.config import UserError
from leon_jax.plan import train
from leon_jax.plan.kinds import Kind, Setting
from leon_jax.plan.plan import DoesNotFit, Plan
from leon_jax.plan.topology import Topology


def search(
    kind: Kind,
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
      kind: the kind of model, with the configuration of the run.
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
            result = train.plan(kind, topology, other)
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
        smaller = [
            o for o in candidates(kind, topology, setting) if _saves_memory(kind, o, setting)
        ]
        return first(sorted(smaller, key=lambda other: _distance(kind, other, setting))[:attempts])
    for remat in kind.remat[: kind.remat.index(setting.remat) + 1]:
        # Fewer microbatches gather the weights less often, so the first that fits is the fastest.
        counts = [
            n for n in kind.microbatches if remat != setting.remat or n < setting.microbatches
        ]
        settings = (Setting(setting.mesh, remat, count) for count in counts)
        best = faster(best, first(other for other in settings if is_divisible(kind, other)))
    best_setting = Setting(**best.setting)
    for mesh in _other_splits(kind, setting.mesh):
        other = dataclasses.replace(best_setting, mesh=mesh)
        if is_divisible(kind, other):
            best = faster(best, attempt(other))
    return best


def candidates(kind: Kind, topology: Topology, setting: Setting) -> Iterator[Setting]:
    """Yields all other settings that split rows, weights and tokens evenly."""
    devices = len(topology.devices)
    meshes = [setting.mesh, *_other_splits(kind, setting.mesh)]
    tensors = (1, 2, 4, 8) if "tensor" in kind.split_axes else ()
    contexts = (1, 2, 4) if "context" in kind.split_axes else (1,)
    for tensor, context in itertools.product(tensors, contexts):
        fsdp, remainder = divmod(devices, tensor * context)
        if not remainder:
            meshes.append((1, fsdp, context, tensor))
    counts = sorted({*kind.microbatches, setting.microbatches})
    for mesh, remat, microbatches in itertools.product(dict.fromkeys(meshes), kind.remat, counts):
        other = Setting(mesh, remat, microbatches)
        if other != setting and is_divisible(kind, other):
            yield other


def is_divisible(kind: Kind, setting: Setting) -> bool:
    """Returns whether a setting splits the batch and the model evenly."""
    try:
        kind.check(setting)
    except UserError:
        return False
    return True


def _other_splits(kind: Kind, mesh: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Returns meshes of the same devices with other sizes of `data` and `fsdp`."""
    if "fsdp" not in kind.split_axes:  # then both axes split the batch only
        return []
    product = mesh[0] * mesh[1]
    sizes = [fsdp for fsdp in (product, 64, 32, 16) if product % fsdp == 0]
    meshes = dict.fromkeys((product // fsdp, fsdp, *mesh[2:]) for fsdp in sizes)
    return [other for other in meshes if other != mesh]


def _saves_memory(kind: Kind, other: Setting, setting: Setting) -> bool:
    """Returns whether another setting can need less memory."""
    return (
        kind.remat.index(other.remat) >= kind.remat.index(setting.remat)
        and other.microbatches >= setting.microbatches
        # Replicas along `data` save no memory.
        and other.mesh[0] <= setting.mesh[0]
    )


def _distance(kind: Kind, other: Setting, setting: Setting) -> tuple:
    """Returns a sort key for the size of a change: the mesh, the number of keys, then the cost."""
    is_new_mesh = other.mesh != setting.mesh
    keys = (
        (other.remat != setting.remat) + (other.microbatches != setting.microbatches) + is_new_mesh
    )
    split = other.mesh[2] * other.mesh[3]
    return is_new_mesh, keys, split, kind.remat.index(other.remat), other.microbatches
