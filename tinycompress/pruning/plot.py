"""Pictures of what a pass did, as PNG files; matplotlib is imported when one is drawn."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import need
from ..graph.config import Config


def draw_widths(
    path: str | Path, before: Config, after: Config, losses: Mapping[str, tuple[Sequence[int], Sequence[float]]]
) -> None:
    """Widths of every layer before and after; below, for each kind of axis, the loss of every layer against the share kept.

    losses: axis (`layers.3.ffn`) to its sizes and the expected loss in nats a token at each.
    """
    need("matplotlib", "plot")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = sorted({axis.rsplit(".", 1)[1] for axis in losses})
    figure = Figure(figsize=(10, 6 if kinds else 3), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2 if kinds else 1, max(len(kinds), 1))
    top = figure.add_subplot(grid[0, :])
    below = [figure.add_subplot(grid[1, i]) for i in range(len(kinds))]
    x = range(before.n_layers)
    for offset, name, color in ((-0.2, "ffn_dim", "tab:blue"), (0.2, "n_heads", "tab:orange")):
        full = max((getattr(layer, name) for layer in before.layers), default=0) or 1
        for config, alpha in ((before, 0.3), (after, 1.0)):
            heights = [getattr(layer, name) / full for layer in config.layers]
            label = f"{name}, {'kept' if config is after else 'before'} (1 = {full})"
            top.bar([i + offset for i in x], heights, 0.4, color=color, alpha=alpha, label=label)
    top.set(xlabel="layer", ylabel="share of the widest", title="Widths before and after")
    top.legend(fontsize="small", ncols=2, loc="lower right")
    for plot, kind in zip(below, kinds):
        for axis, (sizes, values) in losses.items():
            if axis.endswith(f".{kind}"):
                layer = int(axis.split(".")[1])
                shade = layer / max(before.n_layers - 1, 1)
                plot.plot(
                    [size / sizes[-1] for size in sizes], values, color=(shade, 0.2, 1 - shade), label=f"layer {layer}"
                )
        plot.set(xlabel=f"share of {kind} kept", ylabel="expected loss, nats a token")
        plot.set_title(f"Sensitivity: {kind} (blue: first layer, red: last)")
        plot.set_yscale("symlog", linthresh=1e-3)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.tmp-") as folder:
        draft = Path(folder) / "figure.png"
        figure.savefig(draft, dpi=120, metadata={"Software": None})
        draft.replace(path)
