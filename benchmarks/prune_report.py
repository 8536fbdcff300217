"""The table and the picture of benchmarks/prune.py."""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any


def table(rows: dict[tuple[str, float], dict[str, Any]], protocol: dict[str, Any], ours: Collection[str]) -> list[str]:
    """The lines of results/prune.md."""
    shares = sorted({share for name, share in rows if name != "float"}, reverse=True)
    whole = rows["float", 1.0]["perplexity"]
    lines = [
        "# Pruning without retraining",
        "",
        f"{protocol}; made by `benchmarks/prune.py`, which says what the rows are.",
        "",
    ]
    lines += ["Kept of the non-embedding parameters, in brackets where more than 1% from the column's share.", ""]
    lines.append(
        f"| perplexity (whole: {whole:.2f}) | "
        + " | ".join(f"{100 * share:g}%" for share in shares)
        + " | cost at the first | machine |"
    )
    lines.append("|---" * (len(shares) + 3) + "|")
    for name in names(rows, ours):
        cells = [rows.get((name, share)) for share in shares]
        first = next(cell for cell in cells if cell)
        figures = [
            f"{cell['perplexity']:.2f}" + (f" ({cell['kept']:.1%})" if abs(cell["kept"] - cell["share"]) > 0.01 else "")
            if cell
            else ""
            for cell in cells
        ]
        cost = (
            [f"{first['seconds']:.0f} s"] if first.get("seconds") else []
        )  # none is recorded of a machine that does other work
        cost += [f"{first['peak_mb']:.0f} MB"] if first.get("peak_mb") else []
        machines = " and ".join(sorted({cell["machine"] for cell in cells if cell}))
        lines.append(f"| {name} | " + " | ".join(figures) + f" | {', '.join(cost)} | {machines} |")
    for share in shares:
        lost = {name: math.log(row["perplexity"] / whole) for (name, s), row in rows.items() if s == share}
        for name in ("wanda_sp", "wanda_sp, layer by layer"):
            if "ours" in lost and name in lost:
                ratio = f"{lost['ours'] / lost[name]:.2f} of it"
                lines += [
                    "",
                    f"At {100 * share:g}% ours loses {lost['ours']:.3f} nats a token, {name} {lost[name]:.3f}: "
                    f"{ratio}.",
                ]
    fast = [(name, row) for (name, _), row in rows.items() if "speed" in row]
    if fast:
        lines += ["", "| speed in ONNX Runtime, float32 | kept | prefill | decode |", "|---|---|---|---|"]
    for name, row in fast:
        s = row["speed"]
        lines.append(f"| {name} | {row['kept']:.1%} | × {s['prefill_ratio']:.2f} | × {s['decode_ratio']:.2f} |")
    return lines


def names(rows: dict[tuple[str, float], dict[str, Any]], ours: Collection[str]) -> list[str]:
    """Ours in their order, then those of other libraries (prune_peers.py)."""
    measured = dict.fromkeys(name for name, _ in rows if name != "float")
    return [name for name in ours if name in measured] + [name for name in measured if name not in ours]


def plot(rows: dict[tuple[str, float], dict[str, Any]], whole: float, path: Path, ours: Collection[str]) -> None:
    """Perplexity against the share that is kept, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    colours: dict[str, str] = {}  # one a recipe, dashed with a refit
    for name in names(rows, ours):
        colour = colours.setdefault(name.replace(" + refit", ""), f"C{len(colours) % 10}")
        points = sorted((row["kept"], row["perplexity"]) for (recipe, _), row in rows.items() if recipe == name)
        if points:
            style = (
                {"linewidth": 2.5, "color": "black"}
                if name == "ours"
                else {"linestyle": "--" if "refit" in name else "-", "color": colour, "alpha": 0.7}
            )
            axes.plot(
                *zip(*points), marker="os^"[list(colours.values()).count(colour) - 1], markersize=5, label=name, **style
            )
    axes.axhline(whole, color="grey", linewidth=0.8)
    axes.set(xlabel="share of the non-embedding parameters kept", ylabel="perplexity", yscale="log")
    figure.legend(fontsize="small", loc="outside right upper")
    figure.savefig(path, dpi=120, metadata={"Software": None})
