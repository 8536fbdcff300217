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
    """Widths of one layer. A width of 0 removes that sublayer (n_heads and n_kv_heads go together)."""

    n_heads: int
    n_kv_heads: int
    ffn_dim: int

    def __post_init__(self) -> None:
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
    """A Llama-family decoder in numbers. `biases` names the linears (of every layer) that have one."""

    vocab_size: int
    hidden_size: int
    head_dim: int
    layers: tuple[Layer, ...]
    rope: Rope = field(default_factory=Rope)
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
        out["layers"] = [[layer.n_heads, layer.n_kv_heads, layer.ffn_dim] for layer in self.layers]
        out["biases"] = sorted(self.biases)
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
                layers=tuple(Layer(*widths) for widths in data["layers"]),
                biases=frozenset(data.get("biases", ())),
                eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
            )
            return Config(**data)
        except (KeyError, TypeError) as error:
            raise InputError("Config", str(error), "the fields that Config.to_dict writes") from error


def layer_prefix(index: int) -> str:
    return f"{LAYERS}{index}"


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
    out["model.norm.weight"] = (D,)
    if not config.tie_embeddings:
        out["lm_head.weight"] = (config.vocab_size, D)
    return out


TINYLLAMA_1_1B = Config(
    vocab_size=32000,
    hidden_size=2048,
    head_dim=64,
    layers=(Layer(32, 4, 5632),) * 22,
    max_position=2048,
    bos_token_id=1,
    eos_token_id=2,
)
LLAMA_2_7B = Config(
    vocab_size=32000,
    hidden_size=4096,
    head_dim=128,
    layers=(Layer(32, 32, 11008),) * 32,
    max_position=4096,
    bos_token_id=1,
    eos_token_id=2,
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
