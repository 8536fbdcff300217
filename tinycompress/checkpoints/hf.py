"""Hugging Face's config.json and live models, to and from a Graph.

A config is input: every field is checked before it becomes a shape. What it says of positions is in hf_rope.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..errors import InputError, need
from ..graph.config import EMBEDDING, FINAL_NORM, HEAD, Config, Layer, shapes
from ..graph.graph import Graph, Weights
from .config_keys import check_keys
from .families import (
    FAMILIES,
    Family,
    attention_to_hf,
    expected_biases,
    family_in,
    family_of,
    ropes_in,
    windows_in,
)
from .generation_config import generation_of, with_ids
from .hf_rope import rope_from_hf, rope_to_hf
from .json_fields import flag, integer, number, token_id, token_ids


def config_from_hf(data: Mapping[str, Any], where: str) -> Config:
    """The Config of a config.json's contents; `where` names the file in errors."""
    family = family_in(data, where)
    check_supported(data, where)
    hidden = integer(data, "hidden_size", where)
    heads = integer(data, "num_attention_heads", where)
    head_dim = integer(data, "head_dim", where, family.head_dim or max(1, hidden // heads))
    if data.get("head_dim") is None and family.head_dim is None and hidden % heads:
        raise InputError(
            f"hidden_size in {where}",
            f"{hidden}, not a multiple of num_attention_heads {heads}",
            "a multiple, or a head_dim",
        )
    kv_heads = integer(data, "num_key_value_heads", where, _kv_heads(data, family) or heads)
    ffn_dim = integer(data, "intermediate_size", where)
    n_layers = integer(data, "num_hidden_layers", where, high=10_000)
    ropes = ropes_in(data, family, n_layers, where)
    windows = windows_in(data, family, ropes, where)
    rope, max_position = rope_from_hf(data, head_dim, where, family.theta, family.max_position)
    norm_eps = number(data, "rms_norm_eps", where, 1e-6)
    flags = [names for key, names in family.bias_flags if flag(data, key, where)]
    return Config(
        vocab_size=integer(data, "vocab_size", where),
        hidden_size=hidden,
        head_dim=head_dim,
        layers=tuple(Layer(heads, kv_heads, ffn_dim, window, turned) for window, turned in zip(windows, ropes)),
        rope=rope,
        max_position=max_position,
        norm_eps=norm_eps,
        tie_embeddings=flag(data, "tie_word_embeddings", where, family.tied),
        biases=family.biases.union(*flags),
        qk_norm_eps=norm_eps if family.qk_norm else None,
        bos_token_id=token_id(data, "bos_token_id", where, family.bos),
        eos_token_id=token_ids(data, "eos_token_id", where, family.eos),
        pad_token_id=token_id(data, "pad_token_id", where, family.pad),
    )


def _kv_heads(data: Mapping[str, Any], family: Family) -> int | None:
    """transformers' default where the key is absent; null means as many as query heads."""
    return family.kv_heads if "num_key_value_heads" not in data else None


def check_supported(data: Mapping[str, Any], where: str) -> None:
    """An `InputError` for a model with parts that the graph does not have."""
    if data.get("hidden_act", "silu") not in ("silu", "swish"):
        raise InputError(f"hidden_act in {where}", repr(data["hidden_act"]), "silu")
    if data.get("quantization_config") is not None:
        raise InputError(
            f"quantization_config in {where}",
            "a quantized checkpoint",
            "float weights (quantize with tinycompress afterwards)",
        )
    check_keys(data, where)


def config_to_hf(config: Config, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of a config that a class of transformers can compute (`family_of`); an `InputError` for another."""
    family = family_of(config)
    if family is None:
        accepted = f"what a class of transformers computes: {' | '.join(FAMILIES)}, layers all as wide"
        raise InputError("graph", "layers of different widths, or parts that no one class has", accepted)
    layer = config.layers[0]
    eos = config.eos_token_id
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
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
        **attention_to_hf(config, family),
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
        "pad_token_id": config.pad_token_id,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def missing_biases(config: Config) -> dict[str, tuple[int, ...]]:
    """Biases (and shapes) that Hugging Face's class has and the config lacks; they are zero."""
    family = family_of(config)
    if family is None:
        return {}
    missing = tuple(f".{name}" for name in sorted(expected_biases(config, family) - config.biases))
    return {linear.bias: linear.shape[:1] for linear in config.linears() if missing and linear.name.endswith(missing)}


def graph_from_model(model: Any) -> Graph:
    """The graph of a live transformers model of a family that is carried; tensors are shared with the model."""
    config = config_from_hf(model.config.to_dict(), "the model's config")
    state = model.state_dict()
    weights = Weights({name: state[name].detach() for name in shapes(config) if name in state})
    generation = _generation_of_model(model)
    if generation is not None:
        config = with_ids(config, generation, "the model's generation_config")
    return Graph(config, weights, generation=generation)


def _generation_of_model(model: Any) -> dict[str, Any] | None:
    """The model's generation_config as a dictionary; None where it was only made from the config."""
    stored = getattr(model, "generation_config", None)
    if stored is None or getattr(stored, "_from_model_config", False):
        return None
    return dict(stored.to_diff_dict())


def model_from_graph(graph: Graph) -> Any:
    """A live transformers model that shares the graph's tensors (quantized ones are dequantized)."""
    need("transformers", "hf")
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    state: dict[str, Any] = dict(graph.dense().weights)
    norm = state[f"{FINAL_NORM}.weight"]
    state |= {name: norm.new_zeros(shape) for name, shape in missing_biases(graph.config).items()}
    state.setdefault(f"{HEAD}.weight", state[EMBEDDING])
    values = config_to_hf(graph.config, norm.dtype)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device("meta"):  # no memory for weights that are replaced at once
        model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(state, assign=True)
    with norm.device:  # the buffers are not in the state; transformers 5 takes no device here
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.tie_weights()
    if graph.generation is not None:
        model.generation_config = GenerationConfig.from_dict(generation_of(graph))
    return model.eval()
