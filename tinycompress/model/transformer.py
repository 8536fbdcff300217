"""The transformer, built from a Graph: one forward for every shape of layer, one KV cache, one sampler.

Llama 2 (arXiv:2307.09288): x += attention(norm(x)); x += ffn(norm(x)), with RMSNorm, RoPE, grouped-query attention
and SwiGLU. Sublayers are split where other linears read (`heads` before o_proj, `mid` before down_proj) so that
calibration walks a block piece by piece with the very code that the forward runs.

Letters: B batch, T new positions, S positions in the cache and new, D hidden, H heads, K KV heads, d head_dim,
F ffn, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import chain
from typing import Unpack

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..graph.config import EMBEDDING, HEAD, KEY_NORM, LINEARS, QUERY_NORM, layer_prefix, name_in_layer
from ..graph.graph import Graph, check_finite
from ..graph.quant_tensor import QuantTensor
from ..graph.topology import Feed
from .attention import Attention, RotaryTables
from .fused_ops import embed, rms_norm, swiglu
from .generation import generate
from .kv_cache import KVCache
from .linear import QuantLinear, linear
from .sampling import Sampling
from .self_extend import SelfExtend

ROWS = 2048  # positions an FFN takes at a time without gradients


class Norm(nn.Module):
    """RMSNorm of x [..., D]."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(weight, requires_grad=False), eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class MLP(nn.Module):
    """SwiGLU (arXiv:2002.05202); `mid` is everything before down_proj."""

    def __init__(self, linears: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (linears[n] for n in ("gate_proj", "up_proj", "down_proj"))

    def mid(self, x: Tensor) -> Tensor:
        """x [..., D] (normalised) to silu(gate) · up [..., F]."""
        return swiglu(self.gate_proj(x), self.up_proj(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.mid(x))


class Block(nn.Module):
    """One layer; a sublayer of width 0 is absent."""

    def __init__(
        self, graph: Graph, index: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        config, layer, at = graph.config, graph.config.layers[index], layer_prefix(index)
        self.index = index

        def get(name: str) -> Tensor:
            return graph.tensor(f"{at}.{name}").to(device, dtype)

        def linears(block: str, names: tuple[str, ...]) -> dict[str, nn.Module]:
            weights = {n: graph.weights[f"{at}.{block}.{n}.weight"].to(device, dtype) for n in names}
            return {n: linear(w, get(f"{block}.{n}.bias") if n in config.biases else None) for n, w in weights.items()}

        def qk_norm(name: str, eps: float) -> Norm:
            return Norm(get(f"self_attn.{name}.weight"), eps)

        self.self_attn: Attention | None = None
        self.mlp: MLP | None = None
        if layer.n_heads:
            self.input_layernorm = Norm(get("input_layernorm.weight"), config.norm_eps)
            eps = config.qk_norm_eps
            norms = None if eps is None else (qk_norm(QUERY_NORM, eps), qk_norm(KEY_NORM, eps))
            projections = linears("self_attn", ("q_proj", "k_proj", "v_proj", "o_proj"))
            self.self_attn = Attention(projections, config.head_dim, layer.window, layer.rope, norms)
        if layer.ffn_dim:
            self.post_attention_layernorm = Norm(get("post_attention_layernorm.weight"), config.norm_eps)
            self.mlp = MLP(linears("mlp", ("gate_proj", "up_proj", "down_proj")))

    def forward(self, x: Tensor, tables: RotaryTables, cache: KVCache | None = None) -> Tensor:
        """x [B, T, D] to [B, T, D]."""
        return self.ffn(self.attention(x, tables, cache))

    def attention(self, x: Tensor, tables: RotaryTables, cache: KVCache | None = None) -> Tensor:
        """x [B, T, D] plus what attention adds to it; x itself where the layer has none."""
        if self.self_attn is None:
            return x
        return _added(self.self_attn(self.input_layernorm(x), tables, cache, self.index), x)

    def ffn(self, x: Tensor) -> Tensor:
        """x [B, T, D] plus what the FFN adds to it; x itself where the layer has none. Without gradients x is written
        to."""
        if self.mlp is None:
            return x
        if torch.is_grad_enabled():
            return _added(self.mlp(self.post_attention_layernorm(x)), x)
        for rows in x.view(-1, x.shape[-1]).split(ROWS):  # in place: the intermediates stay small enough to be reused
            rows.add_(self.mlp(self.post_attention_layernorm(rows)))
        return x

    def norm_of(self, feed: Feed) -> Norm:
        """The norm that writes a feed of this layer."""
        norm = self.input_layernorm if feed.role == "attention_in" else self.post_attention_layernorm
        return norm

    def between(self, feed: Feed, x: Tensor, tables: RotaryTables) -> Tensor:
        """What the readers of a feed behind a norm, given its activation x [B, T, D], hand to the sublayer's last
        linear: the heads' outputs [B, T, H·d], or silu(gate) · up [B, T, F]."""
        if feed.role == "attention_in":
            assert self.self_attn is not None
            return self.self_attn.heads(x, tables)
        assert self.mlp is not None
        return self.mlp.mid(x)

    def projection(self, name: str) -> nn.Module:
        """The linear that makes the queries ("q"), keys ("k") or values ("v") of its attention."""
        return getattr(self.self_attn, f"{name}_proj")

    def linears(self) -> dict[str, nn.Module]:
        """The modules of its linears by their names in the graph, in model order."""
        at = layer_prefix(self.index)
        parts = {f"{at}.self_attn": self.self_attn, f"{at}.mlp": self.mlp}
        return {
            f"{path}.{name}": getattr(part, name)
            for path, part in parts.items()
            if part is not None
            for name in LINEARS
            if hasattr(part, name)
        }

    def replace_linear(self, name: str, module: nn.Module) -> None:
        """Puts `module` where the linear of that name in the graph was."""
        owner, leaf = name_in_layer(name).rsplit(".", 1)
        setattr(self.get_submodule(owner), leaf, module)

    def replace_parameter(self, name: str, value: Tensor) -> None:
        """Puts a dense value where the parameter of that name in the graph was: into a new module, if it is a linear's
        weight."""
        owner, part = name_in_layer(name).rsplit(".", 1)
        module: nn.Module = self.get_submodule(owner)
        if part == "weight" and not isinstance(module, Norm):
            self.replace_linear(name.rsplit(".", 1)[0], linear(value, module.bias))  # type: ignore[arg-type]
        else:
            setattr(module, part, nn.Parameter(value, requires_grad=False))


def _added(branch: Tensor, x: Tensor) -> Tensor:
    """x + branch, in the branch's place: no gradient needs what a projection gave. Under autocast x is the wider and
    stays so."""
    return branch.add_(x) if branch.dtype == x.dtype else x + branch


class Decoder(nn.Module):
    """Everything but the head, under Hugging Face's names."""

    def __init__(
        self, graph: Graph, embedding: Embedding, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.embed_tokens = embedding
        self.layers = nn.ModuleList(Block(graph, i, device, dtype) for i in range(graph.config.n_layers))
        self.norm = Norm(graph.tensor("model.norm.weight").to(device, dtype), graph.config.norm_eps)


class Transformer(nn.Module):
    """Token ids [B, T] to logits [B, T, V]. Parameters are the graph's own tensors; training code turns on
    gradients."""

    def __init__(
        self, graph: Graph, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.config = config = graph.config
        self.generation = graph.generation
        embedding = graph.weights[EMBEDDING].to(device, dtype)
        self.model = Decoder(graph, Embedding(embedding), device, dtype)
        head = embedding if config.tie_embeddings else graph.linear(HEAD).to(device, dtype)
        self.lm_head = linear(head, None)
        if config.tie_embeddings and isinstance(head, Tensor):
            self.lm_head.weight = self.model.embed_tokens.weight
        self.self_extend: SelfExtend | None = None
        for name, tensor in chain(self.named_parameters(), self.named_buffers()):
            check_finite(name, tensor)
        self.eval()

    def train_only(self, names: Sequence[str]) -> None:
        """Copies of the parameters that are named get gradients; all others stay the graph's own and learn nothing.

        A name is that of a parameter or of a module, in the graph's words, and may have wildcards (fnmatch)."""
        parameters = dict(self.named_parameters())
        chosen: set[str] = set()
        for name in names:
            matches = {full for full in parameters if fnmatchcase(full, name) or full.startswith(f"{name}.")}
            if not matches:
                raise InputError(
                    "trainable", repr(name), "names of dense parameters or modules, such as model.layers.0 or *.mlp.*"
                )
            chosen |= matches
        for full, parameter in parameters.items():
            if full in chosen:
                parameter.data = parameter.data.clone()
            parameter.requires_grad_(full in chosen)

    @property
    def blocks(self) -> nn.ModuleList:
        """The layers, each a `Block`."""
        return self.model.layers

    def linears(self) -> dict[str, nn.Module]:
        """The modules of all linears of the layers by their names in the graph, in model order; without the head."""
        out: dict[str, nn.Module] = {}
        for block in self.blocks:
            assert isinstance(block, Block)
            out |= block.linears()
        return out

    def replace_linear(self, name: str, module: nn.Module) -> None:
        """Puts `module` where the linear of that name was, the head included."""
        owner, _, leaf = name.rpartition(".")
        setattr(self.get_submodule(owner), leaf, module)

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.norm.weight.dtype

    def tables(self, start: int, stop: int) -> RotaryTables:
        return RotaryTables(
            self.config.rope, self.config.head_dim, start, stop, self.device, self.dtype, self.self_extend
        )

    def new_cache(self, batch: int, max_length: int, int8: bool = False) -> KVCache:
        return KVCache(self.config, batch, max_length, self.device, self.dtype, int8)

    def extend(self, option: SelfExtend) -> Transformer:
        """This model with Self-Extend at inference, and the context that it then has."""
        if self.config.rope.type != "default":
            raise InputError(
                "Self-Extend",
                f"a model with {self.config.rope.type} scaling",
                "an unscaled one: it changes positions itself",
            )
        if self.config.window:
            raise InputError(
                "Self-Extend", f"layers that see {self.config.window} positions", "a model without windows"
            )
        self.self_extend = option
        self.config = dataclasses.replace(self.config, max_position=option.context(self.config.max_position))
        return self

    def hidden(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """Token ids [B, T] to the normalised last hidden states [B, T, D], from position cache.length (or 0) on."""
        together = max(1, ROWS // ids.shape[1])  # sequences whose activations fit the processor's cache
        if cache is None and len(ids) > together and not torch.is_grad_enabled() and ids.device.type == "cpu":
            return torch.cat([self.hidden(some) for some in ids.split(together)])
        start = cache.length if cache else 0
        x = self.model.embed_tokens(ids)
        tables = self.tables(start, start + ids.shape[1])
        for block in self.blocks:
            x = block(x, tables, cache)
        if cache:
            cache.length += ids.shape[1]
        return self.model.norm(x)

    def forward(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        return self.lm_head(self.hidden(ids, cache))

    @torch.inference_mode()
    def generate(self, ids: Tensor, max_new_tokens: int = 64, **options: Unpack[Sampling]) -> Tensor:
        """Continues ids [1, T] (or [T]) by at most `max_new_tokens`: the new ids [n]. Options as in `Sampling`."""
        ids = torch.as_tensor(ids, device=self.device).reshape(1, -1)

        def begin(length: int) -> Callable[[Tensor], Tensor]:
            cache = self.new_cache(1, length)
            return lambda new: self.lm_head(self.hidden(new, cache)[0, -1])

        return generate(self.config, ids, max_new_tokens, begin, options, self.generation)


class Embedding(nn.Module):
    """Token ids [B, T] to rows [B, T, D] of a dense or packed table [V, D]."""

    def __init__(self, weight: Tensor | QuantTensor) -> None:
        super().__init__()
        if isinstance(weight, QuantTensor):
            self.table: QuantLinear | None = QuantLinear(weight, None)
        else:
            self.table, self.weight = None, nn.Parameter(weight, requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        if self.table is None:
            return embed(ids, self.weight)
        flat = self.table.weight.select(EMBEDDING, 0, ids.flatten())
        return flat.dequantize().unflatten(0, ids.shape)
