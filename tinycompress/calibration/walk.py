"""Calibration: one walk over the graph, block by block, that shows a visitor the inputs of every Feed.

A block is walked piece by piece (q,k,v → o → gate,up → down) and each piece runs once, with whatever weights the
visitor returned for it: so later pieces, and later layers, see the already compressed prefix (GPTQ's true-sequential
order) for the price of one forward. Only one block's weights and one piece's activations are in memory.

Letters: N windows, T window length, b windows a batch, K width of a feed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import InputError
from ..graph.config import layer_prefix
from ..graph.graph import Graph, Weight
from ..graph.topology import Feed, feeds
from ..model.generation import check_ids
from ..model.linear import linear
from ..model.matmul import product
from ..model.transformer import Block, Embedding, Norm, RotaryTables

BATCH_TOKENS = 4096  # long enough for the matrix products, short enough for activations to be reused from memory


@dataclass(frozen=True)
class Inputs:
    """The inputs of one feed: iterate (as often as needed) over batches [b, T, K]. `reference` holds the same
    positions' inputs in the untouched graph, when the walk was asked for them. `residual` are the batches [b, T, D] of
    the residual stream that the readers' sublayer will add to."""

    make: Callable[[], Iterator[Tensor]]
    reference: Inputs | None = None
    residual: Sequence[Tensor] = ()

    def __iter__(self) -> Iterator[Tensor]:
        return self.make()

    def balanced(self, weight: Tensor) -> Inputs:
        """The inputs of a writer of the residual stream (`weight` [D, K]), each position divided by the root mean square
        of the stream after it, in both graphs. What reads the stream divides by that as well, so squared errors count
        as they are read, and the few positions with massive activations do not drown the others."""
        by = [
            (h + product(x, weight.to(x.dtype))).square().mean(-1, keepdim=True).rsqrt()
            for x, h in zip(self, self.residual)
        ]

        def scaled(inputs: Inputs) -> Inputs:
            residual = [h * r for h, r in zip(inputs.residual, by)]
            return Inputs(
                lambda: (x * r for x, r in zip(inputs, by)), inputs.reference and scaled(inputs.reference), residual
            )

        return scaled(self)


Visitor = Callable[[Feed, Inputs], Mapping[str, Weight] | None]


Finish = Callable[[Graph, int, list[Tensor], list[Tensor], RotaryTables], Mapping[str, Weight]]


@torch.no_grad()
def walk(
    graph: Graph,
    tokens: Tensor,
    visit: Visitor,
    *,
    reference: bool = False,
    finish: Finish | None = None,
    progress: str | None = None,
) -> Graph:
    """Calls `visit(feed, inputs)` for every feed in order; the parameters it returns (same shapes) replace the graph's.

    tokens: [N, T] ids, on the device to work on. Blocks run in float32 on the CPU, in the graph's dtype elsewhere.
    reference: also run the untouched graph and show its inputs as `inputs.reference` (twice the time and memory).
    finish: behind the last feed of a block, `finish(changed, layer, inputs, targets, tables)` may replace parameters of the
    block once more, which then runs again: `changed` is the graph with what the visitor returned, inputs are the batches
    [b, T, D] that reached the block, targets what the untouched graph has behind it. It takes `reference`.
    Returns the graph with the replaced parameters. Raises InputError for unusable tokens or non-finite activations.
    """
    tokens = check_calibration(graph, tokens)
    device = tokens.device
    dtype = torch.float32 if device.type == "cpu" and graph.dtype.itemsize < 4 else graph.dtype
    stream = _Stream(graph, tokens, device, dtype)
    other = _Stream(graph, tokens, device, dtype) if reference else None
    if finish and not other:
        raise InputError("walk(finish=…)", "without a reference", "reference=True")
    changed: dict[str, Weight] = {}
    todo: dict[int | None, list[Feed]] = {}
    for feed in feeds(graph.config):
        todo.setdefault(feed.layer, []).append(feed)
    for layer in tqdm(range(graph.config.n_layers), desc=progress, unit="layer", delay=2, disable=progress is None):
        for s in (stream, other):
            if s:
                s.enter(layer)
        before = [h.clone() for h in stream.hidden] if finish else []
        for feed in todo.get(layer, ()):
            inputs = stream.inputs(feed, other)
            new = visit(feed, inputs) or {}
            changed |= new
            stream.apply(new)
            for s in (stream, other):
                if s:
                    s.advance(feed)
        if (
            finish
            and other
            and (new := finish(graph.replace(weights=changed), layer, before, other.hidden, stream.tables))
        ):
            changed |= new
            stream.apply(new)
            stream.again(before)
    for feed in todo[None]:
        changed |= visit(feed, stream.inputs(feed, other)) or {}
    return graph.replace(weights=changed)


BlockVisitor = Callable[[int, list[Tensor], list[Tensor], RotaryTables], Mapping[str, Weight] | None]


@torch.no_grad()
def walk_blocks(
    graph: Graph, reference: Graph, tokens: Tensor, visit: BlockVisitor, *, progress: str | None = None
) -> Graph:
    """Calls `visit(layer, inputs, targets, tables)` for every block in order; the parameters it returns replace the graph's.

    inputs: batches [b, T, D] of what reaches the block in `graph`, with the blocks before it already replaced; targets:
    what the same block of `reference` (as many layers, as wide a stream) makes of its own inputs. tokens as for `walk`.
    """
    tokens = check_calibration(graph, tokens)
    if (reference.config.n_layers, reference.config.hidden_size) != (graph.config.n_layers, graph.config.hidden_size):
        raise InputError(
            "reference",
            reference,
            f"a graph of {graph.config.n_layers} layers and hidden size {graph.config.hidden_size}",
        )
    device = tokens.device
    dtype = torch.float32 if device.type == "cpu" and graph.dtype.itemsize < 4 else graph.dtype
    here, there = (_Stream(g, tokens, device, dtype) for g in (graph, reference))
    changed: dict[str, Weight] = {}
    for layer in tqdm(range(graph.config.n_layers), desc=progress, unit="layer", delay=2, disable=progress is None):
        there.step(Block(reference, layer, device, dtype))
        if not all(torch.isfinite(h).all() for h in there.hidden):
            raise InputError(
                f"output of {layer_prefix(layer)}",
                "NaN or infinite values",
                "finite activations (look at the weights before it)",
            )
        new = visit(layer, here.hidden, there.hidden, here.tables) or {}
        changed |= new
        here.step(Block(graph.replace(weights=new).dense(dtype), layer, device, dtype))
    return graph.replace(weights=changed)


def check_calibration(graph: Graph, tokens: Tensor) -> Tensor:
    """tokens as [N, T] of ids in the vocabulary and windows within the context; else an InputError."""
    if tokens.dim() != 2 or tokens.dtype not in (torch.int64, torch.int32):
        raise InputError(
            "calibration tokens", f"{tokens.dtype} {tuple(tokens.shape)}", "integer ids [windows, seq_len]"
        )
    if tokens.shape[1] < 2:
        raise InputError("calibration tokens", f"windows of {tokens.shape[1]}", "windows of at least 2 tokens")
    if tokens.shape[1] > graph.config.max_position:
        raise InputError(
            "calibration tokens", f"windows of {tokens.shape[1]}", f"at most the context, {graph.config.max_position}"
        )
    check_ids(tokens, graph.config.vocab_size)
    return tokens


class _Stream:
    """The hidden states of all windows on their way through one graph, in batches [b, T, D]."""

    def __init__(self, graph: Graph, tokens: Tensor, device: torch.device, dtype: torch.dtype) -> None:
        self.graph, self.device, self.dtype = graph, device, dtype
        T = tokens.shape[1]
        embed = Embedding(graph.weights["model.embed_tokens.weight"].to(device, dtype))
        self.hidden = [embed(b).to(dtype) for b in tokens.split(max(1, BATCH_TOKENS // T))]
        self.tables = RotaryTables(graph.config.rope, graph.config.head_dim, 0, T, device, dtype)
        self.piece: list[Tensor] = []  # what the sublayer in progress handed to o_proj or down_proj
        self.block: Block | None = None

    def step(self, block: Block) -> None:
        """Runs a whole block."""
        self.hidden = [block(h, self.tables) for h in self.hidden]

    def again(self, hidden: list[Tensor]) -> None:
        """Runs the block that was entered from what reached it."""
        assert self.block is not None
        self.hidden = hidden
        self.step(self.block)

    def enter(self, layer: int) -> None:
        self.block = Block(self.graph, layer, self.device, self.dtype)

    def apply(self, weights: Mapping[str, Weight]) -> None:
        """Puts new weights into the block, dense: a packed one would be unpacked again for every batch."""
        for name, weight in weights.items():
            owner, what = name.rsplit(".", 1)
            if self.block is None or not owner.startswith("model.layers."):
                continue
            path = owner.split(".")[3:]
            parent: nn.Module = self.block
            for step in path[:-1]:
                parent = getattr(parent, step)
            dense = weight if isinstance(weight, Tensor) else weight.dequantize()
            dense = dense.to(self.device, self.dtype)
            if what == "weight" and not isinstance(getattr(parent, path[-1]), Norm):
                setattr(parent, path[-1], linear(dense, getattr(parent, path[-1]).bias))
            else:
                setattr(getattr(parent, path[-1]), what, nn.Parameter(dense, requires_grad=False))

    def inputs(self, feed: Feed, other: _Stream | None) -> Inputs:
        return Inputs(lambda: self._batches(feed), None if other is None else other.inputs(feed, None), self.hidden)

    def _batches(self, feed: Feed) -> Iterator[Tensor]:
        norm = self._norm(feed)
        if norm is not None:
            yield from (norm(h) for h in self.hidden)
        else:
            yield from self.piece

    def _norm(self, feed: Feed) -> Norm | None:
        if feed.layer is None:
            return Norm(self.graph.tensor("model.norm.weight").to(self.device, self.dtype), self.graph.config.norm_eps)
        return getattr(self.block, feed.source.rsplit(".", 1)[1], None) if "layernorm" in feed.source else None

    def advance(self, feed: Feed) -> None:
        """Runs the readers of the feed on its inputs, once."""
        block = self.block
        assert block is not None
        norm = self._norm(feed)
        attention, mlp, reader = block.self_attn, block.mlp, feed.readers[0].rsplit(".", 1)[1]
        if attention and norm and reader == "q_proj":
            self.piece = [attention.heads(norm(h), self.tables) for h in self.hidden]
        elif mlp and norm and reader == "gate_proj":
            self.piece = [mlp.mid(norm(h)) for h in self.hidden]
        else:
            out = block.get_submodule(("self_attn." if reader == "o_proj" else "mlp.") + reader)
            self.hidden = [h.add_(out(x)) for h, x in zip(self.hidden, self.piece)]
            self.piece = []
