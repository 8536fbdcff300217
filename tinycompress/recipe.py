"""From the options of `tinycompress compress` to a list of passes, everything checked on the config before any work."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import Config, ffn_shapes, shapes
from .errors import InputError
from .graph import Graph, Pass, feeds
from .passes.gptq import GPTQ
from .passes.prune import PruneFFN
from .passes.rope import ScaleRope
from .passes.rtn import RTN
from .quantize import QuantSpec, targets

METHODS = ("gptq", "rtn")


@dataclass(frozen=True)
class Recipe:
    """Prune, then stretch the context, then quantize: each measures the model that the one before it left."""

    prune: str | None = None
    context: int | None = None
    rope_method: str = "yarn"
    quantize: QuantSpec | None = None
    quantize_method: str = "gptq"

    def __post_init__(self) -> None:
        if self.quantize_method not in METHODS:
            raise InputError("--quantize-method", repr(self.quantize_method), " | ".join(METHODS))

    @property
    def calibrates(self) -> bool:
        return self.prune is not None or (self.quantize is not None and self.quantize_method == "gptq")

    def passes(self, graph: Graph, tokens: Tensor | None = None) -> list[Pass]:
        """The passes for `graph`; those that calibrate do so on `tokens`, and refuse to run without."""
        tokens = torch.empty(0, 0, dtype=torch.long) if tokens is None else tokens
        out: list[Pass] = []
        if self.prune:
            multiple = self.quantize.group_size if self.quantize and self.quantize.group_size else 1
            out.append(PruneFFN(tokens, keep=ffn_share(graph.config, self.prune, multiple), multiple_of=multiple))
        if self.context is not None:
            out.append(ScaleRope(context=self.context, method=self.rope_method))
        if self.quantize:
            out.append(RTN(self.quantize) if self.quantize_method == "rtn" else GPTQ(tokens, self.quantize))
        return out

    def check(self, graph: Graph) -> Config:
        """The config that `passes` will arrive at; an InputError for what could not work, without reading a weight."""
        config = graph.config
        for step in self.passes(graph):
            if isinstance(step, PruneFFN):
                layers = (dataclasses.replace(layer, ffn_dim=width) for layer, width in zip(config.layers, step.widths(graph)))
                config = dataclasses.replace(config, layers=tuple(layers))
            elif isinstance(step, ScaleRope):
                config = dataclasses.replace(step(graph).config, layers=config.layers)
        if self.quantize:
            targets(graph, dataclasses.replace(self.quantize, group_size=None))  # still dense?
            for name, width in linear_inputs(config).items():
                self.quantize.group(name, width)
        return config


def linear_inputs(config: Config) -> dict[str, int]:
    """The input width of every linear of the layers (the head aside)."""
    sizes = shapes(config)
    return {name: sizes[f"{name}.weight"][1] for feed in feeds(config) if feed.layer is not None for name in feed.readers}


def ffn_share(config: Config, text: str, multiple_of: int = 1) -> float:
    """The share of every FFN that `ffn=SHARE` or `params=SHARE` keeps.

    `params` counts the non-embedding parameters; all of the cut falls on the FFNs, so what they must keep is
    (SHARE · all - the rest) / FFN, and a share that would leave less than `multiple_of` channels is out of reach.
    """
    key, _, number = text.partition("=")
    try:
        share = float(number)
    except ValueError:
        share = -1.0
    if key not in ("params", "ffn") or not 0 < share <= 1:
        raise InputError("--prune", repr(text), "params=SHARE or ffn=SHARE, SHARE above 0 and at most 1, such as params=0.8")
    widest = max((layer.ffn_dim for layer in config.layers), default=0)
    if not widest:
        raise InputError("--prune", f"{text} for a model without FFNs", "a model with FFNs")
    if key == "ffn":
        return share
    ffn = sum(_ffn_params(config, layer.ffn_dim) for layer in config.layers)
    rest = config.n_body_params - ffn
    keep = min(1.0, (share * config.n_body_params - rest) / ffn)
    narrowest = min(layer.ffn_dim for layer in config.layers if layer.ffn_dim)
    if round(keep * narrowest / multiple_of) < 1:
        least = sum(_ffn_params(config, -(-layer.ffn_dim * multiple_of // narrowest)) for layer in config.layers)
        reachable = math.ceil(100 * (rest + least) / config.n_body_params) / 100
        raise InputError("--prune", text, f"params={reachable:.2f} or more: all of the cut falls on the FFNs, the rest stays")
    return round(keep, 6)


def _ffn_params(config: Config, width: int) -> int:
    """Parameters of one FFN that a cut of its width can save: the three matrices and the biases of gate and up."""
    columns = sum(shape[0] * shape[1] for shape in ffn_shapes(config, dataclasses.replace(config.layers[0], ffn_dim=1)).values())
    return width * (columns + len(config.biases & {"gate_proj", "up_proj"}))
