"""Formats a plan as text for the terminal and as an HTML page with charts."""

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
# Descriptions of numeric settings.
_SETTINGS = {
    "mesh": "mesh, data x fsdp x context x tensor",
    "microbatches": "microbatches of a step",
    "rows": "images generated at once",
    "guidance": "guidance weight",
    "prompt": "tokens of a prompt",
}
# What a training step learns from, by its name in figures.
_UNITS = {"tokens": "tokens", "pictures": "images", "pairs": "pairs of image and text"}
_GIB = 2**30


def lines(plan: Plan, source: str) -> list[tuple[str, str]]:
    """Returns the (name, value) pairs of a plan; `source` is the config's path."""
    memory, figures = plan.memory, plan.figures
    pairs = [
        ("config", source),
        ("topology", f"{plan.topology}: {plan.chips} chips, {plan.devices} devices"),
        *((_SETTINGS.get(name, name), _plain(value)) for name, value in plan.setting.items()),
        ("parameters", f"{plan.parameters / 1e6:,.0f} million"),
    ]
    for name in ("parameters", "optimizer", "cache", "activations", "peak", "capacity"):
        if name in ("optimizer", "cache") and not getattr(memory, name):
            continue
        title = "capacity of a device" if name == "capacity" else f"{name}, a device"
        pairs.append((title, f"{getattr(memory, name) / _GIB:,.2f} GiB"))
    for kind, collective in plan.collectives.items():
        if collective.runs:
            size = f"{collective.bytes_sent / 1e9:,.3f} GB sent by a device"
            repeats = f"{collective.instructions} instructions, run {collective.runs:,} times"
            overlapped = f", {collective.asynchronous} of them asynchronous"
            pairs.append(
                (kind, f"{size}; {repeats}{overlapped if collective.asynchronous else ''}")
            )
    if "plain_peak" in figures:
        total = sum(collective.instructions for collective in plan.collectives.values())
        count = sum(collective.asynchronous for collective in plan.collectives.values())
        pairs.append(
            (
                "what the compiler's preset changes",
                f"peak {figures['plain_peak'] / _GIB:,.2f} to {memory.peak / _GIB:,.2f} GiB; "
                f"asynchronous collectives {figures['plain_asynchronous']:.0f} to {count} of "
                f"{total}",
            )
        )
    if "evaluation_peak" in figures:
        peak = f"{figures['evaluation_peak'] / _GIB:,.2f} GiB"
        pairs.append(("peak of an evaluation on held-out documents, a device", peak))
    for part, bound in plan.rooflines.items():
        seconds = ", ".join(
            f"{name} {getattr(bound, name):.3g} s" for name in ("compute", "memory", "links")
        )
        pairs.append((f"a {part} takes at least", f"{seconds}; limited by {bound.limit}"))
    if plan.program == "train":
        pairs += [
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
            *(
                (f"{title} a second at most", f"{figures[f'{unit}_per_second']:,.0f}")
                for unit, title in _UNITS.items()
                if f"{unit}_per_second" in figures
            ),
            (
                "all steps at this bound",
                f"{figures['days']:,.1f} days, {figures['chip_hours']:,.0f} chip-hours "
                f"({figures['steps']:,} steps)",
            ),
        ]
    else:
        pairs += [
            ("all images take at least", f"{figures['seconds_per_batch']:.3g} s"),
            ("images a second at most", f"{figures['pictures_per_second']:,.2f}"),
            ("tokens a second at most", f"{figures['tokens_per_second']:,.0f}"),
        ]
    return [*pairs, ("compiled here in", f"{plan.compile_seconds:.0f} s")]


def text(plan: Plan, source: str) -> str:
    """Returns the plan as aligned lines."""
    pairs = lines(plan, source)
    width = max(len(name) for name, _ in pairs)
    return "\n".join(f"{name:{width}}  {value}" for name, value in pairs)


def page(plan: Plan, source: str) -> str:
    """Returns the plan as an HTML page with charts of the memory and the rooflines."""
    memory = plan.memory
    parts = {
        name: getattr(memory, name) / _GIB
        for name in ("parameters", "optimizer", "cache", "activations")
        if getattr(memory, name)
    }
    limits = "".join(
        f"<h2>Minimum seconds of a {part} by resource; the slowest one limits</h2>"
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
        "<p>Compiled by the TPU compiler on a machine without a TPU. Sizes are the compiler's. "
        "Times are lower bounds, not predictions.</p>"
        f"<h2>Memory of a device, GiB</h2>{_stack(parts, memory.capacity / _GIB)}{limits}"
        f"<h2>All numbers</h2><table>{rows}</table></html>\n"
    )


def _stack(parts: dict[str, float], capacity: float) -> str:
    """Returns a stacked bar of the parts in a frame of the capacity's width, as SVG."""
    scale = 700 / max(capacity, sum(parts.values()))
    bars, x, legend = [], 0.0, []
    for number, (name, size) in enumerate(parts.items()):
        colour, width = _COLOURS[name], size * scale
        bars.append(f'<rect x="{x:.1f}" y="0" width="{width:.1f}" height="36" fill="{colour}"/>')
        legend.append(
            f'<rect x="{number * 190}" y="50" width="12" height="12" fill="{colour}"/>'
            f'<text x="{number * 190 + 18}" y="61">{name} {size:.2f} GiB</text>'
        )
        x += width
    frame = f'<rect x=".5" y=".5" width="{capacity * scale - 1:.1f}" height="35" fill="none"'
    label = f'<text x="{3 * 190}" y="61">capacity {capacity:.0f} GiB</text>'
    return (
        f'<svg viewBox="0 0 701 66" role="img" aria-label="memory">{"".join(bars)}'
        f'{frame} stroke="#1c1c1c"/>{"".join(legend)}{label}</svg>'
    )


def _bars(values: dict[str, float]) -> str:
    """Returns a bar for each value in seconds, as SVG."""
    scale = 480 / max(*values.values(), 1e-12)
    bars = []
    for number, (name, value) in enumerate(values.items()):
        top = number * 28
        bars.append(
            f'<text x="0" y="{top + 16}">{name}</text>'
            f'<rect x="90" y="{top}" width="{max(value * scale, 1):.1f}" height="22" '
            f'fill="{_COLOURS[name]}"/>'
            f'<text x="{96 + value * scale:.1f}" y="{top + 16}">{value:.3g} s</text>'
        )
    height = 28 * len(values)
    return f'<svg viewBox="0 0 701 {height}" role="img" aria-label="roofline">{"".join(bars)}</svg>'


def _plain(value: Any) -> str:
    return " x ".join(map(str, value)) if isinstance(value, tuple) else str(value)
