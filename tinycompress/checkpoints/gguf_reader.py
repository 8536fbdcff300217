"""GGUF (llama.cpp's file format) to a Graph, tensor by tensor and only when a weight is read.

Two things differ from Hugging Face's layout. Linears may be quantized in blocks along a row; `gguf.quants` turns them
back into floats. And llama.cpp rotates neighbouring channels (2i, 2i + 1), so its converter reordered the rows of q
and k from half-split pairs (i, i + d/2); `unpermute` takes that back, which a row-wise format allows on packed bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..graph.config import LINEARS, Config, Layer, layer_of, shapes
from ..graph.graph import Graph, LazyTensor, Weights
from ..graph.rope import Rope
from .gguf_tokenizer import tokenizer_from_gguf
from .json_fields import integer, number, token_id

if TYPE_CHECKING:
    import gguf

TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
LLAMA3_LENGTH = 8192  # what every Llama 3.x was trained at, before its frequencies were stretched


def load_gguf(path: str | Path, dtype: torch.dtype | None = None) -> Graph:
    """The graph in a .gguf file of architecture "llama", with its tokenizer; weights in `dtype`, by default float32."""
    import gguf

    path = Path(path)
    dtype = dtype or torch.float32
    reader = open_gguf(path)
    fields = _metadata(reader, path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = config_from_gguf(fields, tensors, str(path))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.n_layers)
    entries: dict[str, LazyTensor] = {}
    used = {"rope_freqs.weight"} | ({"output.weight"} if config.tie_embeddings else set())
    for name in shapes(config):
        source = names.get_name(name, try_suffixes=(".weight", ".bias"))
        tensor = tensors.get(source or "")
        if tensor is None:
            raise InputError(str(path), f"no tensor {source}", f"the tensors of {config.n_layers} Llama layers")
        if tensor.tensor_type.name not in TYPES:
            raise InputError(f"type of {source} in {path}", tensor.tensor_type.name, " | ".join(TYPES))
        heads = permuted_heads(name, config)
        read = partial(_read, tensor.data, tensor.tensor_type, heads, dtype)
        entries[name] = LazyTensor(tuple(int(n) for n in reversed(tensor.shape)), dtype, read)
        used.add(tensor.name)
    if extra := [name for name in tensors if name not in used]:
        raise InputError(
            str(path), f"tensors {', '.join(extra[:3])} ({len(extra)} in all)", "a plain Llama's tensors only"
        )
    tokenizer = tokenizer_from_gguf(fields, str(path))
    if tokenizer and tokenizer.vocab_size > config.vocab_size:
        raise InputError(
            f"tokenizer in {path}", f"{tokenizer.vocab_size} tokens", f"at most the embedding's {config.vocab_size}"
        )
    try:
        return Graph(config, Weights(entries), tokenizer=tokenizer)
    except InputError as error:
        raise InputError(f"{error.field} in {path}", error.found, error.accepted) from None


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows [H·d, …] from llama.cpp's neighbouring pairs to half-split pairs: its converter's `permute`, undone."""
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, half, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def open_gguf(path: Path) -> gguf.GGUFReader:
    """The library's reader over a memory map, with every access checked against the end of the file."""
    import gguf

    class Reader(gguf.GGUFReader):
        def _get(self, offset: Any, dtype: Any, count: Any = 1, override_order: Any = None) -> np.ndarray:
            # A plain array instead of np.memmap opens a 150,000-string file four times faster. A slice past the end
            # would silently be short: a truncated file would give wrong tensors, a hostile count an endless loop.
            self.data = np.asarray(self.data)  # type: ignore[assignment]
            stop = int(offset) + np.dtype(dtype).itemsize * int(count)
            if stop > len(self.data):
                raise ValueError(f"it has {len(self.data)} bytes, and says something is at byte {stop}")
            if override_order is None and self.byte_order == "I":
                return self.data[int(offset) : stop].view(dtype)
            return super()._get(offset, dtype, count, override_order)

    try:
        return Reader(path, "c")  # copy-on-write: tensors may be handed out without a copy, the file stays as it is
    except FileNotFoundError:
        raise InputError(str(path), "no such file", "a .gguf file") from None
    except (ValueError, KeyError, IndexError, TypeError, OverflowError) as error:
        raise InputError(
            str(path), f"not GGUF, truncated or corrupt ({error})", "a complete GGUF file, version 2 or 3"
        ) from error


def config_from_gguf(fields: Mapping[str, Any], tensors: Mapping[str, Any], where: str) -> Config:
    """The Config that `llama.*` metadata and the tensor names describe."""
    if (architecture := fields.get("general.architecture")) != "llama":
        raise InputError(f"general.architecture in {where}", repr(architecture), "llama")
    if integer(fields, "split.count", where, 1, low=0) > 1:
        raise InputError(
            f"split.count in {where}", fields["split.count"], "one file (merge with llama-gguf-split --merge)"
        )
    values = {key.removeprefix("llama."): value for key, value in fields.items() if key.startswith("llama.")}
    if integer(values, "expert_count", where, 0, low=0):
        raise InputError(f"llama.expert_count in {where}", values["expert_count"], "0: a dense model")
    hidden = integer(values, "embedding_length", where)
    n_layers = integer(values, "block_count", where, high=10_000)
    heads = _per_layer(values, "attention.head_count", n_layers, where)
    kv_heads = heads
    if "attention.head_count_kv" in values:
        kv_heads = _per_layer(values, "attention.head_count_kv", n_layers, where)
    ffn = _per_layer(values, "feed_forward_length", n_layers, where)
    head_dim = integer(values, "attention.key_length", where, hidden // max(1, *heads))
    for key in ("rope.dimension_count", "attention.value_length"):
        if integer(values, key, where, head_dim) != head_dim:
            raise InputError(f"llama.{key} in {where}", values[key], f"the head's {head_dim}")
    if "token_embd.weight" not in tensors:
        raise InputError(where, "no tensor token_embd.weight", "a whole model")
    rope = _rope(values, tensors, head_dim, where)
    gguf_names = dict(zip(LINEARS, ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")))
    ids = {key: token_id(fields, f"tokenizer.ggml.{name}", where, None) for key, name in _TOKENS.items()}
    return Config(
        vocab_size=int(tensors["token_embd.weight"].shape[-1]),
        hidden_size=hidden,
        head_dim=head_dim,
        layers=tuple(Layer(*widths) for widths in zip(heads, kv_heads, ffn)),
        rope=rope,
        max_position=integer(values, "context_length", where),
        # stored as float32: 1e-5 comes back as 9.9999997e-06, and means 1e-5
        norm_eps=float(
            np.format_float_positional(np.float32(number(values, "attention.layer_norm_rms_epsilon", where)))
        ),
        tie_embeddings="output.weight" not in tensors,
        biases=frozenset(
            name for name, short in gguf_names.items() if any(t.endswith(f".{short}.bias") for t in tensors)
        ),
        **ids,
    )


_TOKENS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}


def _rope(values: Mapping[str, Any], tensors: Mapping[str, Any], head_dim: int, where: str) -> Rope:
    theta = number(values, "rope.freq_base", where, 10000.0)
    if "rope_freqs.weight" in tensors:
        return _llama3_rope(theta, np.array(tensors["rope_freqs.weight"].data, np.float32), head_dim, where)
    if unknown := [name for name in tensors if name.startswith("rope_factors")]:
        raise InputError(where, f"tensor {unknown[0]} (longrope)", "RoPE plain, linear, yarn or Llama 3's")
    kind = values.get("rope.scaling.type", "linear" if "rope.scale_linear" in values else "none")
    factor = number(values, "rope.scaling.factor", where, number(values, "rope.scale_linear", where, 1.0))
    if kind == "none" or (kind == "linear" and factor == 1):
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, "linear", factor)
    if kind == "yarn":
        rope = Rope(theta, "yarn", factor, integer(values, "rope.scaling.original_context_length", where))
        extra = number(values, "rope.scaling.attn_factor", where, 1.0)  # on top of the paper's formula
        if extra == 1:
            return rope
        return Rope(theta, "yarn", factor, rope.original_max_position, rope.attention_scale() * extra)
    raise InputError(f"llama.rope.scaling.type in {where}", repr(kind), "none | linear | yarn")


def _llama3_rope(theta: float, divisors: np.ndarray, head_dim: int, where: str) -> Rope:
    """Llama 3's stretch, which GGUF keeps as the numbers that frequencies are divided by: recognised, or refused."""
    factor = float(divisors.max(initial=1.0))
    if np.isfinite(factor) and factor >= 1 and divisors.shape == (head_dim // 2,):
        rope = Rope(theta, "llama3", factor, LLAMA3_LENGTH)
        expected = Rope(theta).inv_freq(head_dim) / rope.inv_freq(head_dim)
        if np.allclose(expected.numpy(), divisors, rtol=1e-3):
            return rope
    raise InputError(
        f"rope_freqs.weight in {where}", f"divisors up to {factor:g}", f"Llama 3's, from a length of {LLAMA3_LENGTH}"
    )


def _per_layer(values: Mapping[str, Any], key: str, n_layers: int, where: str) -> list[int]:
    """One number for every layer, or a list with one for each."""
    value = values.get(key)
    if isinstance(value, list) and len(value) != n_layers:
        accepted = f"one, or one for each of {n_layers} layers"
        raise InputError(f"llama.{key} in {where}", f"{len(value)} numbers", accepted)
    numbers = value if isinstance(value, list) else [value] * n_layers
    return [integer({key: number}, key, where, low=0) for number in numbers]


def _metadata(reader: gguf.GGUFReader, path: Path) -> dict[str, Any]:
    try:
        return {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError) as error:
        raise InputError(str(path), f"corrupt metadata ({error})", "a complete GGUF file") from error


def permuted_heads(name: str, config: Config) -> int:
    """How many heads a parameter's rows are reordered in: q and k only, else 0."""
    index = layer_of(name)
    if index is None:
        return 0
    layer = config.layers[index]
    if ".q_proj." in name:
        return layer.n_heads
    return layer.n_kv_heads if ".k_proj." in name else 0


def _read(data: np.ndarray, kind: gguf.GGMLQuantizationType, heads: int, dtype: torch.dtype) -> Tensor:
    from gguf.quants import dequantize

    rows = unpermute(data, heads) if heads else data
    return torch.from_numpy(dequantize(rows, kind)).to(dtype)
