"""Hugging Face's config.json and live models, to and from a Graph.

Traps, by RoPE type (transformers 4.57; 5.x agrees, with other spellings):

  "linear"    max_position_embeddings is the stretched length
  "dynamic"   max_position_embeddings is the ORIGINAL length: frequencies start to change beyond it
  "yarn", "llama3", "longrope"   max_position_embeddings is the stretched length, the original one has its own key
  "longrope"  4.x reads the original length beside rope_scaling, 5.x inside; 4.x then derives the factor from the two

4.x writes `rope_theta` and `rope_scaling`, 5.x one `rope_parameters`; both are read, the 4.x spelling is written
(5.x still reads it). A config is input: every field is checked before it becomes a shape.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..errors import InputError, need
from ..graph.config import Config, Layer, shapes
from ..graph.graph import Graph, Weights
from ..graph.rope import TYPES, Rope

if TYPE_CHECKING:
    pass

MODEL_TYPES = ("llama", "mistral")
ATTENTION_BIASES = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})
MLP_BIASES = frozenset({"gate_proj", "up_proj", "down_proj"})
LARGEST = 2**31 - 1  # no width or length is larger; a layer count is far smaller


def integer(
    data: Mapping[str, Any], key: str, where: str, default: int | None = None, low: int = 1, high: int = LARGEST
) -> int:
    """`data[key]` as an integer in low … high; `default` (if not None) when it is absent or null."""
    value = data.get(key)
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InputError(f"{key} in {where}", repr(value), f"an integer in {low} … {high}")
    return value


def number(data: Mapping[str, Any], key: str, where: str, default: float | None = None) -> float:
    """`data[key]` as a finite positive number; `default` (if not None) when it is absent or null."""
    value = data.get(key)
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise InputError(f"{key} in {where}", repr(value), "a finite positive number")
    return float(value)


def config_from_hf(data: Mapping[str, Any], where: str) -> Config:
    """The Config of a config.json's contents; `where` names the file in errors."""
    check_supported(data, where)
    hidden, heads = integer(data, "hidden_size", where), integer(data, "num_attention_heads", where)
    head_dim = integer(data, "head_dim", where, max(1, hidden // heads))
    if data.get("head_dim") is None and hidden % heads:
        raise InputError(
            f"hidden_size in {where}",
            f"{hidden}, not a multiple of num_attention_heads {heads}",
            "a multiple, or a head_dim",
        )
    kv_heads = integer(data, "num_key_value_heads", where, heads)
    layer = Layer(heads, kv_heads, integer(data, "intermediate_size", where))
    rope, max_position = rope_from_hf(data, head_dim, where)
    groups = (("attention_bias", ATTENTION_BIASES), ("mlp_bias", MLP_BIASES))
    return Config(
        vocab_size=integer(data, "vocab_size", where),
        hidden_size=hidden,
        head_dim=head_dim,
        layers=(layer,) * integer(data, "num_hidden_layers", where, high=10_000),
        rope=rope,
        max_position=max_position,
        norm_eps=number(data, "rms_norm_eps", where, 1e-6),
        tie_embeddings=flag(data, "tie_word_embeddings", where),
        biases=frozenset().union(*(names for key, names in groups if flag(data, key, where))),
        bos_token_id=token_id(data, "bos_token_id", where, 1),
        eos_token_id=token_ids(data, "eos_token_id", where, 2),
        pad_token_id=token_id(data, "pad_token_id", where, None),
    )


def check_supported(data: Mapping[str, Any], where: str) -> None:
    """An `InputError` for a model that is not a dense Llama, or is one with parts that the graph does not have."""
    model_type = data.get("model_type")
    if model_type not in MODEL_TYPES:
        raise InputError(f"model_type in {where}", repr(model_type), " | ".join(MODEL_TYPES))
    if data.get("hidden_act", "silu") not in ("silu", "swish"):
        raise InputError(f"hidden_act in {where}", repr(data["hidden_act"]), "silu")
    if data.get("quantization_config") is not None:
        raise InputError(
            f"quantization_config in {where}",
            "a quantized checkpoint",
            "float weights (quantize with tinycompress afterwards)",
        )
    if model_type == "mistral":
        window = data.get("sliding_window", 4096)  # transformers' default, when the key is absent
        if window is not None and not (
            isinstance(window, int) and window >= integer(data, "max_position_embeddings", where, 131072)
        ):
            raise InputError(f"sliding_window in {where}", repr(window), "null: full attention")


def rope_from_hf(data: Mapping[str, Any], head_dim: int, where: str) -> tuple[Rope, int]:
    """The Rope and the length it is good for, from either spelling."""
    scaling = _rope_values(data, "rope_scaling", where)
    parameters = _rope_values(data, "rope_parameters", where)
    if scaling and parameters and scaling != {k: v for k, v in parameters.items() if k != "rope_theta"}:
        raise InputError(
            f"rope_scaling in {where}", f"{scaling}, and rope_parameters {parameters}", "one of them, or both alike"
        )
    inside, beside = parameters.get("rope_theta"), data.get("rope_theta")
    if inside is not None and beside is not None and inside != beside:
        raise InputError(f"rope_theta in {where}", f"{beside}, and {inside} in rope_parameters", "one value")
    values = scaling | parameters
    for source in (values, data):
        if source.get("partial_rotary_factor", 1) not in (1, None):
            raise InputError(
                f"partial_rotary_factor in {where}", repr(source["partial_rotary_factor"]), "1: every channel turns"
            )
    theta = number({"rope_theta": beside if inside is None else inside}, "rope_theta", where, 10000.0)
    length = integer(data, "max_position_embeddings", where, 2048)
    type_ = values.get("rope_type", "default")
    at = f"rope_scaling of {where}"
    if type_ == "default":
        return Rope(theta), length
    if type_ not in TYPES:
        raise InputError(f"rope_type in {at}", repr(type_), " | ".join(TYPES))
    key = "original_max_position_embeddings"
    beside_original = integer(data, key, where, 0)  # longrope in 4.x
    if type_ == "dynamic" and values.get(key) not in (None, length):
        found = f"{values[key]} with max_position_embeddings {length}"
        raise InputError(
            f"{key} in {at}", found, "for dynamic, max_position_embeddings is the original length: leave the other out"
        )
    original = (
        length
        if type_ == "dynamic"
        else integer(values, key, at, beside_original or (None if type_ == "llama3" else length))
    )
    if original > length and type_ != "linear":
        found = f"{original} with max_position_embeddings {length}"
        raise InputError(f"{key} in {where}", found, "at most max_position_embeddings, the stretched length")
    ratio = max(1.0, length / original)
    factor = number(values, "factor", at, ratio if type_ == "longrope" else None)
    scale = number(values, "attention_factor", at, 0.0) or None
    if type_ == "linear":
        return Rope(theta, type_, factor), length
    if type_ == "dynamic":
        return Rope(theta, type_, factor, original), round(original * factor)
    if type_ == "yarn":
        optional: dict[str, Any] = {
            k: number(values, k, at) for k in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim") if values.get(k)
        }
        stretched = (
            length if original < length else round(length * factor)
        )  # no original given: transformers takes `length` for it
        return Rope(
            theta, type_, factor, original, scale, truncate=flag(values, "truncate", at, True), **optional
        ), stretched
    if type_ == "llama3":
        low, high = number(values, "low_freq_factor", at), number(values, "high_freq_factor", at)
        return Rope(theta, type_, factor, original, low_freq_factor=low, high_freq_factor=high), length
    lists: dict[str, Any] = {k: _factors(values, k, head_dim, at) for k in ("short_factor", "long_factor")}
    derived = (
        bool(beside_original) and scale is None
    )  # 4.x, as Phi-3 does: the ratio of lengths, whatever the factor says
    return Rope(theta, type_, ratio if derived else factor, original, scale, **lists), length


def rope_to_hf(config: Config) -> dict[str, Any]:
    """The config.json fields that say what positions mean, in the 4.x spelling."""
    rope, length = config.rope, config.max_position
    out: dict[str, Any] = {"rope_theta": rope.theta, "rope_scaling": None, "max_position_embeddings": length}
    if rope.type == "default":
        return out
    scaling: dict[str, Any] = {"rope_type": rope.type, "factor": float(rope.factor)}
    if rope.type == "dynamic":
        out["max_position_embeddings"] = rope.original_max_position
    elif rope.type != "linear":
        scaling["original_max_position_embeddings"] = rope.original_max_position
    if rope.type == "yarn":
        scaling |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
        scaling |= {
            k: v for k in ("attention_factor", "mscale", "mscale_all_dim") if (v := getattr(rope, k)) is not None
        }
    elif rope.type == "llama3":
        scaling |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    elif rope.type == "longrope":
        # the factor is derived from the lengths by 4.x and read by 5.x: only its effect, written out, is the same in both
        scaling |= {
            "attention_factor": rope.attention_scale(),
            "short_factor": list(rope.short_factor),
            "long_factor": list(rope.long_factor),
        }
        out["original_max_position_embeddings"] = rope.original_max_position
    return out | {"rope_scaling": scaling}


def config_to_hf(config: Config, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of a uniform config as Hugging Face's Llama. Biases come in two groups there, all or none."""
    if not config.uniform:
        raise InputError(
            "graph", "layers of different widths", "layers all alike: all that Hugging Face's Llama can express"
        )
    layer, eos = config.layers[0], config.eos_token_id
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": layer.ffn_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": layer.n_heads,
        "num_key_value_heads": layer.n_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        **rope_to_hf(config),
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": bool(config.biases & ATTENTION_BIASES),
        "mlp_bias": bool(config.biases & MLP_BIASES),
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
        "pad_token_id": config.pad_token_id,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def missing_biases(config: Config) -> dict[str, tuple[int, ...]]:
    """Biases (and shapes) that Hugging Face expects beside those of a partial set; they are zero."""
    full: frozenset[str] = frozenset().union(
        *(group for group in (ATTENTION_BIASES, MLP_BIASES) if config.biases & group)
    )
    if full == config.biases:
        return {}
    linears = {name: shape for name, shape in shapes(config).items() if name.endswith("_proj.weight")}
    return {
        f"{name[:-7]}.bias": shape[:1] for name, shape in linears.items() if name.split(".")[-2] in full - config.biases
    }


def graph_from_model(model: Any) -> Graph:
    """The graph of a live transformers Llama; tensors are shared with the model."""
    config = config_from_hf(model.config.to_dict(), "the model's config")
    state = model.state_dict()
    return Graph(config, Weights({name: state[name].detach() for name in shapes(config) if name in state}))


def model_from_graph(graph: Graph) -> Any:
    """A live transformers LlamaForCausalLM that shares the graph's tensors (quantized ones are dequantized)."""
    need("transformers", "hf")
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    state: dict[str, Any] = dict(graph.dense().weights)
    norm = state["model.norm.weight"]
    state |= {name: norm.new_zeros(shape) for name, shape in missing_biases(graph.config).items()}
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    config = LlamaConfig(**config_to_hf(graph.config, norm.dtype))
    with torch.device("meta"):  # no memory for weights that are replaced at once
        model = LlamaForCausalLM(config)
    model.load_state_dict(state, assign=True)
    with norm.device:  # the buffers are not in the state; transformers 5 takes no device here
        model.model.rotary_emb = LlamaRotaryEmbedding(config)
    model.tie_weights()
    return model.eval()


def flag(data: Mapping[str, Any], key: str, where: str, default: bool = False) -> bool:
    """`data[key]` as a boolean; `default` when it is absent or null."""
    value = data.get(key)
    if value is not None and not isinstance(value, bool):
        raise InputError(f"{key} in {where}", repr(value), "true or false")
    return default if value is None else value


def token_id(data: Mapping[str, Any], key: str, where: str, default: int | None) -> int | None:
    """A token id; null and the old checkpoints' -1 are None."""
    if data.get(key, default) is None:
        return None
    value = integer(data, key, where, default, low=-1)
    return None if value < 0 else value


def token_ids(data: Mapping[str, Any], key: str, where: str, default: int | None) -> int | tuple[int, ...] | None:
    """One token id or a list of them."""
    value = data.get(key)
    if isinstance(value, list):
        return tuple(integer({key: v}, key, where, low=0) for v in value) or None
    return token_id(data, key, where, default)


def _rope_values(data: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    """A rope dictionary without nulls, its old key `type` renamed to `rope_type`."""
    value = data.get(key) or {}
    if not isinstance(value, dict):
        raise InputError(f"{key} in {where}", repr(value), "an object or null")
    out = {k: v for k, v in value.items() if v is not None}
    old = out.pop("type", None)
    if old is not None and out.setdefault("rope_type", old) != old:
        raise InputError(
            f"{key} in {where}", f"type {old!r} and rope_type {out['rope_type']!r}", "one of them, or both alike"
        )
    return out


def _factors(values: Mapping[str, Any], key: str, head_dim: int, where: str) -> tuple[float, ...]:
    found = values.get(key)
    if not isinstance(found, list) or len(found) != head_dim // 2:
        size = f"{len(found)} numbers" if isinstance(found, list) else repr(found)
        raise InputError(f"{key} in {where}", size, f"a list of head_dim / 2 = {head_dim // 2} numbers")
    return tuple(number({key: v}, key, where) for v in found)
