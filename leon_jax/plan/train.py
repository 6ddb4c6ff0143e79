"""Plans training: compiles the training step for a topology."""

import dataclasses
from collections.abc import Mapping

import jax

from leon_jax import sharding
from leon_jax.plan import plan as plans
from leon_jax.plan.kinds import Kind, Setting, StepWork, TracedStep
from leon_jax.plan.plan import Plan, Roofline
from leon_jax.plan.topology import Topology


def plan(
    kind: Kind,
    topology: Topology,
    setting: Setting,
    options: Mapping[str, str] | None = None,
    is_evaluated: bool = False,
) -> Plan:
    """Compiles a training step.

    Args:
      kind: the kind of model, with the configuration of the run.
      topology: the devices.
      setting: the mesh, and what saves memory.
      options: options of the compiler. With any, the step is compiled a second time without them,
        and the figures `plain_peak` and `plain_asynchronous` are the memory and the number of
        asynchronous collectives of that program.
      is_evaluated: whether the run evaluates the model on held-out documents. If so, this program
        is compiled too, and the figure `evaluation_peak` is the peak memory of a device while it
        runs, with the optimizer state.

    Raises:
      UserError: the mesh cannot split the batch or the model evenly.
      DoesNotFit: a program needs more memory than a device has.
    """
    kind = kind.apply(setting)
    with jax.set_mesh(sharding.make_mesh(setting.mesh, topology.devices)):
        step = TracedStep.of(kind.program)
        state = {"parameters": step.state.model, "optimizer": step.state.opt_state}
        memory, collectives, seconds = plans.compile_for(
            step.traced.lower, state, topology, options=options
        )
        plain = {}
        if options:
            plain_memory, others, _ = plans.compile_for(step.traced.lower, state, topology)
            count = sum(collective.asynchronous for collective in others.values())
            plain = {"plain_peak": plain_memory.peak, "plain_asynchronous": float(count)}
        evaluation = {}
        if is_evaluated:
            largest = kind.config.batch_size // setting.microbatches
            count = kind.config.data.eval_documents * kind.evaluated_rows
            traced = step.evaluation(kind.program, largest, count)
            model = {"parameters": step.state.model}
            peak = plans.compile_for(traced.lower, model, topology)[0].peak
            evaluation = {"evaluation_peak": peak + memory.optimizer}
        work = kind.step_work(step, setting, memory.parameters + memory.optimizer)
    bound = Roofline.of(work.device, plans.sent_bytes(collectives), topology)
    return Plan(
        program="train",
        topology=topology.name,
        chips=topology.chips,
        devices=len(topology.devices),
        setting=dataclasses.asdict(setting),
        parameters=sum(leaf.size for leaf in jax.tree.leaves(step.state.model)),
        memory=memory,
        collectives=collectives,
        rooflines={"step": bound},
        figures=_figures(kind, topology, work, bound) | plain | evaluation,
        compile_seconds=seconds,
    )


def _figures(kind: Kind, topology: Topology, work: StepWork, bound: Roofline) -> dict[str, float]:
    seconds, peak = bound.seconds, topology.chip.flops * topology.chips
    days = kind.config.steps * seconds / 86400
    return {
        f"{kind.unit}_per_step": kind.units,
        "flops_per_step": work.needed_flops,
        "executed_flops_per_step": work.executed_flops,
        "seconds_per_step": seconds,
        "mfu_bound": work.needed_flops / (seconds * peak),
        "mfu_serial": work.needed_flops / (bound.serial_seconds * peak),
        f"{kind.unit}_per_second": kind.units / seconds,
        "steps": kind.config.steps,
        "days": days,
        "chip_hours": days * 24 * topology.chips,
    }
