"""The picture of a pruning: widths before and after, and what each axis would lose. Drawing needs matplotlib."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import need
from ..graph.config import Config
from ..graph.topology import axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curves = Mapping[str, tuple[Sequence[int], Sequence[float]]]


def draw_widths(path: str | Path, before: Config, after: Config, losses: Curves) -> None:
    """Writes a PNG: widths of every layer before and after; below, for each kind of axis, the loss of every layer
    against the share kept.

    losses: axis (`layers.3.ffn`) to its sizes and the expected loss in nats a token at each.
    """
    need("matplotlib", "plot")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    known = axes(before)
    kinds = sorted({known[axis].kind for axis in losses})
    figure = Figure(figsize=(10, 6 if kinds else 3), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2 if kinds else 1, max(len(kinds), 1))
    _draw_bars(figure.add_subplot(grid[0, :]), before, after)
    for i, kind in enumerate(kinds):
        curves = {axis: curve for axis, curve in losses.items() if known[axis].kind == kind}
        _draw_curves(figure.add_subplot(grid[1, i]), kind, curves, before)
    _save(figure, Path(path))


def _draw_bars(plot: Axes, before: Config, after: Config) -> None:
    for offset, name, color in ((-0.2, "ffn_dim", "tab:blue"), (0.2, "n_heads", "tab:orange")):
        full = max((getattr(layer, name) for layer in before.layers), default=0) or 1
        for config, state, alpha in ((before, "before", 0.3), (after, "kept", 1.0)):
            heights = [getattr(layer, name) / full for layer in config.layers]
            positions = [i + offset for i in range(len(heights))]
            plot.bar(positions, heights, 0.4, color=color, alpha=alpha, label=f"{name}, {state} (1 = {full})")
    plot.set(xlabel="layer", ylabel="share of the widest", title="Widths before and after")
    plot.legend(fontsize="small", ncols=2, loc="lower right")


def _draw_curves(plot: Axes, kind: str, curves: Curves, config: Config) -> None:
    known = axes(config)
    for axis, (sizes, losses) in curves.items():
        layer = known[axis].layer or 0
        shade = layer / max(config.n_layers - 1, 1)
        shares = [size / sizes[-1] for size in sizes]
        plot.plot(shares, losses, color=(shade, 0.2, 1 - shade), label=f"layer {layer}")
    plot.set(xlabel=f"share of {kind} kept", ylabel="expected loss, nats a token")
    plot.set_title(f"Sensitivity: {kind} (blue: first layer, red: last)")
    plot.set_yscale("symlog", linthresh=1e-3)


def _save(figure: Figure, path: Path) -> None:
    """Writes the file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.tmp-") as folder:
        draft = Path(folder) / "figure.png"
        figure.savefig(draft, dpi=120, metadata={"Software": None})
        draft.replace(path)
