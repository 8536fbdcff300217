"""A graph with gradients: what training works on, and the way back to a graph.

The network is the Transformer that every other part of the library runs; here its parameters are copies of the graph's
(training writes into them), its linears can be wrapped (LoRA, fake quantization), and its forward hands the last hidden
states and the head to a function, so that [tokens × vocabulary] logits never need to exist.
Letters: B windows, T positions, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from ..graph.graph import Graph
from ..graph.quant_tensor import QuantSpec, QuantTensor
from ..model.transformer import ROWS, Transformer
from ..quantization.fake_quant import FakeQuantLinear, PackedLinear
from .hidden_losses import Tap

# hidden states [B, T, D], head [V, D] and the tapped states, each [B, T, width], to a result
StateFunction = Callable[[Tensor, Tensor, list[Tensor]], Tensor]


class Network(nn.Module):
    """A Transformer that is called as network(ids, then). `trainable` copies the weights and turns gradients on;
    `checkpointing` keeps only the blocks' inputs for the backward pass and computes the rest again."""

    def __init__(
        self, graph: Graph, *, dtype: torch.dtype | None = None, trainable: bool = False, checkpointing: bool = False
    ) -> None:
        super().__init__()
        if trainable:  # a weight already packed is refused by name
            graph = graph.replace(weights={n: graph.tensor(n).to(dtype, copy=True) for n in graph.weights})
        self.transformer = Transformer(graph.dense(dtype))
        self.transformer.requires_grad_(trainable).train(trainable)
        self.checkpointing = checkpointing
        self.projections = nn.ParameterDict()  # of hidden-state losses: trained along, not part of the graph

    @property
    def blocks(self) -> nn.ModuleList:
        return self.transformer.blocks

    def forward(self, ids: Tensor, then: StateFunction, taps: Sequence[Tap] = ()) -> Tensor:
        """then(hidden [B, T, D], head [V, D], [what is tapped, each [B, T, width]]) for ids [B, T].

        A tap is a layer, for its output, or (layer, "q" | "k" | "v") for what that projection gives.
        `then` runs inside the forward because a sharded head is whole only there.
        """
        hidden, states = self._states(ids, tuple(taps))
        head = self.transformer.lm_head.weight
        assert isinstance(head, Tensor)  # dense: see __init__
        return then(hidden, head, states)

    def turned(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q [B, T, H·d] and k [B, T, K·d] of a layer as attention multiplies them: rotated, and k repeated to [B, T,
        H·d]."""
        tables = self.transformer.tables(0, q.shape[1])
        d = self.transformer.config.head_dim
        turned = [tables.new(x.unflatten(-1, (-1, d)).transpose(1, 2)) for x in (q, k)]  # [B, H | K, T, d]
        turned[1] = turned[1].repeat_interleave(q.shape[-1] // k.shape[-1], 1)
        return turned[0].transpose(1, 2).flatten(2), turned[1].transpose(1, 2).flatten(2)

    def _states(self, ids: Tensor, taps: tuple[Tap, ...]) -> tuple[Tensor, list[Tensor]]:
        together = max(1, ROWS // ids.shape[1])  # windows whose activations fit the processor's cache
        if len(ids) > together and not torch.is_grad_enabled() and ids.device.type == "cpu":
            parts = [self._states(windows, taps) for windows in ids.split(together)]
            tapped = zip(*(states for _, states in parts))
            return torch.cat([hidden for hidden, _ in parts]), [torch.cat(pieces) for pieces in tapped]
        body = self.transformer.model
        x = body.embed_tokens(ids)
        tables = self.transformer.tables(0, ids.shape[1])
        states: dict[Tap, Tensor] = {}
        with ExitStack() as hooks:
            for tap in taps:
                if isinstance(tap, tuple):
                    hooks.callback(self._listen(tap, states).remove)
            for i, block in enumerate(self.blocks):
                if self.checkpointing and torch.is_grad_enabled():
                    x = checkpoint(block, x, tables, use_reentrant=False)
                else:
                    x = block(x, tables)
                if i in taps:
                    states[i] = x if torch.is_grad_enabled() else x.clone()  # without gradients blocks work in place
        return body.norm(x), [states[tap] for tap in taps]

    def _listen(self, tap: tuple[int, str], states: dict[Tap, Tensor]) -> RemovableHandle:
        """Notes what a layer's q, k or v projection gives: inside the block's forward, where a sharded block is
        whole."""

        def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            states[tap] = output

        layer, name = tap
        projection: nn.Module = self.blocks[layer].projection(name)  # type: ignore[operator]
        return projection.register_forward_hook(keep)


def add_stable_embedding(network: Network) -> None:
    """Puts the embedding behind a norm; a tied head goes with it."""
    from .stable_embedding import StableEmbedding, TiedHead

    transformer = network.transformer
    tied = transformer.lm_head.weight is transformer.model.embed_tokens.weight
    transformer.model.embed_tokens = StableEmbedding(transformer.model.embed_tokens.weight)  # type: ignore[assignment]
    if tied:
        transformer.lm_head = TiedHead(transformer.model.embed_tokens)  # type: ignore[arg-type]


def add_fake_quant(network: Network, graph: Graph, specs: Mapping[str, QuantSpec], learn: bool) -> None:
    """The linears of the layers that `specs` names on their grids; the others, and the head, stay as they are."""
    for name, module in network.transformer.linears().items():
        if name in specs:
            assert isinstance(module, nn.Linear)
            network.transformer.replace_linear(name, FakeQuantLinear(name, module, specs[name], learn))


def add_packed(network: Network, graph: Graph) -> None:
    """Freezes all but norms and biases of a network made from the unpacked `graph`, and lets the scales of its packed
    linears learn."""
    for parameter in network.parameters():
        parameter.requires_grad_(parameter.dim() == 1)
    for name, module in network.transformer.linears().items():
        weight = graph.weights[f"{name}.weight"]
        if isinstance(weight, QuantTensor):
            assert isinstance(module, nn.Linear)
            network.transformer.replace_linear(name, PackedLinear(weight, module.bias, module.weight.dtype))
