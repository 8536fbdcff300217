"""The config: a Llama-family decoder in numbers, every layer with its own widths.

Letters: D hidden_size, H heads, K KV heads, d head_dim, F ffn_dim, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import InputError
from .rope import Rope

EMBEDDING = "model.embed_tokens.weight"  # parameters that belong to no layer
HEAD = "lm_head"
FINAL_NORM = "model.norm"
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LAYERS = "model.layers."
QUERY_NORM = "q_norm"
KEY_NORM = "k_norm"
KINDS = {  # of each linear: its kind, and the role of the feed that it reads
    "q_proj": ("query", "attention_in"),
    "k_proj": ("key", "attention_in"),
    "v_proj": ("value", "attention_in"),
    "o_proj": ("output", "attention_out"),
    "gate_proj": ("gate", "ffn_in"),
    "up_proj": ("up", "ffn_in"),
    "down_proj": ("down", "ffn_out"),
}


@dataclass(frozen=True)
class Layer:
    """One layer in numbers. A width of 0 removes that sublayer (n_heads and n_kv_heads go together).

    Fields:
        n_heads: query heads.
        n_kv_heads: key and value heads, which divide the query heads.
        ffn_dim: channels of the FFN.
        window: how many positions a query sees, its own included; None: all that came before.
        rope: whether queries and keys are turned by their positions; SmolLM3 has layers where they are not.
    """

    n_heads: int
    n_kv_heads: int
    ffn_dim: int
    window: int | None = None
    rope: bool = True

    def __post_init__(self) -> None:
        if self.window is not None and (not isinstance(self.window, int) or self.window < 1):
            raise InputError("Layer.window", self.window, "a positive integer, or None: all positions")
        if not isinstance(self.rope, bool):
            raise InputError("Layer.rope", self.rope, "True or False")
        if min(self.n_heads, self.n_kv_heads, self.ffn_dim) < 0:
            raise InputError("Layer", self, "widths of at least 0")
        if (self.n_heads == 0) != (self.n_kv_heads == 0) or (self.n_kv_heads and self.n_heads % self.n_kv_heads):
            raise InputError(
                "Layer.n_heads",
                f"{self.n_heads} with n_kv_heads {self.n_kv_heads}",
                "a multiple of n_kv_heads, or both 0",
            )

    @property
    def group(self) -> int:
        """Query heads a KV head: query head h reads KV head h // group."""
        return self.n_heads // self.n_kv_heads if self.n_kv_heads else 0

    @property
    def widths(self) -> tuple[int, int, int]:
        """n_heads, n_kv_heads, ffn_dim."""
        return self.n_heads, self.n_kv_heads, self.ffn_dim

    def to_list(self) -> list[int | bool | None]:
        """The fields in order, without those at the end that say nothing out of the ordinary."""
        if not self.rope:
            return [*self.widths, self.window, self.rope]
        return [*self.widths] if self.window is None else [*self.widths, self.window]


@dataclass(frozen=True)
class Linear:
    """One linear of a model.

    Fields:
        name: of its module, such as the names of `Feed.readers`.
        kind: "query" | "key" | "value" | "output" | "gate" | "up" | "down" | "head".
        role: of the feed that it reads: "attention_in" | "attention_out" | "ffn_in" | "ffn_out" | "head".
        layer: its layer, None for the head.
        shape: [out, in].
        weight: the parameter that it multiplies by: a tied head reads the embedding.
    """

    name: str
    kind: str
    role: str
    layer: int | None
    shape: tuple[int, int]
    weight: str

    @property
    def bias(self) -> str:
        """The parameter that holds its bias, where it has one."""
        return f"{self.name}.bias"


@dataclass(frozen=True)
class Config:
    """A Llama-family decoder in numbers.

    Fields:
        vocab_size: rows of the embedding and of the head.
        hidden_size: channels of the residual stream.
        head_dim: channels of a head, an even number.
        layers: one `Layer` each.
        rope: what positions mean.
        max_position: how many positions the model is good for.
        norm_eps: what is added under the root in the norms that read the residual stream.
        tie_embeddings: whether the head multiplies by the embedding's table.
        biases: the linears (of every layer) that have one, such as "q_proj".
        qk_norm_eps: the same as norm_eps in the norms of queries and keys, head by head in front of RoPE (Qwen3).
            None: there are no such norms.
        bos_token_id: what a text begins with, if anything.
        eos_token_id: what ends an answer: a token, several, or None.
        pad_token_id: what fills a batch, if anything.
    """

    vocab_size: int
    hidden_size: int
    head_dim: int
    layers: tuple[Layer, ...]
    rope: Rope = field(default_factory=Rope)
    max_position: int = 2048
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    biases: frozenset[str] = frozenset()
    qk_norm_eps: float | None = None
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
        for name in ("norm_eps", "qk_norm_eps"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise InputError(f"Config.{name}", value, "a positive number")
        if unknown := set(self.biases) - set(LINEARS):
            raise InputError("Config.biases", sorted(unknown), " | ".join(LINEARS))

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @property
    def uniform(self) -> bool:
        """Every layer as wide as the others, and none without a sublayer: what configs of other tools can express."""
        return len({layer.widths for layer in self.layers}) == 1 and min(self.layers[0].widths) > 0

    @property
    def window(self) -> int | None:
        """The narrowest window of a layer; None where every layer sees all positions."""
        return min((layer.window for layer in self.layers if layer.window and layer.n_heads), default=None)

    @property
    def n_params(self) -> int:
        """Parameters, a tied head counted once."""
        return sum(math.prod(shape) for shape in shapes(self).values())

    @property
    def n_body_params(self) -> int:
        """Non-embedding parameters: everything but the embedding and the head. Pruning budgets count these."""
        ends = (EMBEDDING, f"{HEAD}.weight")
        return sum(math.prod(shape) for name, shape in shapes(self).items() if name not in ends)

    def linears(self) -> tuple[Linear, ...]:
        """Every linear in model order, the head last. A tied head reads the embedding's table."""
        out: list[Linear] = []
        for index, layer in enumerate(self.layers):
            at = layer_prefix(index)
            if layer.n_heads:
                for name, shape in attention_shapes(self, layer).items():
                    out.append(
                        Linear(f"{at}.self_attn.{name}", *KINDS[name], index, shape, f"{at}.self_attn.{name}.weight")
                    )
            if layer.ffn_dim:
                for name, shape in ffn_shapes(self, layer).items():
                    out.append(Linear(f"{at}.mlp.{name}", *KINDS[name], index, shape, f"{at}.mlp.{name}.weight"))
        shape = (self.vocab_size, self.hidden_size)
        out.append(Linear(HEAD, "head", "head", None, shape, self.weight_name(HEAD)))
        return tuple(out)

    def linear(self, name: str) -> Linear:
        """The linear of that name; an `InputError` for a name that is none."""
        for linear in self.linears():
            if linear.name == name:
                return linear
        raise InputError("linear", repr(name), f"names such as {self.linears()[0].name}")

    def weight_name(self, linear: str) -> str:
        """The parameter a linear multiplies by: `lm_head` reads the embedding when the two are tied."""
        if linear == HEAD and self.tie_embeddings:
            return EMBEDDING
        return f"{linear}.weight"

    def to_dict(self) -> dict[str, Any]:
        out = dataclasses.asdict(self)
        out["layers"] = [layer.to_list() for layer in self.layers]
        out["biases"] = sorted(self.biases)
        if self.qk_norm_eps is None:
            del out["qk_norm_eps"]  # what a file without such norms says is what it always said
        return out

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Config:
        """The inverse of `to_dict`; an unknown or missing field is an `InputError`."""
        data = dict(data)
        if not isinstance(data.get("rope", {}), dict):
            raise InputError("Config.rope", data["rope"], "an object with the fields that Config.to_dict writes")
        for cls, values in ((Config, data), (Rope, data.get("rope", {}))):
            if unknown := set(values) - {f.name for f in dataclasses.fields(cls)}:
                raise InputError(
                    f"{cls.__name__} fields", sorted(unknown), sorted(f.name for f in dataclasses.fields(cls))
                )
        try:
            rope: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data["rope"].items()}
            eos = data.get("eos_token_id")
            data.update(
                rope=Rope(**rope),
                layers=tuple(Layer(*numbers) for numbers in data["layers"]),
                biases=frozenset(data.get("biases", ())),
                eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
            )
            return Config(**data)
        except (KeyError, TypeError) as error:
            raise InputError("Config", str(error), "the fields that Config.to_dict writes") from error


def layer_prefix(index: int) -> str:
    return f"{LAYERS}{index}"


@dataclass(frozen=True)
class LayerNames:
    """The names of a layer's parts, for writers that name nodes and files after them.

    Fields:
        attention, ffn: of the sublayers.
        attention_norm, ffn_norm: of the norms in front of them.
        query, key, value, output, gate, up, down: of the linears.
        query_norm, key_norm: of the norms of queries and keys, where the model has them.
        qkv, gate_up: of products that take linears of one input together.
    """

    attention: str
    ffn: str
    attention_norm: str
    ffn_norm: str
    query: str
    key: str
    value: str
    output: str
    gate: str
    up: str
    down: str
    query_norm: str
    key_norm: str
    qkv: str
    gate_up: str

    @property
    def joined(self) -> dict[str, tuple[str, ...]]:
        """The linears that each of the joined products is made of."""
        return {self.qkv: (self.query, self.key, self.value), self.gate_up: (self.gate, self.up)}


def layer_names(index: int) -> LayerNames:
    """The names of the parts of layer `index`."""
    at = layer_prefix(index)
    attention = f"{at}.self_attn"
    ffn = f"{at}.mlp"
    linears = {kind: f"{ffn if role.startswith('ffn') else attention}.{name}" for name, (kind, role) in KINDS.items()}
    return LayerNames(
        attention,
        ffn,
        f"{at}.input_layernorm",
        f"{at}.post_attention_layernorm",
        **linears,
        query_norm=f"{attention}.{QUERY_NORM}",
        key_norm=f"{attention}.{KEY_NORM}",
        qkv=f"{attention}.qkv_proj",
        gate_up=f"{ffn}.gate_up_proj",
    )


def layer_of(name: str) -> int | None:
    """The layer that a parameter, a linear or a norm belongs to; None for those of no layer."""
    if not name.startswith(LAYERS):
        return None
    return int(name.removeprefix(LAYERS).split(".", 1)[0])


def name_in_layer(name: str) -> str:
    """A parameter's name without its layer; a name of no layer as it is."""
    return name if layer_of(name) is None else name.removeprefix(LAYERS).split(".", 1)[1]


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
            if block == "self_attn" and config.qk_norm_eps is not None:
                out |= {f"{at}.{block}.{name}.weight": (config.head_dim,) for name in (QUERY_NORM, KEY_NORM)}
    out["model.norm.weight"] = (D,)
    if not config.tie_embeddings:
        out["lm_head.weight"] = (config.vocab_size, D)
    return out
