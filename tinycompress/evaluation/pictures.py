"""Pictures as SVG inside a page, 360 wide: as text on a phone, side by side on a desk. Colours are the page's, by
class (`s0` … of a series, `axis`, `faint`), so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from .statistics import Interval

WIDTH = 360
LEFT, RIGHT = 44, 12  # of the plot, in a picture
TOP, BOTTOM = 14, 30


def line(x: float, y: float, to_x: float, to_y: float, kind: str) -> str:
    return f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{to_x:.1f}" y2="{to_y:.1f}" class="{kind}"/>'


def text(x: float, y: float, words: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def dot(x: float, y: float, series: int, words: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" class="s{series % 6}"><title>{escape(words)}</title></circle>'


def picture(height: int, title: str, parts: Sequence[str]) -> str:
    """An SVG element with a title for those who cannot see it."""
    head = f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title, quote=True)}">'
    return "".join([head, *parts, "</svg>"])


def size_against_perplexity(points: Sequence[tuple[str, int, Interval]]) -> str:
    """Name, bytes and perplexity of each model: to the lower left is better."""
    height = 230
    right, floor = WIDTH - RIGHT, height - BOTTOM
    most = max(size for _, size, _ in points) * 1.08
    low = min(interval.low for _, _, interval in points)
    high = max(interval.high for _, _, interval in points)
    margin = 0.1 * (high - low) or 0.05 * high
    low, high = low - margin, high + margin

    def across(size: float) -> float:
        return LEFT + (right - LEFT) * size / most

    def down(value: float) -> float:
        return floor - (floor - TOP) * (value - low) / (high - low)

    parts = [line(LEFT, floor, right, floor, "axis"), line(LEFT, TOP, LEFT, floor, "axis")]
    for share in (0.0, 0.5, 1.0):
        value, size = low + share * (high - low), share * most
        parts += [line(LEFT, down(value), right, down(value), "faint")]
        parts += [text(LEFT - 5, down(value) + 4, f"{value:.4g}", "end")]
        parts += [text(across(size), floor + 14, f"{size / 1e6:.3g}", "middle" if share < 1 else "end")]
    parts.append(text((LEFT + right) / 2, height - 3, "MB on disk"))
    for number, (name, size, perplexity) in enumerate(points):
        x = across(size)
        parts.append(line(x, down(perplexity.low), x, down(perplexity.high), f"s{number % 6}"))
        parts.append(dot(x, down(perplexity.value), number, f"{name}: {size / 1e6:.4g} MB, perplexity {perplexity}"))
    return picture(height, "Size on disk against perplexity", parts)


def dots_on_a_log_axis(rows: Sequence[tuple[str, Sequence[Interval]]], names: Sequence[str]) -> str:
    """A row for each figure, a dot with its interval for each model (`names`, which the colours follow)."""
    step = 30
    height = TOP + step * len(rows) + BOTTOM
    left, right = 92, WIDTH - RIGHT
    values = [edge for _, series in rows for i in series for edge in (i.low, i.high) if edge > 0]
    first = math.floor(math.log10(max(min(values, default=1e-3), 1e-6)))
    last = max(first + 1, math.ceil(math.log10(max(values, default=1.0))))

    def across(value: float) -> float:
        power = math.log10(value) if value > 0 else first
        return left + (right - left) * min(1.0, max(0.0, (power - first) / (last - first)))

    floor = height - BOTTOM
    parts = []
    for power in range(first, last + 1):
        x = across(10.0**power)
        parts += [line(x, TOP, x, floor, "faint"), text(x, floor + 14, f"{10.0**power:g}")]
    for row, (label, series) in enumerate(rows):
        y = TOP + step * (row + 0.5)
        parts.append(text(left - 8, y + 4, label, "end"))
        for number, interval in enumerate(series):
            place = y + 5 * (number - (len(series) - 1) / 2)
            parts.append(line(across(interval.low), place, across(interval.high), place, f"s{(number + 1) % 6}"))
            parts.append(dot(across(interval.value), place, number + 1, f"{names[number]}: {label} {interval}"))
    parts.append(text((left + right) / 2, height - 3, "nats, each tick ten times the last"))
    return picture(height, "KL from the reference: its middle and its tail", parts)


def bars_by_layer(before: Sequence[float], after: Sequence[float], unit: str, title: str, series: int) -> str:
    """A bar for each layer: what it is, filled in the colour of `series`, and what it was, in outline."""
    height = 160
    right, floor = WIDTH - RIGHT, height - BOTTOM
    count = max(len(before), len(after))
    most = max([*before, *after, 1e-9])
    wide = (right - LEFT) / count

    def bars(values: Sequence[float], kind: str) -> list[str]:
        out = []
        for number, value in enumerate(values):
            tall = (floor - TOP) * value / most
            place = f'x="{LEFT + number * wide + 0.1 * wide:.1f}" y="{floor - tall:.1f}"'
            shape = f'{place} width="{0.8 * wide:.1f}" height="{tall:.1f}" class="{kind}"'
            out.append(f"<rect {shape}><title>layer {number}: {value:.4g} {escape(unit)}</title></rect>")
        return out

    ends = [text(LEFT + wide / 2, floor + 14, "0"), text(right - wide / 2, floor + 14, f"{count - 1}")]
    scale = [text(LEFT - 5, TOP + 4, f"{most:.4g}", "end"), text(LEFT - 5, floor + 4, "0", "end")]
    parts = [
        *bars(after, f"s{series % 6}"),
        *bars(before, "was"),
        line(LEFT, floor, right, floor, "axis"),
        *ends,
        *scale,
    ]
    parts.append(text((LEFT + right) / 2, height - 3, "layer"))
    return picture(height, title, parts)
