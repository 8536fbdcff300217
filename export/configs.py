"""The small files beside an exported model: what onnxruntime-genai, Hugging Face's tools and transformers.js look
for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tinycompress.files import write_json
from tinycompress.graph.config import Config
from tinycompress.graph.graph import Graph
from tinycompress.graph.quant_tensor import QuantTensor
from tinycompress.model.generation import end_tokens
from tinycompress.model.sampling import draw_of

from .dynamic.attention import fused
from .dynamic.emit import attention_layers
from .profiles import Profile

TJS_DTYPES = {0: "fp32", 2: "q2", 3: "q4", 4: "q4", 8: "q8"}  # transformers.js' name for weights of so many bits
LARGEST_CACHE = 1 << 28  # bytes that onnxruntime-genai takes for keys and values where a caller names no length
SHORTEST = 2048  # positions that it has room for whatever they cost
TJS_SUFFIXES = {"fp32": "", "q2": "_q2", "q4": "_q4", "q8": "_quantized"}


def paths(graph: Graph, profile: Profile) -> tuple[str, str]:
    """Where a profile keeps the model and its weights, relative to the folder."""
    if profile.layout == "flat":
        return "model.onnx", "model.onnx.data"
    model = f"onnx/model{TJS_SUFFIXES[web_dtype(graph)]}.onnx"
    return model, f"{model}_data"


def web_dtype(graph: Graph) -> str:
    """transformers.js' name for what a graph's weights are: that of its narrowest packed ones."""
    widths = {w.grid.bits for w in graph.weights.entries.values() if isinstance(w, QuantTensor)}
    return TJS_DTYPES[min(widths, default=0)]


def write_configs(graph: Graph, profile: Profile, work: Path, cache_bytes: int = 4) -> None:
    """config.json, genai_config.json and the tokenizer's files with the chat template. `cache_bytes` are those of a
    cached number."""
    from tinycompress.checkpoints.families import family_of
    from tinycompress.checkpoints.hf import config_to_hf

    config = graph.config
    if profile.layout == "transformers.js":
        write_json(work / "config.json", web_config(graph, profile))
    else:
        own = {"model_type": "tinycompress", "vocab_size": config.vocab_size}
        write_json(work / "config.json", config_to_hf(config, torch.float32) if family_of(config) else own)
        if attention_layers(config):
            write_json(work / "genai_config.json", genai_config(graph, profile, cache_bytes))
    write_text_files(graph, work, profile.layout == "transformers.js")


def write_text_files(graph: Graph, work: Path, named_in_config: bool = False) -> None:
    """generation_config.json and the tokenizer's files; `named_in_config`: see `write_templates`."""
    from tinycompress.checkpoints.generation_config import write_generation

    write_generation(graph, work)
    if graph.tokenizer is not None:
        graph.tokenizer.save(work, named_in_config)


def web_config(graph: Graph, profile: Profile) -> dict[str, Any]:
    """config.json for transformers.js, which takes cache names and widths from it and shapes from the model. For layers
    that differ the widths are those of the first; `tinycompress` holds them all."""
    config = graph.config
    entries = [config.layers[i] for i in attention_layers(config)]
    data_file = Path(paths(graph, profile)[0]).name
    out = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": max((layer.ffn_dim for layer in config.layers), default=0),
        "num_hidden_layers": len(entries),
        "num_attention_heads": entries[0].n_heads if entries else 0,
        "num_key_value_heads": entries[0].n_kv_heads if entries else 0,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_position,
        "tie_word_embeddings": config.tie_embeddings,
        "transformers.js_config": {"dtype": web_dtype(graph), "use_external_data_format": {data_file: 1}},
    }
    return out | _ids(config) | ({} if config.uniform else {"tinycompress": config.to_dict()})


def _ids(config: Config) -> dict[str, Any]:
    eos = config.eos_token_id
    ids = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
        "pad_token_id": config.pad_token_id,
    }
    return {k: v for k, v in ids.items() if v is not None}


def default_length(config: Config, cache_bytes: int = 4) -> int:
    """The `max_length` of genai_config.json: onnxruntime-genai takes memory for the whole of it before the first token,
    `cache_bytes` for each key and value. A power of two whose cache fits LARGEST_CACHE, at least SHORTEST, at most the
    context."""
    a_position = 2 * cache_bytes * config.head_dim * sum(layer.n_kv_heads for layer in config.layers)
    fitting = 1 << max(1, LARGEST_CACHE // max(1, a_position)).bit_length() - 1
    return min(config.max_position, max(SHORTEST, fitting))


def genai_config(graph: Graph, profile: Profile, cache_bytes: int = 4) -> dict[str, Any]:
    """For onnxruntime-genai: its layers are the cache entries, and it reads their shapes from the model itself. Its
    search is what `generate` does where the caller says nothing. `cache_bytes` are those of a cached number."""
    from tinycompress.checkpoints.families import family_of

    config = graph.config
    family = family_of(config)
    entries = attention_layers(config)
    first = config.layers[entries[0]]
    stop = end_tokens(config)
    first_stop = stop[0] if stop else None
    eos = list(stop) if len(stop) > 1 else first_stop
    pad = config.pad_token_id
    if pad is None:
        pad = first_stop or 0
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": "model.onnx",
        "head_size": config.head_dim,
        "hidden_size": config.hidden_size,
        "num_attention_heads": first.n_heads,
        "num_key_value_heads": first.n_kv_heads,
        "num_hidden_layers": len(entries),
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            **({"position_ids": "position_ids"} if profile.position_ids else {}),
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    ids = {"bos_token_id": config.bos_token_id, "eos_token_id": eos, "pad_token_id": pad}
    model = {
        "type": family.model_type if family else "llama",
        "vocab_size": config.vocab_size,
        "context_length": config.max_position,
        "decoder": decoder,
    }
    draw = draw_of(graph.generation, {})
    search = {
        "do_sample": draw.temperature > 0,
        "max_length": default_length(config, cache_bytes),
        "num_beams": 1,
        "past_present_share_buffer": fused(config, profile),
        "repetition_penalty": draw.repetition_penalty,
        "temperature": draw.temperature or 1.0,
        "top_k": draw.top_k if draw.temperature > 0 else 1,
        "top_p": draw.top_p,
    }
    return {"model": model | {k: v for k, v in ids.items() if v is not None}, "search": search}
