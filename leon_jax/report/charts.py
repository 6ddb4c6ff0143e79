"""Line charts as SVG."""

import html
import math
from collections.abc import Sequence

import numpy as np

COLOURS = (
    "#1f5fa8", "#d1622b", "#2e8b57", "#8e44ad", "#b8860b", "#c0392b", "#17808f", "#7f5539",
)  # fmt: skip

_WIDTH, _HEIGHT = 540, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 28, 38
# Points of a line. More of them are averaged in groups of neighbours.
_POINTS = 400


def colour(number: int) -> str:
    """Returns the colour of a run, by its number in the report."""
    return COLOURS[number % len(COLOURS)]


def line_chart(
    title: str,
    lines: Sequence[tuple[str, str, Sequence[tuple[float, float]]]],
    x_label: str = "step",
) -> str:
    """Returns a chart with several lines.

    Values that are not finite are left out. If few values are far above all others, such as the
    losses of the first steps, the axis ends below them, and the lines are cut there.

    Args:
      title: name and unit of the values.
      lines: (name, colour, (x, y) pairs sorted by x) of each line.
      x_label: name of the x axis.
    """
    curves = [(name, colour, thinned(points)) for name, colour, points in lines]
    curves = [curve for curve in curves if len(curve[2])]
    if not curves:
        return ""
    x, y = np.concatenate([points for *_, points in curves]).T
    x_ticks = ticks(x.min(), x.max())
    top = y.max()
    body = np.quantile(y, 0.95)
    is_cut = len(y) >= 20 and top - y.min() > 3 * (body - y.min()) > 0
    if is_cut:
        top = body + 0.1 * (body - y.min())
    y_ticks = ticks(y.min(), top)
    low, high = min(y.min(), y_ticks[0]), top if is_cut else max(top, y_ticks[-1])

    def across(values: np.ndarray) -> np.ndarray:
        share = (values - x.min()) / ((x.max() - x.min()) or 1)
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def down(values: np.ndarray) -> np.ndarray:
        share = (np.minimum(values, high) - low) / ((high - low) or 1)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _BOTTOM - _TOP)

    parts = [f'<text x="{_LEFT}" y="16" font-weight="600">{html.escape(title)}</text>']
    if is_cut:
        parts.append(
            f'<text x="{_WIDTH - _RIGHT}" y="16" text-anchor="end" fill="#777">cut above '
            f"{high:.3g}</text>"
        )
    for tick in y_ticks:
        level = f"{down(np.asarray(tick)):.1f}"
        parts.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{level}" y2="{level}" stroke="#e4e4e4"'
            f'/><text x="{_LEFT - 7}" y="{float(level) + 4:.1f}" text-anchor="end">{_number(tick)}'
            "</text>"
        )
    for tick in x_ticks:
        position = f'x="{across(np.asarray(tick)):.1f}" y="{_HEIGHT - _BOTTOM + 17}"'
        parts.append(f'<text {position} text-anchor="middle">{_number(tick)}</text>')
    for name, stroke, points in curves:
        xs, ys = across(points[:, 0]), down(points[:, 1])
        pairs = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(xs, ys, strict=True))
        note = f"<title>{html.escape(name)}</title>"
        if len(points) == 1:
            x, y = pairs.split(",")
            parts.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{stroke}">{note}</circle>')
        else:
            parts.append(
                f'<polyline points="{pairs}" fill="none" stroke="{stroke}" stroke-width="1.6" '
                f'stroke-linejoin="round">{note}</polyline>'
            )
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(
        f'<text x="{middle:.0f}" y="{_HEIGHT - 4}" text-anchor="middle" fill="#777">'
        f"{html.escape(x_label)}</text>"
    )
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{html.escape(title, quote=True)}">{"".join(parts)}</svg>'
    )


def thinned(points: Sequence[tuple[float, float]], limit: int = _POINTS) -> np.ndarray:
    """Returns finite points, float64[n, 2] with n <= limit; groups of neighbours are averaged."""
    array = np.array(points, np.float64).reshape(-1, 2)
    array = array[np.isfinite(array).all(1)]
    if len(array) <= limit:
        return array
    return np.array([group.mean(0) for group in np.array_split(array, limit)])


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Returns about `count` round numbers between `low` and `high`; one if they are equal."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)] or [low]


def _number(value: float) -> str:
    """Formats a tick: 0.002, 1,500 or 3e-05."""
    if value and (abs(value) < 1e-3 or abs(value) >= 1e7):
        return f"{value:.3g}"
    return f"{value:,.10g}" if abs(value) >= 1 else f"{value:.4g}"
