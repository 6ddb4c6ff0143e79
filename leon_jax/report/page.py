"""Writes the page of `leon report`: curves, differences, samples and profiles of several runs."""

import html
import json
import os
import pathlib
import time
from collections.abc import Callable, Sequence

import PIL.Image

from leon_jax import html_page
from leon_jax.report.charts import colour, line_chart
from leon_jax.report.runs import Run

_STYLE = """
svg { width: 100%; height: auto; font: 12px system-ui, sans-serif }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(28rem, 1fr));
  gap: 1rem 1.5rem }
.key { display: inline-block; width: .8em; height: .8em; border-radius: 50%; margin-right: .4em }
th, td { padding: .3rem .75rem .3rem 0 }
td { overflow-wrap: anywhere }
code { font-size: .9em }
.samples img { max-width: 100%; min-height: 64px; border: 1px solid #eee;
  image-rendering: pixelated }
.samples td:first-child { width: 5rem; color: #555 }
"""

# Metrics that the training losses are not, by group; the order of the page.
_QUALITY = ("l1", "lpips", "psnr_db", "accuracy", "codes_used")
_OPTIMIZER = ("learning_rate", "gradient_norm", "skipped")
_GROUPS: tuple[tuple[str, Callable[[str], bool]], ...] = (
    ("Held-out documents", lambda name: name.startswith("heldout/")),
    (
        "Training losses",
        lambda name: name.startswith("loss") or name.endswith("_loss") or name in _QUALITY,
    ),
    ("Optimizer", lambda name: name in _OPTIMIZER),
    ("Speed", lambda name: name.endswith("_per_second") or "seconds" in name or name == "mfu"),
    ("Goodput", lambda name: name == "goodput"),
    ("Other metrics", lambda name: True),
)
_TITLES = {
    "loss": "loss, mean of the steps since the last line",
    "loss_image": "loss of image tokens, nats",
    "loss_text": "loss of text tokens, nats",
    "learning_rate": "learning rate",
    "gradient_norm": "gradient norm",
    "skipped": "skipped updates since the last line",
    "tokens_per_second": "tokens a second",
    "pictures_per_second": "images a second",
    "pairs_per_second": "pairs a second",
    "seconds_per_step": "seconds a step",
    "input_seconds": "seconds a step that the slowest host waits for its batch",
    "own_seconds": "seconds a step of the slowest host outside the wait for the others",
    "mfu": "MFU, share of the devices' peak",
    "goodput": "goodput, share of the wall time since the first start",
}
# Sample images of a kind that are shown, the first and the newest among them, and their width.
_SAMPLES = 8
_SAMPLE_WIDTH = 1200
# Longest value of a config key that is shown whole.
_VALUE_LENGTH = 160


def write(runs: Sequence[Run], out: pathlib.Path, profiles: Sequence[tuple[str, str]]) -> None:
    """Writes `index.html` into a folder; creates the folder.

    Args:
      runs: the runs, at least one.
      out: the folder.
      profiles: (heading, HTML body) of each profile.
    """
    sections = [
        ("Runs", _overview(runs)),
        *_curves(runs),
        ("Wall time", _wall_time(runs)),
        ("Differences of the configs", _differences(runs)),
        ("Hosts", _hosts(runs)),
        *profiles,
        *_samples(runs),
    ]
    title = "Run" if len(runs) == 1 else "Runs"
    text = html_page.page(
        f"{title}: {', '.join(run.name for run in runs)}",
        [(name, body) for name, body in sections if body],
        _STYLE,
    )
    out.mkdir(parents=True, exist_ok=True)
    temporary = out / "index.html.tmp"
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, out / "index.html")


def _overview(runs: Sequence[Run]) -> str:
    """Returns a table of the runs, and sentences on what is unusual about them."""
    rows = [
        [
            _name(number, run),
            html.escape(str(run.config.get("kind", "text"))),
            f"{run.step:,} of {run.config.get('steps', 0):,}" if run.config else "",
            _state(run),
            _last(run, "loss"),
            _last(run, "goodput"),
        ]
        for number, run in enumerate(runs)
    ]
    head = ["Run", "Kind", "Step", "State", "Loss", "Goodput"]
    notes = [note for run in runs for note in _notes(run)]
    listed = "".join(f"<li>{note}</li>" for note in notes)
    return html_page.table(head, rows) + (f"<ul>{listed}</ul>" if notes else "")


def _state(run: Run) -> str:
    if run.is_finished:
        return "finished"
    if run.updated is None:
        return "no metrics"
    seconds = max(0, time.time() - run.updated)
    units = ((86400, "days"), (3600, "hours"), (60, "minutes"), (1, "seconds"))
    size, unit = next(pair for pair in units if seconds >= pair[0] or pair[0] == 1)
    return f"newest line {seconds / size:.0f} {unit} before this page"


def _notes(run: Run) -> list[str]:
    """Returns sentences, as HTML, on what is unusual about a run."""
    name, notes = html.escape(run.name), []
    if run.damaged:
        lines = "lines of its logs are" if run.damaged > 1 else "line of its logs is"
        notes.append(f"{name}: {run.damaged} {lines} damaged and left out.")
    for branch in run.history:
        notes.append(f"{name} {_branch(branch)}")
    if skipped := sum(line.get("skipped", 0) for line in run.lines):
        notes.append(
            f"{name}: {skipped:.0f} updates were skipped, since they were not finite numbers."
        )
    slow = [line for line in run.hosts if line.get("slow") is not None]
    if slow:
        hosts = ", ".join(str(host) for host in sorted({line["slow"] for line in slow}))
        notes.append(
            f'<span class="bad">{name}: host {hosts} was slower than the others in {len(slow)} of '
            f"{len(run.hosts)} intervals, the last of them up to step {slow[-1]['step']:,}.</span>"
        )
    for folder in run.stacks():
        notes.append(
            f'<span class="bad">{name}: a step did not end; the stacks of its hosts are in '
            f"<code>{html.escape(str(folder))}</code>.</span>"
        )
    return notes


def _branch(branch: object) -> str:
    """Returns the end of a sentence on a branch, as HTML."""
    entry = branch if isinstance(branch, dict) else {}
    changes = ", ".join(
        f"{key} from {_value(pair[0])} to {_value(pair[1])}"
        for key, pair in entry.get("changes", {}).items()
    )
    origin = html.escape(f"{entry.get('from')} at step {entry.get('step')}")
    return f"branches from {origin}, with {changes or 'no changes'}."


def _curves(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Returns the charts by group."""
    logged = dict.fromkeys(name for run in runs for line in run.lines for name in line)
    names = [name for name in logged if name != "step"]
    sections = []
    for heading, belongs in _GROUPS:
        members = [name for name in names if belongs(name)]
        names = [name for name in names if name not in members]
        charts = [_chart(runs, name) for name in members]
        body = "".join(f"<div>{chart}</div>" for chart in charts if chart)
        sections.append((heading, f'<div class="charts">{body}</div>' if body else ""))
    return sections


def _chart(runs: Sequence[Run], name: str) -> str:
    lines = []
    for number, run in enumerate(runs):
        points = [
            (float(line["step"]), float(line[name]))
            for line in run.lines
            if isinstance(line.get(name), int | float)
        ]
        lines.append((run.name, colour(number), points))
    if all(value == 0 for *_, points in lines for _, value in points):
        return ""
    title = _TITLES.get(name, name.removeprefix("heldout/").replace("_", " "))
    return line_chart(title, lines)


def _wall_time(runs: Sequence[Run]) -> str:
    """Returns a table of the shares of the wall time."""
    measured = [(number, run) for number, run in enumerate(runs) if sum(run.seconds.values()) > 0]
    if not measured:
        return ""
    names = list(dict.fromkeys(name for _, run in measured for name in run.seconds))
    rows = []
    for number, run in measured:
        total = sum(run.seconds.values())
        shares = [f"{100 * run.seconds.get(name, 0) / total:.1f} %" for name in names]
        rows.append([_name(number, run), f"{total:,.0f} s", *shares])
    return html_page.table(["Run", "Total", *names], rows)


def _differences(runs: Sequence[Run]) -> str:
    """Returns a table of the config keys whose values differ."""
    if len(runs) == 1:
        return ""
    keys = sorted({key for run in runs for key in run.config})
    missing = object()
    rows = []
    for key in keys:
        values = [run.config.get(key, missing) for run in runs]
        if any(value != values[0] for value in values[1:]):
            cells = ["" if value is missing else _value(value) for value in values]
            rows.append([f"<code>{html.escape(key)}</code>", *cells])
    if not rows:
        return "<p>The configs are equal.</p>"
    head = ["Key", *(_name(number, run) for number, run in enumerate(runs))]
    return html_page.table(head, rows) + "<p>An empty cell: the config has no such key.</p>"


def _hosts(runs: Sequence[Run]) -> str:
    """Returns charts of the time of each host outside the wait for the others."""
    charts = []
    for run in runs:
        count = max((len(line.get("own_seconds", [])) for line in run.hosts), default=0)
        if count < 2:
            continue
        lines = []
        for host in range(count):
            points = [
                (float(line["step"]), float(line["own_seconds"][host]))
                for line in run.hosts
                if host < len(line.get("own_seconds", []))
            ]
            lines.append((f"host {host}", colour(host), points))
        title = f"{run.name}: seconds a step outside the wait for the others, by host"
        charts.append(f"<div>{line_chart(title, lines)}</div>")
    return f'<div class="charts">{"".join(charts)}</div>' if charts else ""


def _samples(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Returns the sample images of each run over time."""
    sections = []
    for number, run in enumerate(runs):
        for name, pairs in run.samples().items():
            last = len(pairs) - 1
            chosen = sorted({i * last // max(1, _SAMPLES - 1) for i in range(_SAMPLES)})
            rows = []
            for i in chosen:
                step, path = pairs[i]
                if tag := _image(path, f"{run.name}, {name} after step {step}"):
                    rows.append([f"{step:,}", tag])
            if rows:
                body = f"<p>{_name(number, run)}</p>{html_page.table(['Step', ''], rows)}"
                heading = f"Samples over time: {name}"
                sections.append((heading, f'<div class="samples">{body}</div>'))
    return sections


def _image(path: pathlib.Path, alt: str) -> str:
    """Returns a sample image as a tag, or "" if the run is just writing it."""
    try:
        with PIL.Image.open(path) as file:
            image = file.convert("RGB")
    except OSError:
        return ""
    image.thumbnail((_SAMPLE_WIDTH, 10 * _SAMPLE_WIDTH))
    return html_page.image_tag(image, alt)


def _name(number: int, run: Run) -> str:
    """Returns the name of a run with the colour of its lines."""
    key = f'<span class="key" style="background:{colour(number)}"></span>'
    return key + html.escape(run.name)


def _last(run: Run, name: str) -> str:
    """Returns the newest value of a metric, or ""."""
    values = [line[name] for line in run.lines if isinstance(line.get(name), int | float)]
    return f"{values[-1]:.4g}" if values else ""


def _value(value: object) -> str:
    """Returns a value of a config as HTML."""
    text = json.dumps(value)
    return html.escape(text if len(text) <= _VALUE_LENGTH else text[:_VALUE_LENGTH] + "…")
