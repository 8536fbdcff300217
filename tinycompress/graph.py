"""The graph: a value that every pass takes and returns, and the only place that knows topology.

  Graph    config + weights (+ history of passes, tokenizer); never changed in place
  feeds    which linears read one activation, and which weight writes it   (GPTQ, AWQ, norm folding)
  axes     everything that is cut together                                 (pruning)
  cut      a new graph with some indices of an axis kept
  fold     a scale moved across a feed, which changes nothing

feeds and axes are pure functions of the config: no tracing, no name patterns, no model walk. Weights carry Hugging Face
names and the half-split RoPE layout. Letters: D hidden_size, H heads, K KV heads, d head_dim, F ffn_dim, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from .config import LINEARS, LLAMA_2_7B, SMOLLM2_135M, TINYLLAMA_1_1B, Config, Layer, layer_prefix, shapes
from .errors import InputError
from .rope import Rope

if TYPE_CHECKING:
    from .model import Transformer
    from .quantize import QuantTensor
    from .tokenizer import Tokenizer

Weight: TypeAlias = "Tensor | QuantTensor"
Pass = Callable[["Graph"], "Graph"]  # a pass is any such callable: no base class, no registry

__all__ = [  # the config's names belong to the graph's vocabulary
    "LLAMA_2_7B",
    "SMOLLM2_135M",
    "TINYLLAMA_1_1B",
    "Axis",
    "Config",
    "Feed",
    "Graph",
    "Layer",
    "LazyTensor",
    "Pass",
    "Rope",
    "Weight",
    "Weights",
    "axes",
    "cut",
    "feeds",
    "fold",
    "shapes",
]


@dataclass(frozen=True)
class Feed:
    """One activation: `source` is the parameter owner that writes it, `readers` the linears that read it.

    A per-channel scale on the activation folds exactly into `source` (1/s) and `readers` (s). `repeat` is how often
    each source row appears in the activation: v_proj's rows are read by `repeat` query heads, otherwise 1.
    """

    source: str
    readers: tuple[str, ...]
    repeat: int = 1
    layer: int | None = None


@dataclass(frozen=True)
class Axis:
    """Everything that is cut together. Index j of the axis is, in each parameter of `cuts`, the slice
    [j·stride, (j+1)·stride) of dimension `dim`. `groups` > 1: each of that many equal runs keeps the same count."""

    name: str
    size: int
    cuts: Mapping[str, tuple[int, int]]
    groups: int = 1


def feeds(config: Config) -> tuple[Feed, ...]:
    """Every activation that linears read, in the order the model computes them; every linear is read exactly once."""
    out: list[Feed] = []
    for i, layer in enumerate(config.layers):
        at = layer_prefix(i)
        attn, mlp = f"{at}.self_attn", f"{at}.mlp"
        if layer.n_heads:
            out.append(Feed(f"{at}.input_layernorm", (f"{attn}.q_proj", f"{attn}.k_proj", f"{attn}.v_proj"), layer=i))
            out.append(Feed(f"{attn}.v_proj", (f"{attn}.o_proj",), repeat=layer.group, layer=i))
        if layer.ffn_dim:
            out.append(Feed(f"{at}.post_attention_layernorm", (f"{mlp}.gate_proj", f"{mlp}.up_proj"), layer=i))
            out.append(Feed(f"{mlp}.up_proj", (f"{mlp}.down_proj",), layer=i))
    out.append(Feed("model.norm", ("lm_head",)))
    return tuple(out)


def axes(config: Config) -> dict[str, Axis]:
    """Every axis by name: `hidden`, `layers`, and for layer i `layers.i.ffn`, `layers.i.heads`, `layers.i.kv_heads`.

    head_dim is never cut: RoPE turns its channels in pairs.
    """
    d, names = config.head_dim, shapes(config)

    def present(cuts: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
        """Weights as given, and with each output-side cut its bias, if there is one."""
        biases = {f"{n[:-7]}.bias": (0, stride) for n, (dim, stride) in cuts.items() if dim == 0}
        return {n: c for n, c in (cuts | biases).items() if n in names}

    hidden: dict[str, tuple[int, int]] = {}
    for name, shape in names.items():
        writes = name.endswith(("o_proj.weight", "down_proj.weight", "o_proj.bias", "down_proj.bias"))
        if (len(shape) == 1 and not name.endswith(".bias")) or writes:
            hidden[name] = (0, 1)  # norms, and the rows that write the residual stream
        elif len(shape) == 2:
            hidden[name] = (1, 1)  # the embedding, the head, and the columns that read the residual stream
    out = {
        "hidden": Axis("hidden", config.hidden_size, hidden),
        "layers": Axis("layers", config.n_layers, {}),
    }
    for i, layer in enumerate(config.layers):
        attn, mlp = f"{layer_prefix(i)}.self_attn", f"{layer_prefix(i)}.mlp"
        q, k, v, o = (f"{attn}.{n}.weight" for n in LINEARS[:4])
        gate, up, down = (f"{mlp}.{n}.weight" for n in LINEARS[4:])
        if layer.n_heads:
            wide = d * layer.group
            kv_cuts = {k: (0, d), v: (0, d), q: (0, wide), o: (1, wide)}
            out[f"layers.{i}.kv_heads"] = Axis(f"layers.{i}.kv_heads", layer.n_kv_heads, present(kv_cuts))
            out[f"layers.{i}.heads"] = Axis(f"layers.{i}.heads", layer.n_heads, present({q: (0, d), o: (1, d)}), layer.n_kv_heads)
        if layer.ffn_dim:
            out[f"layers.{i}.ffn"] = Axis(f"layers.{i}.ffn", layer.ffn_dim, present({gate: (0, 1), up: (0, 1), down: (1, 1)}))
    return out


@dataclass(frozen=True)
class LazyTensor:
    """A weight that is read when asked for (a GGUF block to dequantize, a dtype to convert); not kept."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


class Weights(Mapping[str, "Weight"]):
    """Parameters by Hugging Face name. Memory-mapped tensors cost nothing until touched; lazy ones are read each time."""

    def __init__(self, entries: Mapping[str, Weight | LazyTensor]) -> None:
        known: Mapping[str, Weight | LazyTensor] = entries.entries if isinstance(entries, Weights) else entries
        self.entries: dict[str, Weight | LazyTensor] = dict(known)

    def __getitem__(self, name: str) -> Weight:
        entry = self.entries[name]
        return entry.read() if isinstance(entry, LazyTensor) else entry

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


@dataclass(frozen=True, eq=False, repr=False)
class Graph:
    """A model as a value. `replace` makes a changed copy that shares every weight that was not changed."""

    config: Config
    weights: Weights  # any mapping is accepted
    history: tuple[str, ...] = ()
    tokenizer: Tokenizer | None = field(default=None)

    def __post_init__(self) -> None:
        weights = self.weights if isinstance(self.weights, Weights) else Weights(self.weights)
        expected = shapes(self.config)
        if missing := [name for name in expected if name not in weights.entries]:
            raise InputError("weights", f"no {_some(missing)}", f"the {len(expected)} parameters of the config")
        if unknown := [name for name in weights.entries if name not in expected]:
            raise InputError("weights", f"unexpected {_some(unknown)}", f"the {len(expected)} parameters of the config")
        for name, shape in expected.items():
            found = tuple(weights.entries[name].shape)
            if found != shape:
                raise InputError(name, f"shape {found}", f"{shape}, by the config")
        object.__setattr__(self, "weights", weights)

    def __repr__(self) -> str:
        c = self.config
        return f"Graph({c.n_layers} layers, hidden {c.hidden_size}, {c.n_params:,} parameters, history {list(self.history)})"

    def replace(
        self,
        *,
        weights: Mapping[str, Weight | LazyTensor] | None = None,
        config: Config | None = None,
        by: object = None,
        tokenizer: Tokenizer | None = None,
    ) -> Graph:
        """A new graph: `weights` override those of the same name, parameters the (new) config lacks are dropped,
        and `by` (a pass) is added to the history by its repr."""
        config = config or self.config
        merged = self.weights.entries | dict(weights or {})
        kept = {name: merged[name] for name in shapes(config) if name in merged}
        history = self.history if by is None else (*self.history, repr(by))
        return Graph(config, Weights(kept), history, tokenizer or self.tokenizer)

    def tensor(self, name: str) -> Tensor:
        """A parameter that must still be dense; a packed one is an InputError."""
        weight = self.weights[name]
        if not isinstance(weight, Tensor):
            raise InputError(name, f"a weight quantized to {weight.spec}", "a dense one (quantize last)")
        return weight

    def linear(self, name: str) -> Weight:
        """The weight [out, in] of a linear, the tied head included."""
        return self.weights[self.config.weight_name(name)]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype activations have: that of the norms, which are never quantized."""
        return self.weights.entries["model.norm.weight"].dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the weights as stored (packed, for quantized ones)."""
        total = 0
        for entry in self.weights.entries.values():
            total += getattr(entry, "nbytes", None) or math.prod(entry.shape) * entry.dtype.itemsize
        return total

    def fingerprint(self) -> str:
        """SHA-256 over config and weights (names, dtypes, bytes): equal graphs, equal fingerprints. Reads everything."""
        digest = hashlib.sha256(json.dumps(self.config.to_dict(), sort_keys=True).encode())
        for name in shapes(self.config):
            weight = self.weights[name]
            parts = {"": weight} if isinstance(weight, Tensor) else weight.tensors()
            for part, tensor in parts.items():
                digest.update(f"{name}{part} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def dense(self, dtype: torch.dtype | None = None) -> Graph:
        """The same function with packed weights unpacked (and, given a dtype, all weights converted) when they are read."""
        changed: dict[str, Weight | LazyTensor] = {}
        for name, entry in self.weights.entries.items():
            packed = not isinstance(entry, Tensor | LazyTensor)
            if packed or (dtype and entry.dtype != dtype):
                changed[name] = LazyTensor(tuple(entry.shape), dtype or entry.dtype, partial(self._read_dense, name, dtype or entry.dtype))
        return self.replace(weights=changed) if changed else self

    def _read_dense(self, name: str, dtype: torch.dtype) -> Tensor:
        weight = self.weights[name]
        return weight.to(dtype) if isinstance(weight, Tensor) else weight.dequantize(dtype)

    def module(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Transformer:
        """The graph as a zero-copy nn.Module: called on token ids [B, T] it returns logits [B, T, V]."""
        from .model import Transformer

        return Transformer(self, device=device, dtype=dtype)

    @staticmethod
    def random(config: Config, seed: int = 0, std: float = 0.02, dtype: torch.dtype = torch.float32) -> Graph:
        """Normal(0, std) matrices and biases, norms at one: for tests, benchmarks and training from scratch."""
        generator = torch.Generator().manual_seed(seed)
        weights = {}
        for name, shape in shapes(config).items():
            norm = len(shape) == 1 and not name.endswith(".bias")
            weights[name] = torch.ones(shape, dtype=dtype) if norm else torch.empty(shape, dtype=dtype).normal_(0, std, generator=generator)
        return Graph(config, Weights(weights))

    @staticmethod
    def from_hf(model: Any) -> Graph:
        """The graph of a live transformers Llama; tensors are shared with the model."""
        from .hf import graph_from_model

        return graph_from_model(model)

    def to_hf(self) -> Any:
        """A live transformers LlamaForCausalLM that shares the graph's tensors (quantized ones are dequantized)."""
        from .hf import model_from_graph

        return model_from_graph(self)


def cut(graph: Graph, axis: str | Axis, keep: Sequence[int] | Tensor) -> Graph:
    """A new graph with only the indices `keep` of `axis`; an empty `keep` of a layer's axis removes that sublayer.

    The result computes exactly what the model with the dropped indices set to zero computes. (For `hidden` that
    takes a correction: RMSNorm's mean runs over fewer channels, so with r = D / D' the norm weights gain √r and
    norm_eps gains r.)
    """
    if isinstance(axis, str):
        known = axes(graph.config)
        if axis not in known:
            raise InputError("axis", repr(axis), ", ".join(known))
        axis = known[axis]
    index = _checked(axis, keep)
    if axis.name == "layers":
        return _drop_layers(graph, index)
    config = _cut_config(graph.config, axis.name, len(index))
    changed: dict[str, Weight] = {}
    remaining = shapes(config)
    for name, (dim, stride) in axis.cuts.items():
        if name in remaining:
            positions = (index[:, None] * stride + torch.arange(stride)).flatten()
            changed[name] = _select(name, graph.weights[name], dim, positions)
    if axis.name == "hidden":
        ratio = axis.size / len(index)
        for name in changed:
            if len(remaining[name]) == 1 and not name.endswith(".bias"):
                changed[name] = graph.tensor(name).index_select(0, index) * math.sqrt(ratio)
    return graph.replace(config=config, weights=changed)


def _checked(axis: Axis, keep: Sequence[int] | Tensor) -> Tensor:
    index = torch.as_tensor(keep, dtype=torch.long).flatten().cpu()
    if (len(index) and (index.min() < 0 or index.max() >= axis.size)) or len(index.unique()) != len(index):
        raise InputError(f"keep of {axis.name}", f"{index.tolist()[:8]}…", f"distinct indices below {axis.size}")
    if not len(index) and axis.name == "hidden":
        raise InputError("keep of hidden", "nothing", "at least one channel")
    index = index.sort().values
    if axis.groups > 1 or axis.name.endswith(".heads"):
        counts = torch.bincount(index // (axis.size // axis.groups), minlength=axis.groups)
        if len(counts.unique()) > 1:
            raise InputError(f"keep of {axis.name}", f"{counts.tolist()} heads by KV group", "the same count in every KV group")
    return index


def _cut_config(config: Config, axis: str, size: int) -> Config:
    if axis == "hidden":
        return dataclasses.replace(config, hidden_size=size, norm_eps=config.norm_eps * config.hidden_size / size)
    _, number, what = axis.split(".")
    i, layer = int(number), config.layers[int(number)]
    new = {
        "ffn": lambda: Layer(layer.n_heads, layer.n_kv_heads, size),
        "heads": lambda: Layer(size, layer.n_kv_heads if size else 0, layer.ffn_dim),
        "kv_heads": lambda: Layer(size * layer.group, size, layer.ffn_dim),
    }[what]()
    return dataclasses.replace(config, layers=(*config.layers[:i], new, *config.layers[i + 1 :]))


def _drop_layers(graph: Graph, index: Tensor) -> Graph:
    old = graph.config
    config = dataclasses.replace(old, layers=tuple(old.layers[i] for i in index.tolist()))
    entries = graph.weights.entries
    moved: dict[str, Weight | LazyTensor] = {}
    for new, i in enumerate(index.tolist()):
        prefix = layer_prefix(i) + "."
        moved |= {layer_prefix(new) + "." + n[len(prefix) :]: w for n, w in entries.items() if n.startswith(prefix)}
    ends = {n: w for n, w in entries.items() if not n.startswith("model.layers.")}
    return Graph(config, Weights(ends | moved), graph.history, graph.tokenizer)


def _select(name: str, weight: Weight, dim: int, index: Tensor) -> Weight:
    if isinstance(weight, Tensor):
        return weight.index_select(dim, index.to(weight.device))
    return weight.select(name, dim, index)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def fold(graph: Graph, feed: Feed, scale: Tensor) -> dict[str, Weight]:
    """The parameters with which the feed's activation is divided by `scale` [K] and its readers multiply by it: the
    source's rows (or norm weight) / scale, the readers' columns · scale, in float64. Exact, whatever the scale, if it
    is alike for all the query heads that read one KV channel.
    """
    if "lm_head" in feed.readers and graph.config.tie_embeddings:
        raise InputError("fold", "the feed of a head tied to the embedding", "an untied graph")
    per_row = scale.double()
    if feed.repeat > 1:
        heads = per_row.reshape(-1, feed.repeat, graph.config.head_dim)
        if not torch.equal(heads, heads[:, :1].expand_as(heads)):
            raise InputError(f"scale of {feed.source}", "values that differ between the query heads of a KV head", "equal ones")
        per_row = heads[:, 0].reshape(-1)
    changed: dict[str, Weight] = {}
    for name in (f"{feed.source}.weight", f"{feed.source}.bias"):
        if name in graph.weights:
            weight = graph.weights[name]
            rows = per_row.to(weight.device)
            if isinstance(weight, Tensor):
                changed[name] = (weight.double() / rows.reshape(-1, *[1] * (weight.dim() - 1))).to(weight.dtype)
            else:
                changed[name] = weight.divide_rows(rows)
    for reader in map(graph.config.weight_name, feed.readers):
        weight = graph.tensor(reader)
        changed[reader] = (weight.double() * scale.double().to(weight.device)).to(weight.dtype)
    return changed
