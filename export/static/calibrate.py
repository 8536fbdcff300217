"""Activation grids of a static graph, from real text: its float form runs chunk by chunk, as the export will, with
every activation as an output. Constants and host inputs get the range of all their values, read or not, so that no
token and no position can leave it; computed activations get the headroom of their form beyond what the text showed.

Before that torch runs the text for the keys: HTP reads them at 8 bits, on one grid for all channels of all heads. A
score's error is then Σ_c q_c² s_c² Δ² / 12, for keys k_c / s_c on steps Δ, least where every |k_c| / s_c reaches the
same peak.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinycompress.calibration.walk import check_calibration
from tinycompress.errors import InputError, need
from tinycompress.graph.config import EMBEDDING, layer_names
from tinycompress.graph.graph import Graph
from tinycompress.progress import tqdm

from ..profiles import Profile
from ..quiet import onnxruntime
from .activation_ranges import SMALLEST, Activations, Array, Observer, grids, observe
from .emit import COS, MASK, SIN, observed
from .forms import FORMS, host_tensors, layout
from .host import FLOAT_PRODUCTS, StaticSession

QUIETEST = 64
FETCHED = 1 << 29  # bytes of activations fetched in one run


def calibrate(
    graph: Graph,
    profile: Profile,
    tokens: Tensor,
    method: str = "minmax",
    *,
    folder: Path | None = None,
    progress: bool = True,
) -> Activations:
    """The scales of the keys and the grid of every activation key of a graph made ready, from `tokens` [windows, T].

    `method`: see `activation_ranges`. `folder`: where the float graph lies while it runs (default: the system's own
    place for temporary files). NaN, infinity and saturation are InputErrors that name the activation.
    """
    form = FORMS[profile.name]
    assert form.activations is not None
    tokens = _whole_chunks(check_calibration(graph, tokens), chunk_of(graph, profile))
    shape = layout(graph, profile)
    host = {name: t.numpy() for name, t in host_tensors(graph).items()}
    balance = key_scales(graph, tokens, progress)
    model, named, given = observed(graph, profile, shape["chunk"], balance)
    fixed: dict[str, Observer] = {}
    seen: dict[str, Observer] = {}
    observe(fixed, _given(graph, given, host, form.mask))
    with tempfile.TemporaryDirectory(dir=folder) as work:
        watcher = _Watcher(model, Path(work), named, seen, method)
        session = StaticSession(shape, host, {"prefill": watcher})
        for window in tqdm(tokens.numpy(), desc="ranges", unit="window", delay=2, disable=not progress):
            session.step(window, session.new_cache())
    return Activations(
        grids(seen, form.activations, method, headroom=form.headroom) | grids(fixed, form.activations), balance
    )


@torch.inference_mode()
def key_scales(graph: Graph, tokens: Tensor, progress: bool = True) -> dict[str, Tensor]:
    """For each attention, by its prefix, the largest |key| of each channel [K, d] behind the rotation, over `tokens`
    [windows, T]; at least 1 / QUIETEST of the layer's largest, since the scales themselves are held in 16 bits."""
    model = graph.dense(torch.float32).module()
    config = graph.config
    with_attention = [i for i, layer in enumerate(config.layers) if layer.n_heads]
    peaks: dict[int, Tensor] = {}
    for window in tqdm(tokens, desc="keys", unit="window", delay=2, disable=not progress):
        cache = model.new_cache(1, len(window))
        model.hidden(window[None], cache)
        for i in with_attention:
            peak = cache.layers[i][0][0].abs().amax(1)  # (K, d)
            peaks[i] = torch.maximum(peaks[i], peak) if i in peaks else peak
    return {layer_names(i).attention: p.clamp_min(max(p.max().item() / QUIETEST, SMALLEST)) for i, p in peaks.items()}


def chunk_of(graph: Graph, profile: Profile) -> int:
    return min(FORMS[profile.name].chunk, graph.config.max_position)


def _whole_chunks(tokens: Tensor, chunk: int) -> Tensor:
    """Windows without a part-filled last chunk, whose padding would count as text."""
    if tokens.shape[1] < chunk:
        raise InputError(
            "calibration tokens",
            f"windows of {tokens.shape[1]}",
            f"windows of at least {chunk}, the prefill graph's length",
        )
    return tokens[:, : tokens.shape[1] // chunk * chunk].cpu()


def _given(
    graph: Graph, given: Mapping[str, Any], host: Mapping[str, Array], mask: float
) -> Iterator[tuple[str, Array]]:
    """All values of constants and of what the host hands over."""
    for key, value in given.items():
        if value.const_value is not None:
            yield key, value.const_value.numpy()
        elif key == "hidden":
            weight = graph.weights[EMBEDDING]
            for rows in (weight if isinstance(weight, Tensor) else weight.dequantize()).split(4096):
                yield key, rows.numpy()
        elif key in (COS, SIN):
            yield key, host[f"rope.{key}"]
        elif key.startswith(MASK):
            yield key, np.array([mask, 0.0], np.float32)


class _Watcher:
    """A float graph that notes its activations whenever it runs."""

    def __init__(
        self, model: Any, folder: Path, named: Mapping[str, str], seen: dict[str, Observer], method: str
    ) -> None:
        need("onnx_ir", "export")
        ort = onnxruntime()
        import onnx_ir as ir

        ir.save(model, folder / "model.onnx", external_data="model.data")
        options = ort.SessionOptions()
        options.add_session_config_entry(*FLOAT_PRODUCTS)
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
        self.named = named
        self.seen = seen
        self.method = method
        self.groups: list[list[str]] = [list(named)]

    def run(self, names: Sequence[str], feeds: Mapping[str, Array]) -> Sequence[Array]:
        """The graph's own outputs; the points are fetched a group at a time, as many as memory allows."""
        out: Sequence[Array] = ()
        for group in self.groups:
            first = names if group is self.groups[0] else ()
            values = self.session.run([*first, *group], feeds)
            out, values = (values[: len(names)], values[len(names) :]) if first else (out, values)
            observe(self.seen, zip(map(self.named.__getitem__, group), values), self.method)
        if len(self.groups) == 1 and (size := sum(v.nbytes for v in values)) > FETCHED:
            n = -(-len(group) // -(-size // FETCHED))
            self.groups = [group[i : i + n] for i in range(0, len(group), n)]
        return out
