"""The model families of Hugging Face that the graph carries: what their configs leave out, and which one is written.

A graph has no family of its own: biases, norms of queries and keys, windows and layers without RoPE are fields of its
config, and `family_of` finds the class of transformers that computes just that.

  llama     Llama 1 to 3.x, TinyLlama, SmolLM, Yi, DeepSeek's dense ones: biases by `attention_bias`, `mlp_bias`
  mistral   a window in every layer, no biases
  qwen2     Qwen1.5, Qwen2, Qwen2.5: biases on queries, keys and values; windows in the later layers, if at all
  qwen3     norms of queries and keys; biases by `attention_bias`; windows likewise
  smollm3   layers without RoPE; both kinds of biases; windows

Defaults are those of transformers' config classes (4.57; 5.x agrees).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from ..graph.config import Config
from .json_fields import flag, integer

QKV = frozenset({"q_proj", "k_proj", "v_proj"})
ATTENTION_BIASES = QKV | {"o_proj"}
MLP_BIASES = frozenset({"gate_proj", "up_proj", "down_proj"})
FULL = "full_attention"
SLIDING = "sliding_attention"


@dataclass(frozen=True)
class Family:
    """A model_type, and what its config class takes where config.json is silent.

    Fields:
        model_type: its name in config.json.
        architecture: its class for language models in transformers.
        max_position: max_position_embeddings.
        theta: rope_theta.
        kv_heads: num_key_value_heads; None: as many as query heads.
        head_dim: None: hidden_size / num_attention_heads.
        tied: tie_word_embeddings.
        bos, eos, pad: token ids.
        bias_flags: of groups of biases, the flag that says whether they are there.
        biases: that are always there.
        qk_norm: whether queries and keys have norms.
    """

    model_type: str
    architecture: str
    max_position: int
    theta: float = 10000.0
    kv_heads: int | None = None
    head_dim: int | None = None
    tied: bool = False
    bos: int | None = None
    eos: int | None = None
    pad: int | None = None
    bias_flags: tuple[tuple[str, frozenset[str]], ...] = ()
    biases: frozenset[str] = frozenset()
    qk_norm: bool = False


_ATTENTION = ("attention_bias", ATTENTION_BIASES)
_MLP = ("mlp_bias", MLP_BIASES)
FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama", "LlamaForCausalLM", 2048, bos=1, eos=2, bias_flags=(_ATTENTION, _MLP)),
        Family("mistral", "MistralForCausalLM", 131072, kv_heads=8, bos=1, eos=2),
        Family("qwen2", "Qwen2ForCausalLM", 32768, kv_heads=32, biases=QKV),
        Family("qwen3", "Qwen3ForCausalLM", 32768, kv_heads=32, head_dim=128, bias_flags=(_ATTENTION,), qk_norm=True),
        Family(
            *("smollm3", "SmolLM3ForCausalLM", 32768, 2000000.0, 4),
            tied=True,
            bos=128000,
            eos=128001,
            pad=128004,
            bias_flags=(_ATTENTION, _MLP),
        ),
    )
}


def family_in(data: Mapping[str, Any], where: str) -> Family:
    """The family that a config.json names; an `InputError` that lists them all for another."""
    model_type = data.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise InputError(f"model_type in {where}", repr(model_type), " | ".join(FAMILIES))
    return FAMILIES[model_type]


def windows_in(data: Mapping[str, Any], family: Family, ropes: list[bool], where: str) -> list[int | None]:
    """The window of every layer, `ropes` saying which have RoPE."""
    n_layers = len(ropes)
    if family.model_type == "llama":
        return [None] * n_layers
    if family.model_type == "mistral":
        everything = "sliding_window" in data and data["sliding_window"] is None
        window = None if everything else integer(data, "sliding_window", where, 4096)
        kinds = set(_layer_types(data, n_layers, where) or ())
        if kinds - {SLIDING if window else FULL}:
            accepted = "layers all alike: what transformers' Mistral computes"
            raise InputError(f"layer_types in {where}", " | ".join(sorted(kinds)), accepted)
        return [window] * n_layers
    default = 4096 if family.model_type != "smollm3" else 0
    window = integer(data, "sliding_window", where, default, low=0) or None
    if not flag(data, "use_sliding_window", where):
        window = None
    types = _layer_types(data, n_layers, where)
    if types is None:
        types = _default_types(data, family, ropes, where)
    elif SLIDING in types and window is None:
        accepted = "use_sliding_window true beside a sliding_window, or full_attention in every layer"
        raise InputError(f"layer_types in {where}", f"{SLIDING} without a window in use", accepted)
    return [window if kind == SLIDING else None for kind in types]


def _default_types(data: Mapping[str, Any], family: Family, ropes: list[bool], where: str) -> list[str]:
    """What the layers see where config.json does not say it: SmolLM3 has its windows in layers without RoPE, Qwen in
    the later ones."""
    if family.model_type == "smollm3":
        return [FULL if rope else SLIDING for rope in ropes]
    first = integer(data, "max_window_layers", where, 28, low=0)
    return [SLIDING if index >= first else FULL for index in range(len(ropes))]


def ropes_in(data: Mapping[str, Any], family: Family, n_layers: int, where: str) -> list[bool]:
    """Whether each layer turns its queries and keys."""
    if family.model_type != "smollm3":
        return [True] * n_layers
    flags = data.get("no_rope_layers")
    if flags is None:
        interval = integer(data, "no_rope_layer_interval", where, 4)
        return [(index + 1) % interval != 0 for index in range(n_layers)]
    if not isinstance(flags, list) or len(flags) != n_layers or any(value not in (0, 1) for value in flags):
        accepted = f"a list of {n_layers} numbers: 1 for a layer with RoPE, 0 for one without"
        raise InputError(f"no_rope_layers in {where}", repr(flags)[:80], accepted)
    return [bool(value) for value in flags]


def family_of(config: Config) -> Family | None:
    """The family whose class in transformers computes this config; None where there is none.

    Biases that the class has and the config lacks are written as zeros (`missing_biases`).
    """
    if not config.uniform:
        return None
    windows = {layer.window for layer in config.layers}
    sizes = windows - {None}
    if len(sizes) > 1:
        return None
    ropeless = not all(layer.rope for layer in config.layers)
    if config.qk_norm_eps is not None:
        fits = config.qk_norm_eps == config.norm_eps and not ropeless and not config.biases & MLP_BIASES
        return FAMILIES["qwen3"] if fits else None
    if ropeless:
        return FAMILIES["smollm3"]
    if sizes and None not in windows and not config.biases:
        return FAMILIES["mistral"]
    if sizes:
        return FAMILIES["qwen2" if config.biases <= QKV else "smollm3"]
    return FAMILIES["qwen2" if config.biases == QKV else "llama"]


def expected_biases(config: Config, family: Family) -> frozenset[str]:
    """The linears that have a bias in the family's class: every one of a group of which the config has any."""
    groups = [group for _, group in family.bias_flags if config.biases & group]
    return family.biases.union(*groups)


def attention_to_hf(config: Config, family: Family) -> dict[str, Any]:
    """The fields of config.json that say what attention sees: biases, windows, layers without RoPE."""
    out: dict[str, Any] = {flag: bool(config.biases & group) for flag, group in family.bias_flags}
    windows = [layer.window for layer in config.layers]
    window = next((size for size in windows if size), None)
    if family.model_type == "mistral":
        out["sliding_window"] = window
    elif family.model_type != "llama":
        out["use_sliding_window"] = window is not None
        out["sliding_window"] = window
        out["layer_types"] = [SLIDING if size else FULL for size in windows]
        if family.model_type != "smollm3":  # what versions without layer_types read
            out["max_window_layers"] = windows.index(window) if window else config.n_layers
    if family.model_type == "smollm3":
        out["no_rope_layers"] = [int(layer.rope) for layer in config.layers]
    return out


def _layer_types(data: Mapping[str, Any], n_layers: int, where: str) -> list[str] | None:
    types = data.get("layer_types")
    if types is None:
        return None
    if not isinstance(types, list) or len(types) != n_layers or any(kind not in (FULL, SLIDING) for kind in types):
        accepted = f"a list of {n_layers} of {FULL} | {SLIDING}"
        raise InputError(f"layer_types in {where}", repr(types)[:80], accepted)
    return types
