"""What an error in the middle of a model costs at its end: Fisher matrices of the residual stream, and gradients.

With g = ∂L/∂y at the output of a linear that writes to the residual stream, and labels drawn from the model itself,
G = Σ g gᵀ / positions is the Fisher matrix. An error of second moment E in y costs ½ tr(G E) nats a token.
Letters: D hidden, N windows, T positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..calibration.walk import check_calibration, working_dtype
from ..checkpoints.unfinished import open_stage
from ..graph.config import layer_of
from ..graph.graph import Graph
from ..graph.topology import feeds
from ..model.transformer import Block, Transformer
from ..progress import tqdm

GRADIENT_WINDOW = 512  # positions a backward pass keeps the activations of


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """Of a whole graph.

    Fields:
        fisher: Fisher matrices [D, D] by the name of the linear at whose output they were taken: the output projection
            of an attention, the down projection of an FFN. Empty where they were not asked for.
        gradients: ∂L/∂w of every parameter of the layers, by its name, or None where they were not asked for.
    """

    fisher: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor] | None = None


def sensitivities(
    graph: Graph,
    tokens: Tensor,
    gradients: bool = False,
    seed: int = 0,
    fisher: bool = True,
    progress: bool = True,
) -> Sensitivity:
    """Fisher matrices behind every sublayer from tokens [N, T], labels drawn from the model's own distribution by
    `seed` (none without `fisher`); with `gradients`, also ∂L/∂w of the text's own next-token loss."""
    tokens = check_calibration(graph, tokens)
    model = graph.dense().module(tokens.device, working_dtype(graph, tokens.device))
    generator = torch.Generator(tokens.device).manual_seed(seed)
    matrices: dict[str, Tensor] = {}
    total: dict[str, Tensor] = {}
    drawn: dict[str, Tensor] = {}  # the generator's state
    stage = open_stage("sensitivities", tokens.device, matrices=matrices, total=total, drawn=drawn)
    if drawn:
        generator.set_state(drawn["state"].clone())
    windows = [
        piece for window in tokens.split(1) for piece in window.split(GRADIENT_WINDOW, dim=1) if piece.shape[1] > 1
    ]
    positions = sum(window.shape[1] for window in windows)
    names = [name for name, _ in model.named_parameters() if layer_of(name) is not None]
    for window in tqdm(
        windows[stage.done :],
        desc="sensitivity",
        unit="window",
        initial=stage.done,
        total=len(windows),
        delay=2,
        disable=not progress,
    ):
        if fisher:
            _add_fisher(graph, model, window, matrices, generator)
        if gradients:
            for name, gradient in zip(names, _gradients(model, window, names)):
                total[name] = total[name] + gradient if name in total else gradient
        drawn["state"] = generator.get_state()
        stage.save(stage.done + 1)
    stage.finish()
    return Sensitivity({name: G / positions for name, G in matrices.items()}, total if gradients else None)


def _add_fisher(
    graph: Graph, model: Transformer, ids: Tensor, fisher: dict[str, Tensor], generator: torch.Generator
) -> None:
    """Adds Σ g gᵀ over the positions of ids [1, T] to the matrix of every linear that writes to the residual stream."""
    writers = {(feed.layer, feed.role): feed.readers[0] for feed in feeds(graph.config) if feed.writes_stream}

    def add_to(name: str) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            g = gradient.flatten(0, 1)
            fisher[name] = fisher.get(name, 0) + (g.T @ g).double()

        return hook

    with torch.enable_grad():
        tables = model.tables(0, ids.shape[1])
        x = model.model.embed_tokens(ids).detach().requires_grad_()
        for i, block in enumerate(model.blocks):
            assert isinstance(block, Block)
            if name := writers.get((i, "attention_out")):
                x = block.attention(x, tables)
                x.register_hook(add_to(name))
            if name := writers.get((i, "ffn_out")):
                x = block.ffn(x)
                x.register_hook(add_to(name))
        logits = model.lm_head(model.model.norm(x))[0].float()
        with torch.no_grad():
            labels = torch.multinomial(logits.softmax(-1), 1, generator=generator).flatten()
        F.cross_entropy(logits, labels, reduction="sum").backward()


def _gradients(model: Transformer, ids: Tensor, names: list[str]) -> list[Tensor]:
    """∂/∂w of the summed next-token loss of ids [1, T], for the named parameters."""
    weights = [model.get_parameter(name) for name in names]
    for weight in weights:
        weight.requires_grad_(True)
    try:
        with torch.enable_grad():
            logits = model(ids)[0, :-1].float()
            loss = F.cross_entropy(logits, ids[0, 1:], reduction="sum")
            return list(torch.autograd.grad(loss, weights))
    finally:
        for weight in weights:
            weight.requires_grad_(False)
