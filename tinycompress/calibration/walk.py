"""Calibration: one walk over the graph, block by block, that shows a visitor the inputs of every Feed.

A block is walked piece by piece (q,k,v → o → gate,up → down) and each piece runs once, with whatever weights the
visitor returned for it: so later pieces, and later layers, see the already compressed prefix (GPTQ's true-sequential
order) for the price of one forward. Only one block's weights and one piece's activations are in memory.

In a pipeline with a work folder a walk that was killed goes on behind the last layer that it saved (`kept`).

Letters: N windows, T window length, b windows of a batch, K width of a feed, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..checkpoints.unfinished import Group, Stage, open_stage
from ..errors import InputError
from ..graph.config import EMBEDDING, FINAL_NORM, layer_of, layer_prefix
from ..graph.graph import Graph, Weight
from ..graph.quant_tensor import QuantTensor
from ..graph.topology import Feed, feeds
from ..model.generation import check_ids
from ..model.matmul import product
from ..model.transformer import Block, Embedding, Norm, RotaryTables
from ..progress import tqdm

BATCH_TOKENS = 4096  # long enough for the matrix products, short enough for activations to be reused from memory


class Lease:
    """Whether the activations behind some `Inputs` are still those of their feed."""

    def __init__(self) -> None:
        self.over = False


@dataclass(frozen=True)
class Inputs:
    """The inputs of one feed: iterate (as often as needed) over batches [b, T, K].

    They can be read while the visitor runs that they were given to; later their memory holds other activations, so
    reading them then is an `InputError`.

    Fields:
        make: a new iterator over the batches.
        reference: the same positions' inputs in the untouched graph, when the walk was asked for them.
        residual: batches [b, T, D] of the residual stream that the readers' sublayer will add to.
        lease: over once the visitor has returned; None for inputs that do not belong to a walk.
    """

    make: Callable[[], Iterator[Tensor]]
    reference: Inputs | None = None
    residual: Sequence[Tensor] = ()
    lease: Lease | None = field(default=None, repr=False, compare=False)

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self.make():
            if self.lease is not None and self.lease.over:
                raise InputError(
                    "Inputs", "read after their visitor had returned", "what the visitor computes of them, or copies"
                )
            yield batch

    def balanced(self, weight: Tensor) -> Inputs:
        """The inputs of a linear that writes to the residual stream (`weight` [D, K]), in both graphs, each position
        divided by the root mean square of the stream after it.

        The norms behind it divide by that as well, so squared errors count as they are read, and the few positions with
        massive activations do not drown the others.
        """
        scales = [
            (h + product(x, weight.to(x.dtype))).square().mean(-1, keepdim=True).rsqrt()
            for x, h in zip(self, self.residual)
        ]

        def scaled(inputs: Inputs) -> Inputs:
            residual = [h * scale for h, scale in zip(inputs.residual, scales)]
            reference = inputs.reference and scaled(inputs.reference)
            return Inputs(lambda: (x * scale for x, scale in zip(inputs, scales)), reference, residual)

        return scaled(self)


Visitor = Callable[[Feed, Inputs], Mapping[str, Weight] | None]
Finish = Callable[[Graph, int, list[Tensor], list[Tensor], RotaryTables], Mapping[str, Weight]]
BlockVisitor = Callable[[int, list[Tensor], list[Tensor], RotaryTables], Mapping[str, Weight] | None]


class Stream:
    """The hidden states of all windows on their way through one graph.

    Fields:
        hidden: batches [b, T, D], at most `BATCH_TOKENS` positions each; a step replaces or overwrites them.
        tables: cos and sin of the windows' positions.
        device, dtype: of the computation; by default those of the tokens, and `working_dtype`.
    """

    def __init__(
        self, graph: Graph, tokens: Tensor, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        self.graph = graph
        self.device = tokens.device if device is None else device
        self.dtype = working_dtype(graph, self.device) if dtype is None else dtype
        T = tokens.shape[1]
        table = graph.weights[EMBEDDING]
        if isinstance(table, QuantTensor):
            table = table.to(dtype=self.dtype)  # of its scales
        embed = Embedding(table)  # where it lies: only the rows that are asked for move
        batches = tokens.to(table.device).split(max(1, BATCH_TOKENS // T))
        self.hidden = [embed(ids).to(self.device, self.dtype) for ids in batches]
        self.tables = RotaryTables(graph.config.rope, graph.config.head_dim, 0, T, self.device, self.dtype)

    def step(self, block: Block) -> None:
        """Runs a whole block."""
        self.hidden = [block(h, self.tables) for h in self.hidden]

    def check_finite(self, layer: int) -> None:
        """An `InputError` where the block's output is not finite."""
        if not all(torch.isfinite(h).all() for h in self.hidden):
            accepted = "finite activations (look at the weights before it)"
            raise InputError(f"output of {layer_prefix(layer)}", "NaN or infinite values", accepted)


def blocks(
    graph: Graph, device: torch.device, dtype: torch.dtype, progress: str | None = None, first: int = 0
) -> Iterator[Block]:
    """The blocks in order from `first`, one block's weights in memory at a time; `progress` names a bar over the
    layers."""
    for layer in layers(graph, progress, first):
        yield Block(graph, layer, device, dtype)


def layers(graph: Graph, progress: str | None, first: int = 0) -> Iterable[int]:
    """The indices of the layers from `first`, with a bar named `progress` once it takes longer than two seconds; below
    another bar it vanishes at its end."""
    count = graph.config.n_layers
    indices = range(first, count)
    shown = progress is not None
    return tqdm(
        indices, desc=progress, unit="layer", initial=first, total=count, delay=2, disable=not shown, leave=None
    )


def working_dtype(graph: Graph, device: torch.device | str | None) -> torch.dtype:
    """The graph's own dtype, widened to float32 on a CPU, which has fast products only for that."""
    on_cpu = torch.device(device or "cpu").type == "cpu"
    return torch.promote_types(graph.dtype, torch.float32) if on_cpu else graph.dtype


@torch.no_grad()
def walk(
    graph: Graph,
    tokens: Tensor,
    visit: Visitor,
    *,
    reference: bool = False,
    finish: Finish | None = None,
    kept: Group | None = None,
    collect: bool = True,
    progress: str | None = None,
) -> Graph:
    """Calls `visit(feed, inputs)` for every feed in order; the parameters it returns (same shapes) replace the graph's.

    tokens: [N, T] ids, on the device to work on. Blocks run in float32 on the CPU, in the graph's dtype elsewhere.
    reference: also run the untouched graph and show its inputs as `inputs.reference` (twice the time and memory).
    finish: behind the last feed of a block, `finish(changed, layer, inputs, targets, tables)` may replace parameters of
    the block once more, which then runs again: `changed` is the graph with what the visitor returned, inputs are the
    batches [b, T, D] that reached the block, targets what the untouched graph has behind it. Needs `reference`.
    kept: all that `visit` and `finish` remember from one call to the next, tensors by name, none changed in place. In a
        pipeline with a work folder it is saved with the walk, and filled again where a killed walk goes on. None: such
        a walk starts again.
    collect: False for a visitor whose parameters move the activations alone, and are not to be gathered.
    progress: the name of a bar over the layers; None shows none.
    Returns the graph with the replaced parameters. Raises InputError for unusable tokens or non-finite activations.
    """
    tokens = check_calibration(graph, tokens)
    if finish and not reference:
        raise InputError("walk(finish=…)", "without a reference", "reference=True")
    changed: dict[str, Weight] = {}
    stage = Stage() if kept is None else open_stage("walk", tokens.device, changed=changed, kept=kept)
    if stage.finished:
        return graph.replace(weights=changed)
    stream = _Pieces(graph, tokens)
    other = _Pieces(graph, tokens) if reference else None
    streams = {"hidden": stream} if other is None else {"hidden": stream, "reference": other}
    for name, hidden in stage.live.items():
        streams[name].hidden = hidden
    feeds_of: dict[int | None, list[Feed]] = {}
    for feed in feeds(graph.config):
        feeds_of.setdefault(feed.layer, []).append(feed)

    def shown(feed: Feed) -> Mapping[str, Weight]:
        lease = Lease()
        try:
            new = visit(feed, stream.inputs(feed, lease, other)) or {}
        finally:
            lease.over = True
        if collect:
            changed.update(new)
        return new

    for layer in layers(graph, progress, stage.done):
        for each in streams.values():
            each.enter(layer)
        before = [h.clone() for h in stream.hidden] if finish else []
        for feed in feeds_of.get(layer, ()):
            stream.apply(shown(feed))
            for each in streams.values():
                each.advance(feed)
        if finish and other:
            new = finish(graph.replace(weights=changed), layer, before, other.hidden, stream.tables)
            if new:
                changed |= new
                stream.apply(new)
                stream.again(before)
        stage.save(layer + 1, **{name: each.hidden for name, each in streams.items()})
    for feed in feeds_of[None]:
        shown(feed)
    stage.finish()
    return graph.replace(weights=changed)


@torch.no_grad()
def walk_blocks(
    graph: Graph,
    reference: Graph,
    tokens: Tensor,
    visit: BlockVisitor,
    *,
    kept: Group | None = None,
    progress: str | None = None,
) -> Graph:
    """Calls `visit(layer, inputs, targets, tables)` for every block in order; what it returns replaces parameters.

    inputs: batches [b, T, D] of what reaches the block in `graph`, with the blocks before it already replaced; targets:
    what the same block of `reference` (as many layers, as wide a stream) makes of its own inputs. tokens and kept as
    for `walk`.
    """
    tokens = check_calibration(graph, tokens)
    expected = graph.config.n_layers, graph.config.hidden_size
    if (reference.config.n_layers, reference.config.hidden_size) != expected:
        accepted = f"a graph of {graph.config.n_layers} layers and hidden size {graph.config.hidden_size}"
        raise InputError("reference", reference, accepted)
    device = tokens.device
    dtype = working_dtype(graph, device)
    changed: dict[str, Weight] = {}
    stage = Stage() if kept is None else open_stage("blocks", device, changed=changed, kept=kept)
    if stage.finished:
        return graph.replace(weights=changed)
    stream = Stream(graph, tokens, device, dtype)
    targets = Stream(reference, tokens, device, dtype)
    if stage.done:
        stream.hidden = stage.live["hidden"]
        targets.hidden = stage.live["targets"]
    for layer, block in enumerate(blocks(reference, device, dtype, progress, stage.done), stage.done):
        targets.step(block)
        targets.check_finite(layer)
        new = visit(layer, stream.hidden, targets.hidden, stream.tables) or {}
        changed |= new
        stream.step(Block(graph.replace(weights=new).dense(dtype), layer, device, dtype))
        stage.save(layer + 1, hidden=stream.hidden, targets=targets.hidden)
    stage.finish()
    return graph.replace(weights=changed)


def check_calibration(graph: Graph, tokens: Tensor) -> Tensor:
    """tokens as [N, T] of ids in the vocabulary and windows within the context; else an InputError."""
    if tokens.dim() != 2 or tokens.dtype not in (torch.int64, torch.int32):
        raise InputError(
            "calibration tokens", f"{tokens.dtype} {tuple(tokens.shape)}", "integer ids [windows, seq_len]"
        )
    length = tokens.shape[1]
    if length < 2:
        raise InputError("calibration tokens", f"windows of {length}", "windows of at least 2 tokens")
    if length > graph.config.max_position:
        accepted = f"at most the context, {graph.config.max_position}"
        raise InputError("calibration tokens", f"windows of {length}", accepted)
    check_ids(tokens, graph.config.vocab_size)
    return tokens


class _Pieces(Stream):
    """A stream that goes through a block piece by piece."""

    def __init__(self, graph: Graph, tokens: Tensor) -> None:
        super().__init__(graph, tokens)
        self.piece: list[Tensor] = []  # what the sublayer in progress hands to its last linear
        self.block: Block | None = None

    def enter(self, layer: int) -> None:
        self.block = Block(self.graph, layer, self.device, self.dtype)

    def again(self, hidden: list[Tensor]) -> None:
        """Runs the block that was entered from what reached it."""
        assert self.block is not None
        self.hidden = hidden
        self.step(self.block)

    def apply(self, weights: Mapping[str, Weight]) -> None:
        """Puts new weights into the block, dense: a packed one would be unpacked again for every batch."""
        for name, weight in weights.items():
            if self.block is not None and layer_of(name) is not None:
                dense = weight if isinstance(weight, Tensor) else weight.dequantize()
                self.block.replace_parameter(name, dense.to(self.device, self.dtype))

    def inputs(self, feed: Feed, lease: Lease, other: _Pieces | None) -> Inputs:
        reference = None if other is None else other.inputs(feed, lease, None)
        return Inputs(lambda: self._batches(feed), reference, self.hidden, lease)

    def _batches(self, feed: Feed) -> Iterator[Tensor]:
        if feed.behind_norm:
            norm = self._norm(feed)
            yield from (norm(h) for h in self.hidden)
        else:
            yield from self.piece

    def _norm(self, feed: Feed) -> Norm:
        if feed.layer is None:
            weight = self.graph.tensor(f"{FINAL_NORM}.weight").to(self.device, self.dtype)
            return Norm(weight, self.graph.config.norm_eps)
        assert self.block is not None
        return self.block.norm_of(feed)

    def advance(self, feed: Feed) -> None:
        """Runs the readers of the feed on its inputs, once."""
        block = self.block
        assert block is not None
        if feed.behind_norm:
            norm = self._norm(feed)
            self.piece = [block.between(feed, norm(h), self.tables) for h in self.hidden]
            return
        reader = block.linears()[feed.readers[0]]
        self.hidden = [h.add_(reader(x)) for h, x in zip(self.hidden, self.piece)]
        self.piece = []
