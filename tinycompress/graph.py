"""The graph: a value that every pass takes and returns, and the only place that knows topology.

  Config   the numbers of a Llama-family decoder; every layer may have its own widths
  Graph    config + weights (+ history of passes, tokenizer); never changed in place
  shapes   every parameter and its shape
  feeds    which linears read one activation, and which weight writes it   (GPTQ, AWQ, norm folding)
  axes     everything that is cut together                                 (pruning)
  cut      a new graph with some indices of an axis kept

All four are pure functions of the config: no tracing, no name patterns, no model walk. Weights carry Hugging Face
names and the half-split RoPE layout. Letters: D hidden_size, H heads, K KV heads, d head_dim, F ffn_dim, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from .errors import InputError
from .rope import Rope

if TYPE_CHECKING:
    from .model import Transformer
    from .quantize import QuantTensor
    from .tokenizer import Tokenizer

Weight: TypeAlias = "Tensor | QuantTensor"
Pass = Callable[["Graph"], "Graph"]  # a pass is any such callable: no base class, no registry

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Layer:
    """Widths of one layer. A width of 0 removes that sublayer (n_heads and n_kv_heads go together)."""

    n_heads: int
    n_kv_heads: int
    ffn_dim: int

    def __post_init__(self) -> None:
        if min(self.n_heads, self.n_kv_heads, self.ffn_dim) < 0:
            raise InputError("Layer", self, "widths of at least 0")
        if (self.n_heads == 0) != (self.n_kv_heads == 0) or (self.n_kv_heads and self.n_heads % self.n_kv_heads):
            raise InputError("Layer.n_heads", f"{self.n_heads} with n_kv_heads {self.n_kv_heads}", "a multiple of n_kv_heads, or both 0")

    @property
    def group(self) -> int:
        """Query heads a KV head: query head h reads KV head h // group."""
        return self.n_heads // self.n_kv_heads if self.n_kv_heads else 0


@dataclass(frozen=True)
class Config:
    """A Llama-family decoder in numbers. `biases` names the linears (of every layer) that have one."""

    vocab_size: int
    hidden_size: int
    head_dim: int
    layers: tuple[Layer, ...]
    rope: Rope = Rope()
    max_position: int = 2048
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    biases: frozenset[str] = frozenset()
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "head_dim", "max_position"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise InputError(f"Config.{name}", value, "a positive integer")
        if self.head_dim % 2:
            raise InputError("Config.head_dim", self.head_dim, "an even number (RoPE turns pairs)")
        if not (math.isfinite(self.norm_eps) and self.norm_eps > 0):
            raise InputError("Config.norm_eps", self.norm_eps, "a positive number")
        if unknown := set(self.biases) - set(LINEARS):
            raise InputError("Config.biases", sorted(unknown), " | ".join(LINEARS))

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @property
    def uniform(self) -> bool:
        """Every layer alike and none without a sublayer: what Hugging Face's config can express."""
        return len(set(self.layers)) == 1 and self.layers[0].n_heads > 0 and self.layers[0].ffn_dim > 0

    @property
    def n_params(self) -> int:
        """Parameters, a tied head counted once."""
        return sum(math.prod(shape) for shape in shapes(self).values())

    @property
    def n_body_params(self) -> int:
        """Non-embedding parameters: everything but the embedding and the head. Pruning budgets count these."""
        ends = ("model.embed_tokens.weight", "lm_head.weight")
        return sum(math.prod(shape) for name, shape in shapes(self).items() if name not in ends)

    def weight_name(self, linear: str) -> str:
        """The parameter a linear multiplies by: `lm_head` reads the embedding when the two are tied."""
        if linear == "lm_head" and self.tie_embeddings:
            return "model.embed_tokens.weight"
        return f"{linear}.weight"

    def to_dict(self) -> dict[str, Any]:
        out = dataclasses.asdict(self)
        out["layers"] = [[layer.n_heads, layer.n_kv_heads, layer.ffn_dim] for layer in self.layers]
        out["biases"] = sorted(self.biases)
        return out

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Config:
        """The inverse of `to_dict`; an unknown or missing field is an `InputError`."""
        data = dict(data)
        for cls, values in ((Config, data), (Rope, data.get("rope", {}))):
            if unknown := set(values) - {f.name for f in dataclasses.fields(cls)}:
                raise InputError(f"{cls.__name__} fields", sorted(unknown), sorted(f.name for f in dataclasses.fields(cls)))
        try:
            rope = {k: tuple(v) if isinstance(v, list) else v for k, v in data["rope"].items()}
            eos = data.get("eos_token_id")
            data.update(
                rope=Rope(**rope),
                layers=tuple(Layer(*widths) for widths in data["layers"]),
                biases=frozenset(data.get("biases", ())),
                eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
            )
            return Config(**data)
        except (KeyError, TypeError) as error:
            raise InputError("Config", str(error), "the fields that Config.to_dict writes") from error


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


def layer_prefix(index: int) -> str:
    return f"model.layers.{index}"


def attention_shapes(config: Config, layer: Layer) -> dict[str, tuple[int, int]]:
    """Weight shapes [out, in] of one attention sublayer's linears."""
    D, q, kv = config.hidden_size, layer.n_heads * config.head_dim, layer.n_kv_heads * config.head_dim
    return {"q_proj": (q, D), "k_proj": (kv, D), "v_proj": (kv, D), "o_proj": (D, q)}


def ffn_shapes(config: Config, layer: Layer) -> dict[str, tuple[int, int]]:
    """Weight shapes [out, in] of one FFN sublayer's linears."""
    D, F = config.hidden_size, layer.ffn_dim
    return {"gate_proj": (F, D), "up_proj": (F, D), "down_proj": (D, F)}


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Every parameter and its shape, in checkpoint order. A tied head has no entry of its own."""
    D = config.hidden_size
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, D)}
    for i, layer in enumerate(config.layers):
        at = layer_prefix(i)
        for present, norm, block, linears in (
            (layer.n_heads, "input_layernorm", "self_attn", attention_shapes(config, layer)),
            (layer.ffn_dim, "post_attention_layernorm", "mlp", ffn_shapes(config, layer)),
        ):
            if not present:
                continue
            out[f"{at}.{norm}.weight"] = (D,)
            for name, shape in linears.items():
                out[f"{at}.{block}.{name}.weight"] = shape
                if name in config.biases:
                    out[f"{at}.{block}.{name}.bias"] = shape[:1]
    out["model.norm.weight"] = (D,)
    if not config.tie_embeddings:
        out["lm_head.weight"] = (config.vocab_size, D)
    return out


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
        if len(shape) == 1 and not name.endswith(".bias") or writes:
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
        self.entries = dict(entries.entries if isinstance(entries, Weights) else entries)

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
    weights: Mapping[str, Weight]
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
        weights: Mapping[str, Weight] | None = None,
        config: Config | None = None,
        by: object = None,
        tokenizer: Tokenizer | None = None,
    ) -> Graph:
        """A new graph: `weights` override those of the same name, parameters the (new) config lacks are dropped,
        and `by` (a pass) is added to the history by its repr."""
        config = config or self.config
        merged = self.weights.entries | dict(weights or {})  # type: ignore[attr-defined]
        kept = {name: merged[name] for name in shapes(config) if name in merged}
        history = self.history if by is None else (*self.history, repr(by))
        return Graph(config, Weights(kept), history, tokenizer or self.tokenizer)

    def linear(self, name: str) -> Weight:
        """The weight [out, in] of a linear, the tied head included."""
        return self.weights[self.config.weight_name(name)]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype activations have: that of the norms, which are never quantized."""
        return self.weights.entries["model.norm.weight"].dtype  # type: ignore[attr-defined]

    @property
    def nbytes(self) -> int:
        """Bytes of the weights as stored (packed, for quantized ones)."""
        total = 0
        for entry in self.weights.entries.values():  # type: ignore[attr-defined]
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
        return Graph(config, weights)

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
    config, changed = _cut_config(graph.config, axis.name, len(index)), {}
    remaining = shapes(config)
    for name, (dim, stride) in axis.cuts.items():
        if name in remaining:
            positions = (index[:, None] * stride + torch.arange(stride)).flatten()
            changed[name] = _select(name, graph.weights[name], dim, positions)
    if axis.name == "hidden":
        ratio = axis.size / len(index)
        for name in changed:
            if len(remaining[name]) == 1 and not name.endswith(".bias"):
                changed[name] = changed[name] * math.sqrt(ratio)
    return graph.replace(config=config, weights=changed)


def _checked(axis: Axis, keep: Sequence[int] | Tensor) -> Tensor:
    index = torch.as_tensor(keep, dtype=torch.long).flatten().cpu()
    if len(index) and (index.min() < 0 or index.max() >= axis.size) or len(index.unique()) != len(index):
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
    entries = graph.weights.entries  # type: ignore[attr-defined]
    moved = {}
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


TINYLLAMA_1_1B = Config(
    vocab_size=32000, hidden_size=2048, head_dim=64, layers=(Layer(32, 4, 5632),) * 22, max_position=2048, bos_token_id=1, eos_token_id=2
)
LLAMA_2_7B = Config(
    vocab_size=32000, hidden_size=4096, head_dim=128, layers=(Layer(32, 32, 11008),) * 32, max_position=4096, bos_token_id=1, eos_token_id=2
)
SMOLLM2_135M = Config(
    vocab_size=49152,
    hidden_size=576,
    head_dim=64,
    layers=(Layer(9, 3, 1536),) * 30,
    rope=Rope(theta=100000.0),
    max_position=8192,
    tie_embeddings=True,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=2,
)
