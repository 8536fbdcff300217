"""The Config that a GGUF file's metadata and the names of its tensors describe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import InputError
from ..graph.config import LINEARS, Config, Layer
from .gguf_families import Architecture
from .gguf_keys import check_keys
from .gguf_rope import real, rope_from_gguf
from .gguf_tokenizer import SENTENCEPIECE_IDS, STOPS
from .json_fields import integer, token_id

NAMES = dict(zip(LINEARS, ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")))
TABLE = "token_embd.weight"
HEAD_TENSOR = "output.weight"
MOST_LAYERS = 10_000  # and, beyond a few that may be empty, no more than there are tensors
FEW_LAYERS = 256


def config_from_gguf(
    fields: Mapping[str, Any], tensors: Mapping[str, Any], architecture: Architecture, where: str
) -> Config:
    """The Config of a file of that architecture; an `InputError` for what no Config says."""
    prefix = f"{architecture.name}."
    values = {key.removeprefix(prefix): value for key, value in fields.items() if key.startswith(prefix)}
    if TABLE not in tensors:
        raise InputError(where, f"no tensor {TABLE}", "a whole model")
    n_layers = integer(values, "block_count", where, high=min(MOST_LAYERS, max(FEW_LAYERS, len(tensors))))
    hidden = integer(values, "embedding_length", where)
    heads = _per_layer(values, "attention.head_count", n_layers, where)
    kv_heads = heads
    if "attention.head_count_kv" in values:
        kv_heads = _per_layer(values, "attention.head_count_kv", n_layers, where)
    ffn = _per_layer(values, "feed_forward_length", n_layers, where)
    head_dim = integer(values, "attention.key_length", where, hidden // max(1, *heads))
    for key in ("rope.dimension_count", "attention.value_length"):
        if integer(values, key, where, head_dim) != head_dim:
            raise InputError(f"{prefix}{key} in {where}", values[key], f"the head's {head_dim}")
    context = integer(values, "context_length", where)
    rope = rope_from_gguf(values, tensors, head_dim, context, where)
    check_keys(values, architecture.name, head_dim, rope.theta, where)
    stretched = rope.type == "yarn" and rope.trained >= context  # the length before the stretch was given
    windows = _windows(values, n_layers, where)
    defaults = SENTENCEPIECE_IDS if fields.get("tokenizer.ggml.model") == "llama" else {}
    norm_eps = real(values, "attention.layer_norm_rms_epsilon", where)
    return Config(
        vocab_size=int(tensors[TABLE].shape[-1]),
        hidden_size=hidden,
        head_dim=head_dim,
        layers=tuple(map(Layer, heads, kv_heads, ffn, windows, architecture.ropes(n_layers))),
        rope=rope,
        max_position=round(context * rope.factor) if stretched else context,
        norm_eps=norm_eps,
        tie_embeddings=HEAD_TENSOR not in tensors,
        biases=frozenset(linear for linear, name in NAMES.items() if any(t.endswith(f".{name}.bias") for t in tensors)),
        qk_norm_eps=norm_eps if architecture.qk_norm else None,
        bos_token_id=token_id(fields, "tokenizer.ggml.bos_token_id", where, defaults.get("bos_token_id")),
        eos_token_id=_stops(fields, defaults, where),
        pad_token_id=token_id(fields, "tokenizer.ggml.padding_token_id", where, None),
    )


def _stops(fields: Mapping[str, Any], defaults: Mapping[str, int], where: str) -> int | tuple[int, ...] | None:
    """The tokens that end a text, a turn or a message, each once."""
    ids = [token_id(fields, f"tokenizer.ggml.{name}", where, defaults.get(name)) for name in STOPS]
    stops = tuple(dict.fromkeys(token for token in ids if token is not None))
    return stops if len(stops) > 1 else next(iter(stops), None)


def _windows(values: Mapping[str, Any], n_layers: int, where: str) -> list[int | None]:
    """The window of every layer. The pattern names the layers that have one: all, all but every nth, or by a list."""
    window = integer(values, "attention.sliding_window", where, 0, low=0) or None
    pattern = values.get("attention.sliding_window_pattern", True)
    if isinstance(pattern, list):
        if len(pattern) != n_layers or not all(isinstance(value, int) for value in pattern):
            accepted = f"one flag for each of {n_layers} layers"
            raise InputError(f"attention.sliding_window_pattern in {where}", repr(pattern)[:80], accepted)
        return [window if value else None for value in pattern]
    if isinstance(pattern, bool):
        return [window if pattern else None] * n_layers
    every = integer(values, "attention.sliding_window_pattern", where, low=0)
    return [window if every == 0 or index % every < every - 1 else None for index in range(n_layers)]


def _per_layer(values: Mapping[str, Any], key: str, n_layers: int, where: str) -> list[int]:
    """One number for every layer, or a list with one for each."""
    value = values.get(key)
    if isinstance(value, list) and len(value) != n_layers:
        accepted = f"one, or one for each of {n_layers} layers"
        raise InputError(f"{key} in {where}", f"{len(value)} numbers", accepted)
    numbers = value if isinstance(value, list) else [value] * n_layers
    return [integer({key: number}, key, where, low=0) for number in numbers]
