"""A plan as lines for a terminal, and as a page with a chart."""

import html
from typing import Any

from leon_jax.plan.plan import Plan

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 52rem; padding: 0 1rem;
  color: #1c1c1c; background: #fff }
table { border-collapse: collapse; width: 100% }
th { text-align: left; font-weight: 400; color: #555 }
th, td { border-bottom: 1px solid #ddd; padding: .3rem .75rem .3rem 0 }
td { text-align: right; font-variant-numeric: tabular-nums }
svg { width: 100%; height: auto; font: 13px system-ui, sans-serif }
h2 { margin-top: 2rem; font-size: 1.1rem }
"""
_COLOURS = {
    "parameters": "#1f5fa8",
    "optimizer": "#5d9bd6",
    "cache": "#5d9bd6",
    "activations": "#e0a030",
    "compute": "#1f5fa8",
    "memory": "#5d9bd6",
    "links": "#e0a030",
}
# The names of settings that are numbers, with what they count.
_SETTINGS = {
    "mesh": "mesh, data x fsdp x context x tensor",
    "microbatches": "microbatches of a step",
    "rows": "images generated at once",
    "guidance": "guidance weight",
    "prompt": "tokens of a prompt",
}
_GIB = 2**30


def lines(plan: Plan, source: str) -> list[tuple[str, str]]:
    """(name, value) of everything a plan says; `source` is the config's path."""
    memory, figures = plan.memory, plan.figures
    shown = [
        ("config", source),
        ("topology", f"{plan.topology}: {plan.chips} chips, {plan.devices} devices"),
        *((_SETTINGS.get(name, name), _plain(value)) for name, value in plan.setting.items()),
        ("parameters", f"{plan.parameters / 1e6:,.0f} million"),
    ]
    for name in ("parameters", "optimizer", "cache", "activations", "peak", "capacity"):
        if name in ("optimizer", "cache") and not getattr(memory, name):
            continue
        title = "capacity of a device" if name == "capacity" else f"{name}, a device"
        shown.append((title, f"{getattr(memory, name) / _GIB:,.2f} GiB"))
    for kind, found in plan.collectives.items():
        if found.runs:
            sent = f"{found.bytes_sent / 1e9:,.3f} GB sent by a device"
            count = f"{found.instructions} instructions, run {found.runs:,} times"
            shown.append((kind, f"{sent}; {count}"))
    for part, bound in plan.rooflines.items():
        each = ", ".join(f"{n} {getattr(bound, n):.3g} s" for n in ("compute", "memory", "links"))
        shown.append((f"a {part} takes at least", f"{each}; limited by {bound.limit}"))
    if plan.program == "train":
        shown += [
            ("FLOPs a step", f"{figures['flops_per_step']:.4g}"),
            (
                "executed FLOPs a step, with recomputation",
                f"{figures['executed_flops_per_step']:.4g}",
            ),
            (
                "MFU at most",
                f"{100 * figures['mfu_bound']:.1f} %; "
                f"{100 * figures['mfu_serial']:.1f} % if no collective were hidden",
            ),
            ("tokens a second at most", f"{figures['tokens_per_second']:,.0f}"),
            (
                "the whole run at least",
                f"{figures['days']:,.1f} days, {figures['chip_hours']:,.0f} chip-hours "
                f"({figures['steps']:,} steps)",
            ),
        ]
    else:
        shown += [
            ("all images take at least", f"{figures['seconds_per_batch']:.3g} s"),
            ("images a second at most", f"{figures['pictures_per_second']:,.2f}"),
            ("tokens a second at most", f"{figures['tokens_per_second']:,.0f}"),
        ]
    return [*shown, ("compiled here in", f"{plan.compile_seconds:.0f} s")]


def text(plan: Plan, source: str) -> str:
    """The lines, aligned."""
    found = lines(plan, source)
    width = max(len(name) for name, _ in found)
    return "\n".join(f"{name:{width}}  {value}" for name, value in found)


def page(plan: Plan, source: str) -> str:
    """The page, with a chart of memory and one of the roofline."""
    memory = plan.memory
    parts = {
        name: getattr(memory, name) / _GIB
        for name in ("parameters", "optimizer", "cache", "activations")
        if getattr(memory, name)
    }
    limits = "".join(
        f"<h2>Seconds a {part} needs at least; the longest decides</h2>"
        + _bars({n: getattr(bound, n) for n in ("compute", "memory", "links")})
        for part, bound in plan.rooflines.items()
    )
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
        for name, value in lines(plan, source)
    )
    title = html.escape(f"{source} on {plan.topology}")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style><h1>{title}</h1>"
        "<p>Compiled by the compiler for TPUs, on a machine without one. Bytes are the compiler's; "
        "times are bounds that no run can beat, not predictions.</p>"
        f"<h2>Memory of a device, GiB</h2>{_stack(parts, memory.capacity / _GIB)}{limits}"
        f"<h2>Everything</h2><table>{rows}</table></html>\n"
    )


def _stack(parts: dict[str, float], capacity: float) -> str:
    """One bar of parts within a frame of the capacity."""
    scale = 700 / max(capacity, sum(parts.values()))
    drawn, left, legend = [], 0.0, []
    for number, (name, size) in enumerate(parts.items()):
        colour, width = _COLOURS[name], size * scale
        drawn.append(
            f'<rect x="{left:.1f}" y="0" width="{width:.1f}" height="36" fill="{colour}"/>'
        )
        legend.append(
            f'<rect x="{number * 190}" y="50" width="12" height="12" fill="{colour}"/>'
            f'<text x="{number * 190 + 18}" y="61">{name} {size:.2f} GiB</text>'
        )
        left += width
    frame = f'<rect x=".5" y=".5" width="{capacity * scale - 1:.1f}" height="35" fill="none"'
    label = f'<text x="{3 * 190}" y="61">capacity {capacity:.0f} GiB</text>'
    return (
        f'<svg viewBox="0 0 701 66" role="img" aria-label="memory">{"".join(drawn)}'
        f'{frame} stroke="#1c1c1c"/>{"".join(legend)}{label}</svg>'
    )


def _bars(values: dict[str, float]) -> str:
    """One bar each."""
    scale = 480 / max(*values.values(), 1e-12)
    drawn = []
    for number, (name, value) in enumerate(values.items()):
        top = number * 28
        drawn.append(
            f'<text x="0" y="{top + 16}">{name}</text>'
            f'<rect x="90" y="{top}" width="{max(value * scale, 1):.1f}" height="22" '
            f'fill="{_COLOURS[name]}"/>'
            f'<text x="{96 + value * scale:.1f}" y="{top + 16}">{value:.3g} s</text>'
        )
    height = 28 * len(values)
    return (
        f'<svg viewBox="0 0 701 {height}" role="img" aria-label="roofline">{"".join(drawn)}</svg>'
    )


def _plain(value: Any) -> str:
    return " x ".join(map(str, value)) if isinstance(value, tuple) else str(value)
