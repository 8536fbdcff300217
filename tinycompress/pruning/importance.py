"""Which channels, heads and layers matter: statistics of one axis, and published criteria as functions of them.

  magnitude   √Σ w² over everything that is cut together
  wanda_sp    Σ_i |W_ij| · ‖x_j‖ / D                              (Wanda, arXiv:2306.11695; Wanda-sp in FLAP's paper)
  minitron    √Σ_windows (mean_t |x_j|)²                          (Minitron, arXiv:2407.14679)
  flap        Var(x_j) · ‖W_:j‖²                                  (FLAP, arXiv:2312.11983)
  taylor      Σ |w · ∂L/∂w| over everything that is cut together  (LLM-Pruner, arXiv:2305.11627)
  obs         the loss of greedy removal with everything left refitted (ZipLM, arXiv:2302.04089; OSSCAR, arXiv:2403.12983)

A criterion is any function from `Statistics` to scores [n], one a unit of the axis: what scores lowest goes first. W is
the linear that reads the axis (down_proj, o_proj), x its input. `fisher` measures what an error there costs in the end:
with g = ∂L/∂y at the output of W and labels drawn from the model itself, G = Σ g gᵀ / positions is the Fisher matrix, and
an error of second moment E in y costs ½ tr(G E) nats a token.
Letters: D hidden, K inputs of W, n units, N windows, T positions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ..calibration.gram import gram
from ..calibration.walk import Inputs, check_calibration, walk
from ..errors import InputError
from ..graph.graph import Graph
from ..graph.topology import Axis, Feed, axes
from ..model.transformer import Block, Transformer
from .refit import obs_losses

GRADIENT_WINDOW = 512  # positions a backward pass keeps the activations of


@dataclass(frozen=True, eq=False)
class Statistics:
    """What is known of one axis. `weight` [D, K] reads it, `gram` Σ x xᵀ [K, K], `mean` E[x] [K], `absolute` the mean |x|
    of each window [N, K], `positions` how many were seen; `coupled` are the parameters that the axis cuts, `gradients`
    ∂L/∂ of those and `sensitivity` the Fisher matrix [D, D] at W's output, or None where they were not asked for."""

    axis: Axis
    weight: Tensor
    gram: Tensor
    mean: Tensor
    absolute: Tensor
    positions: int
    coupled: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor] | None = None
    sensitivity: Tensor | None = None

    @property
    def width(self) -> int:
        """Inputs of W that a unit of the axis has: 1 for an FFN channel, head_dim for a head."""
        return self.weight.shape[1] // self.axis.size

    def units(self, channels: Tensor) -> Tensor:
        """Values of input channels [K] summed over each unit [n]."""
        return channels.view(self.axis.size, self.width).sum(1)

    def coupled_units(self, values: Mapping[str, Tensor]) -> Tensor:
        """Values of the axis's parameters, shaped like them, summed over all that belongs to a unit: float64 [n]."""
        total = torch.zeros(self.axis.size, dtype=torch.float64, device=self.weight.device)
        for name, (dim, stride) in self.axis.cuts.items():
            rows = values[name].double().movedim(dim, 0).reshape(self.axis.size * stride, -1).sum(1)
            total += rows.view(self.axis.size, stride).sum(1).to(total.device)
        return total

    @property
    def seen_weight(self) -> Tensor:
        """√(G/2) · W in float64, so that squared norms are nats; W itself where no sensitivity is known."""
        W = self.weight.double()
        if self.sensitivity is None:
            return W
        return root(self.sensitivity / 2) @ W


Criterion = Callable[[Statistics], Tensor]
T = TypeVar("T")


def root(matrix: Tensor) -> Tensor:
    """The symmetric square root of a positive semi-definite matrix, float64."""
    values, vectors = torch.linalg.eigh(matrix.double())
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def magnitude(s: Statistics) -> Tensor:
    return s.coupled_units({name: w.double().square() for name, w in s.coupled.items()}).sqrt()


def wanda_sp(s: Statistics) -> Tensor:
    return s.units(s.weight.double().abs().mean(0) * s.gram.diagonal().sqrt())


def minitron(s: Statistics) -> Tensor:
    return s.units(s.absolute.double().square().sum(0)).sqrt()  # heads: the L2 norm over head_dim


def flap(s: Statistics) -> Tensor:
    variance = (s.gram.diagonal() / s.positions - s.mean.double().square()).clamp_min(0)
    return s.units(variance * s.weight.double().square().sum(0))


def taylor(s: Statistics) -> Tensor:
    if s.gradients is None:
        raise InputError(
            "statistics", "no gradients", "statistics collected with gradients=True, which the taylor criterion reads"
        )
    return s.coupled_units({name: (w.double() * s.gradients[name].double()).abs() for name, w in s.coupled.items()})


def obs(s: Statistics) -> Tensor:
    return obs_losses(s.seen_weight, s.gram / s.positions, s.width, s.axis.groups)


CRITERIA: Mapping[str, Criterion] = {
    "magnitude": magnitude,
    "wanda_sp": wanda_sp,
    "minitron": minitron,
    "flap": flap,
    "taylor": taylor,
    "obs": obs,
}


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """Of a whole graph: Fisher matrices [D, D] by the linear at whose output they were taken (o_proj, down_proj), and,
    if asked for, ∂L/∂w of every parameter of the layers."""

    fisher: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor] | None = None


def statistics(
    graph: Graph,
    axis: Axis,
    feed: Feed,
    inputs: Inputs,
    hessian: Tensor | None = None,
    sensitivity: Sensitivity | None = None,
) -> Statistics:
    """Those of `axis` from the inputs of the linear that reads it (a feed of `walk`)."""
    name = feed.readers[0]
    device, total, absolute, positions = torch.device("cpu"), None, [], 0
    for batch in inputs:  # (b, T, K)
        sums = batch.sum((0, 1), dtype=torch.float64)
        total = sums if total is None else total + sums
        absolute.append(batch.abs().mean(1))
        positions += batch.shape[0] * batch.shape[1]
        device = batch.device
    assert total is not None
    coupled = {n: graph.tensor(n).to(device) for n in axis.cuts}
    return Statistics(
        axis,
        graph.tensor(f"{name}.weight").to(device),
        gram(feed, inputs) if hessian is None else hessian,
        total / positions,
        torch.cat(absolute),
        positions,
        coupled,
        None
        if sensitivity is None or sensitivity.gradients is None
        else {n: sensitivity.gradients[n].to(device) for n in axis.cuts},
        None if sensitivity is None or name not in sensitivity.fisher else sensitivity.fisher[name].to(device),
    )


def measure(
    graph: Graph,
    tokens: Tensor,
    names: Collection[str],
    use: Callable[[Statistics], T],
    sensitivity: Sensitivity | None = None,
) -> dict[str, T]:
    """`use` of the statistics of each named axis (`layers.i.ffn`, `layers.i.heads`, `layers.i.kv_heads`) from one walk over
    `tokens` [N, T]; what it does not keep is gone when the walk moves on: a Gram matrix of every layer is gigabytes."""
    known = axes(graph.config)
    if unknown := [name for name in names if name not in known or not name.startswith("layers.")]:
        raise InputError(
            "axes", unknown, "layers.i.ffn, layers.i.heads and layers.i.kv_heads of sublayers that are there"
        )
    out: dict[str, T] = {}

    def visit(feed: Feed, inputs: Inputs) -> None:
        wanted = [name for name in reads(feed) if name in names]
        hessian = gram(feed, inputs) if wanted else None
        for name in wanted:
            out[name] = use(statistics(graph, known[name], feed, inputs, hessian, sensitivity))

    walk(graph, tokens, visit, progress="statistics")
    return out


def collect(
    graph: Graph, tokens: Tensor, names: Collection[str], sensitivity: Sensitivity | None = None
) -> dict[str, Statistics]:
    """The statistics themselves, all at once."""
    return measure(graph, tokens, names, lambda stats: stats, sensitivity)


def reads(feed: Feed) -> tuple[str, ...]:
    """The axes that the readers of a feed read channel by channel."""
    if feed.layer is None:
        return ()
    kind = feed.readers[0].rsplit(".", 1)[1]
    return {
        "o_proj": (f"layers.{feed.layer}.heads", f"layers.{feed.layer}.kv_heads"),
        "down_proj": (f"layers.{feed.layer}.ffn",),
    }.get(kind, ())


def sensitivities(
    graph: Graph, tokens: Tensor, gradients: bool = False, seed: int = 0, fisher: bool = True
) -> Sensitivity:
    """Fisher matrices of the residual stream behind every sublayer from tokens [N, T], labels drawn from the model's own
    distribution by `seed` (none without `fisher`); with `gradients`, also ∂L/∂w of the text's own next-token loss."""
    tokens = check_calibration(graph, tokens)
    dtype = torch.float32 if tokens.device.type == "cpu" and graph.dtype.itemsize < 4 else graph.dtype
    model = graph.dense().module(tokens.device, dtype)
    generator = torch.Generator(tokens.device).manual_seed(seed)
    matrices: dict[str, Tensor] = {}
    windows = [
        piece for piece in tokens.split(1) for piece in piece.split(GRADIENT_WINDOW, dim=1) if piece.shape[1] > 1
    ]
    positions = sum(w.shape[1] for w in windows)
    names = [n for n, _ in model.named_parameters() if n.startswith("model.layers.")]
    total: dict[str, Tensor] = {}
    for window in tqdm(windows, desc="sensitivity", unit="window", delay=2):
        if fisher:
            _backward(model, window, matrices, generator)
        if gradients:
            for name, g in zip(names, _gradients(model, window, names)):
                total[name] = total[name] + g if name in total else g
    return Sensitivity({name: G / positions for name, G in matrices.items()}, total if gradients else None)


def _backward(model: Transformer, ids: Tensor, fisher: dict[str, Tensor], generator: torch.Generator) -> None:
    """Adds Σ g gᵀ over the positions of ids [1, T] to every matrix of `fisher`."""

    def add(name: str) -> Callable[[Tensor], None]:
        def hook(grad: Tensor) -> None:
            g = grad.flatten(0, 1)
            fisher[name] = fisher.get(name, 0) + (g.T @ g).double()

        return hook

    with torch.enable_grad():
        tables = model.tables(0, ids.shape[1])
        x = model.model.embed_tokens(ids).detach().requires_grad_()
        for i, block in enumerate(model.model.layers):
            assert isinstance(block, Block)
            if block.self_attn is not None:
                x = x + block.self_attn(block.input_layernorm(x), tables)
                x.register_hook(add(f"model.layers.{i}.self_attn.o_proj"))
            if block.mlp is not None:
                x = x + block.mlp(block.post_attention_layernorm(x))
                x.register_hook(add(f"model.layers.{i}.mlp.down_proj"))
        logits = model.lm_head(model.model.norm(x))[0].float()
        with torch.no_grad():
            labels = torch.multinomial(logits.softmax(-1), 1, generator=generator).flatten()
        F.cross_entropy(logits, labels, reduction="sum").backward()


def _gradients(model: Transformer, ids: Tensor, names: list[str]) -> list[Tensor]:
    """∂/∂w of the summed next-token loss of ids [1, T], for the named parameters."""
    weights = [model.get_parameter(n) for n in names]
    for w in weights:
        w.requires_grad_(True)
    try:
        with torch.enable_grad():
            logits = model(ids)[0, :-1].float()
            loss = F.cross_entropy(logits, ids[0, 1:], reduction="sum")
            return list(torch.autograd.grad(loss, weights))
    finally:
        for w in weights:
            w.requires_grad_(False)


def block_influence(graph: Graph, tokens: Tensor) -> Tensor:
    """1 - cos(hidden state before, after) of every layer, averaged over positions (ShortGPT, arXiv:2403.03853): [layers]."""
    out = torch.zeros(graph.config.n_layers, dtype=torch.float64)
    before: list[Tensor] = []
    owner = -1

    def visit(feed: Feed, inputs: Inputs) -> None:
        nonlocal before, owner
        layer = graph.config.n_layers if feed.layer is None else feed.layer
        if layer == owner or "norm" not in feed.source:
            return
        weight = graph.tensor(f"{feed.source}.weight")
        scale = torch.where(weight == 0, 0.0, 1 / weight.double()).to(
            tokens.device
        )  # a norm scales a position and each channel
        after = [x * scale.to(x.dtype) for x in inputs]
        if before:  # layers between the two that have no sublayer change nothing
            cosines = [F.cosine_similarity(a, b, dim=-1).double().sum() for a, b in zip(before, after)]
            out[owner] = 1 - float(sum(cosines)) / tokens.numel()
        before, owner = after, layer

    walk(graph, tokens, visit, progress="block influence")
    return out


def hidden_importance(graph: Graph, tokens: Tensor) -> Tensor:
    """Minitron's for hidden channels: √Σ_windows (mean_t |x_j|)² summed over the outputs of every norm, float64 [D]."""
    out = torch.zeros(graph.config.hidden_size, dtype=torch.float64, device=tokens.device)

    def visit(feed: Feed, inputs: Inputs) -> None:
        if "norm" in feed.source:
            out.add_(torch.stack([x.abs().mean(1).double().square().sum(0) for x in inputs]).sum(0).sqrt())

    walk(graph, tokens, visit, progress="hidden importance")
    return out
