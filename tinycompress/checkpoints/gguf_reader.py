"""GGUF (llama.cpp's file format) to a Graph, tensor by tensor and only when a weight is read.

Two things differ from Hugging Face's layout. Linears may be quantized in blocks along a row; `gguf.quants` turns them
back into floats. And llama.cpp may rotate neighbouring channels (2i, 2i + 1), for which its converter reordered the
rows of q and k from half-split pairs (i, i + d/2); `unpermute` takes that back, which a row-wise format allows on
packed bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..graph.config import Config, shapes
from ..graph.graph import Graph, LazyTensor, Weights
from .gguf_config import HEAD_TENSOR, config_from_gguf
from .gguf_families import Architecture, architecture_in
from .gguf_file import GgufFile, read_gguf
from .gguf_rope import TENSORS
from .gguf_tokenizer import tokenizer_from_gguf

if TYPE_CHECKING:
    import gguf

FLOATS = ("F32", "F16", "BF16")
BLOCKS = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
CODEBOOKS = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS")
OTHERS = ("TQ1_0", "TQ2_0", "MXFP4")
TYPES = (*FLOATS, *BLOCKS, *CODEBOOKS, *OTHERS)
STEP = 2**20  # values that are dequantized at a time: enough to be fast, little beside a weight


def load_gguf(path: str | Path, dtype: torch.dtype | None = None) -> Graph:
    """The graph in a .gguf file (or in the parts of a split one, any of which may be given), with its tokenizer.

    dtype: of the weights; None: float32. The architectures are those of gguf_families.py.
    """
    path = Path(path)
    file = read_gguf(path)
    with _naming(path):
        architecture = architecture_in(file.fields, file.where)
        config = config_from_gguf(file.fields, file.tensors, architecture, file.where)
        entries = _entries(file, architecture, config, dtype or torch.float32)
        tokenizer = tokenizer_from_gguf(file.fields, file.where)
        if tokenizer and tokenizer.vocab_size > config.vocab_size:
            accepted = f"at most the embedding's {config.vocab_size}"
            raise InputError("tokenizer", f"{tokenizer.vocab_size} tokens", accepted)
        return Graph(config, Weights(entries), tokenizer=tokenizer)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors of shapes and values that know nothing of a file get its name."""
    try:
        yield
    except InputError as error:
        if path.name in error.field or path.name in str(error.found):
            raise
        raise InputError(f"{error.field} in {path}", error.found, error.accepted) from None


def _entries(file: GgufFile, architecture: Architecture, config: Config, dtype: torch.dtype) -> dict[str, LazyTensor]:
    """Every parameter of the config, read when it is asked for; an `InputError` for one that is missing or too many."""
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.name.upper()], config.n_layers)
    entries: dict[str, LazyTensor] = {}
    used = {*TENSORS, HEAD_TENSOR}
    for name in shapes(config):
        source = names.get_name(name, try_suffixes=(".weight", ".bias"))
        tensor = file.tensors.get(source or "")
        if tensor is None:
            accepted = f"the tensors of {config.n_layers} layers of {architecture.name}"
            raise InputError(file.where, f"no tensor {source}", accepted)
        if tensor.tensor_type.name not in TYPES:
            raise InputError(f"type of {source} in {file.where}", tensor.tensor_type.name, " | ".join(TYPES))
        heads = architecture.reordered_heads(name, config)
        read = partial(_read, tensor.data, tensor.tensor_type, heads, dtype)
        entries[name] = LazyTensor(tuple(int(n) for n in reversed(tensor.shape)), dtype, read)
        used.add(tensor.name)
    if extra := [name for name in file.tensors if name not in used]:
        accepted = f"the tensors of a plain {architecture.name} only"
        raise InputError(file.where, f"tensors {', '.join(extra[:3])} ({len(extra)} in all)", accepted)
    return entries


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows [H·d, …] from llama.cpp's neighbouring pairs to half-split pairs: its converter's `permute`, undone."""
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, half, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _read(data: np.ndarray, kind: gguf.GGMLQuantizationType, heads: int, dtype: torch.dtype) -> Tensor:
    rows = unpermute(data, heads) if heads else data
    return dequantized(rows, kind, dtype)


def dequantized(data: np.ndarray, kind: gguf.GGMLQuantizationType, dtype: torch.dtype) -> Tensor:
    """Stored rows [..., bytes a row] (floats: [..., values]) as a tensor [..., values] of `dtype`.

    Some blocks at a time, all in one row: gguf.quants takes 16 rows at once, which is slow where rows are short, and
    keeps all its pieces until they are joined.
    """
    import gguf

    per_block, size = gguf.GGML_QUANT_SIZES[kind]
    if kind.name in ("F32", "F16"):
        return torch.from_numpy(np.ascontiguousarray(data)).to(dtype)
    blocks = np.ascontiguousarray(data).view(np.uint8).reshape(-1, size)
    out = torch.empty(len(blocks), per_block, dtype=dtype)
    step = STEP // per_block
    for start in range(0, len(blocks), step):
        part = blocks[start : start + step].reshape(1, -1)
        out[start : start + step] = torch.from_numpy(gguf.quants.dequantize(part, kind)).reshape(-1, per_block)
    return out.reshape(*data.shape[:-1], -1)
