"""config.json for the code that opens any graph in transformers: modeling_tinycompress.py, saved beside the weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..graph.graph import Graph
from ..graph.quant_tensor import Grid
from ..graph.rope import Rope

MODELING = Path(__file__).with_name("modeling_tinycompress.py")


def config_with_code(graph: Graph, grids: Mapping[str, Grid]) -> dict[str, Any]:
    """config.json of a graph that no class of transformers computes; `grids`: of its packed weights, by parameter."""
    config = graph.config
    eos = config.eos_token_id
    widest = max(config.layers, key=lambda layer: layer.n_heads)
    return {
        "architectures": ["TinycompressForCausalLM"],
        "model_type": "tinycompress",
        "auto_map": {
            "AutoConfig": f"{MODELING.stem}.TinycompressConfig",
            "AutoModelForCausalLM": f"{MODELING.stem}.TinycompressForCausalLM",
        },
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": widest.n_heads,
        "num_key_value_heads": widest.n_kv_heads,
        "intermediate_size": max(layer.ffn_dim for layer in config.layers),
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.norm_eps,
        "qk_norm_eps": config.qk_norm_eps,
        "layers": [layer.to_list() for layer in config.layers],
        "biases": sorted(config.biases),
        "rope": _frequencies(config.rope, config.head_dim),
        "quantized": {name: dataclasses.asdict(grid) for name, grid in grids.items()},
        "tied_head": config.tie_embeddings,
        "tie_word_embeddings": False,  # the code ties the head itself
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
        "pad_token_id": config.pad_token_id,
        "torch_dtype": str(graph.dtype).removeprefix("torch."),
    }


def _frequencies(rope: Rope, head_dim: int) -> dict[str, Any]:
    """Radians a position of every pair of channels, and what changes them in a longer text."""
    out: dict[str, Any] = {"scale": rope.attention_scale(), "short": rope.inv_freq(head_dim).tolist()}
    if rope.type == "longrope":
        original = rope.original_max_position or 0
        out |= {"long": rope.inv_freq(head_dim, original + 1).tolist(), "original": original}
    if rope.type == "dynamic":
        out |= {"dynamic": {"factor": rope.factor, "theta": rope.theta}, "original": rope.original_max_position}
    return out
