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
from .hf_rope import rope_from_hf, rope_to_hf
from .json_fields import flag, integer, number, token_id, token_ids

MODEL_TYPES = ("llama", "mistral")
ATTENTION_BIASES = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})
MLP_BIASES = frozenset({"gate_proj", "up_proj", "down_proj"})


def config_from_hf(data: Mapping[str, Any], where: str) -> Config:
    """The Config of a config.json's contents; `where` names the file in errors."""
    check_supported(data, where)
    hidden = integer(data, "hidden_size", where)
    heads = integer(data, "num_attention_heads", where)
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


def config_to_hf(config: Config, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of a uniform config as Hugging Face's Llama. Biases come in two groups there, all or none."""
    if not config.uniform:
        raise InputError(
            "graph", "layers of different widths", "layers all alike: all that Hugging Face's Llama can express"
        )
    layer = config.layers[0]
    eos = config.eos_token_id
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
    groups = (ATTENTION_BIASES, MLP_BIASES)
    expected: frozenset[str] = frozenset().union(*(group for group in groups if config.biases & group))
    missing = tuple(f".{name}" for name in sorted(expected - config.biases))
    return {linear.bias: linear.shape[:1] for linear in config.linears() if missing and linear.name.endswith(missing)}


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
    norm = state[f"{FINAL_NORM}.weight"]
    state |= {name: norm.new_zeros(shape) for name, shape in missing_biases(graph.config).items()}
    state.setdefault(f"{HEAD}.weight", state[EMBEDDING])
    config = LlamaConfig(**config_to_hf(graph.config, norm.dtype))
    with torch.device("meta"):  # no memory for weights that are replaced at once
        model = LlamaForCausalLM(config)
    model.load_state_dict(state, assign=True)
    with norm.device:  # the buffers are not in the state; transformers 5 takes no device here
        model.model.rotary_emb = LlamaRotaryEmbedding(config)
    model.tie_weights()
    return model.eval()
