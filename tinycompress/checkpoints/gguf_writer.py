"""A graph as one GGUF file for llama.cpp, its packed weights in llama.cpp's own blocks of 32.

    Q4_0   float16 d, 16 bytes               w = d · (q - 8),     q_j in the low half of byte j, q_(j+16) in the high
    Q4_1   float16 d, float16 m, 16 bytes    w = d · q + m,       m = -z · d
    Q8_0   float16 d, 32 signed bytes        w = d · (q - 128)

A symmetric grid of at most 4 bits lies on Q4_0's, an asymmetric one (z a float or not) on Q4_1's, 8 bits symmetric on
Q8_0's: the integers stay, d is the group's scale (of either sign) in float16, repeated where a group spans several
blocks. Other grids are an `InputError`, unless `requantize` names the type to round them to. Dense weights stay dense;
norms and biases are F32. Where llama.cpp turns neighbouring channels, the rows of q and k are reordered
(gguf_reader.unpermute is the inverse). The architecture follows from the config (gguf_families.py).
Letters: N out_features, K in_features, B = K / 32 blocks.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..files import Claim, Target, claim_file, new_file
from ..graph.config import Config, shapes
from ..graph.graph import Graph, check_finite
from ..graph.quant_tensor import QuantTensor
from .bit_words import half_scales
from .gguf_families import Architecture, architecture_of
from .gguf_rope import rope_to_gguf
from .gguf_tokenizer import stop_fields, tokenizer_fields
from .vocabulary import check_vocabulary

if TYPE_CHECKING:
    import gguf

BLOCK = 32
REQUANTIZE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16", "BF16", "F32")
DENSE = {torch.float16: "F16", torch.bfloat16: "BF16"}  # everything else: F32


@dataclass(frozen=True)
class _Item:
    """A tensor of the file to come: its GGUF name, its shape, its type, and what makes its bytes."""

    name: str
    shape: tuple[int, ...]
    kind: str
    make: Callable[[], np.ndarray]  # uint8 [..., bytes a row]


def write_gguf(graph: Graph, path: Target, *, requantize: str | None = None, overwrite: bool = False) -> Path:
    """Writes the file, one weight in memory at a time; it appears complete or not at all.

    Args:
        path: the file, whose name ends in .gguf. Returned.
        requantize: the type, one of `REQUANTIZE`, that packed weights are rounded to where no block of llama.cpp holds
            them as they are; None: such a weight is an `InputError`.
        overwrite: whether a file that is there already is replaced. False by default.
    """
    import gguf

    claimed = claim_gguf(path, overwrite)
    if requantize is not None and requantize not in REQUANTIZE:
        raise InputError("requantize", repr(requantize), " | ".join(REQUANTIZE))
    check_vocabulary(graph)
    items = check_graph(graph, requantize)
    fields: dict[str, Any] = {"tokenizer.ggml.model": "no_vocab"} | stop_fields(graph.config, None)
    if graph.tokenizer is not None:
        fields = tokenizer_fields(graph.tokenizer, graph.config)
    with new_file(claimed) as work:
        writer = gguf.GGUFWriter(work, architecture_of(graph.config).name)
        try:
            _write(writer, items, _hyperparameters(graph.config) | fields)
        finally:
            writer.close()
    return Path(path)


def _write(writer: gguf.GGUFWriter, items: list[_Item], fields: Mapping[str, Any]) -> None:
    import gguf

    from ..progress import tqdm

    common = Counter(item.kind for item in items if len(item.shape) == 2).most_common(1)[0][0]
    writer.add_file_type(gguf.LlamaFileType.ALL_F32 if common == "F32" else gguf.LlamaFileType[f"MOSTLY_{common}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in fields.items():
        _add(writer, key, value)
    sizes = [_add_info(writer, item) for item in items]
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    with tqdm(total=sum(sizes), unit="B", unit_scale=True, desc="writing", delay=2, leave=False) as bar:
        for item, size in zip(items, sizes):
            writer.write_tensor_data(item.make())
            bar.update(size)


def claim_gguf(path: Target, overwrite: bool = False, apart_from: Mapping[str, Target | None] | None = None) -> Claim:
    """The claim on a .gguf file to write (see `files.claim_file`): taken before hours of work, not after."""
    if Path(path).suffix != ".gguf":
        raise InputError("output file", str(path), "a name that ends in .gguf")
    return claim_file(path, overwrite, apart_from)


def check_graph(graph: Graph, requantize: str | None = None) -> list[_Item]:
    """The tensors of the file that `graph` makes; an `InputError` for what llama.cpp cannot run."""
    return list(_items(graph, architecture_of(graph.config), requantize))


def kind_of(name: str, weight: QuantTensor) -> str:
    """The block type that holds a packed weight's integers as they are; an `InputError` where none does."""
    grid = weight.grid
    group = weight.shape[1] // weight.scales.shape[1]
    if group % BLOCK:
        accepted = f"multiples of {BLOCK} (or write_gguf's requantize='Q8_0')"
        raise InputError(f"{name} for GGUF", f"groups of {group}", accepted)
    if grid.bits <= 4:
        return "Q4_0" if grid.symmetric else "Q4_1"
    if grid.symmetric:
        return "Q8_0"
    accepted = "8 bits symmetric (or write_gguf's requantize='Q8_0')"
    raise InputError(f"{name} for GGUF", f"{grid}: 8 bits with zero points", accepted)


def blocks(name: str, weight: QuantTensor) -> np.ndarray:
    """uint8 [N, B · bytes a block]: a packed weight in the blocks of `kind_of`."""
    kind = kind_of(name, weight)
    N, K = weight.shape
    repeats = K // weight.scales.shape[1] // BLOCK
    scales = half_scales(name, weight.scales).repeat_interleave(repeats, 1)  # (N, B)
    q = weight.ints().reshape(N, K // BLOCK, BLOCK)
    if kind == "Q8_0":
        return _joined([scales], q ^ 128)  # as signed bytes: minus 128
    q = q + (8 - weight.grid.zero if weight.zeros is None else 0)
    nibbles = q[..., :16] | (q[..., 16:] << 4)
    if weight.zeros is None:
        return _joined([scales], nibbles)
    minimum = -weight.zeros.repeat_interleave(repeats, 1).float() * scales.float()
    return _joined([scales, half_scales(name, minimum)], nibbles)


def _joined(halves: list[Tensor], q: Tensor) -> np.ndarray:
    """Blocks of float16 fields [N, B] and bytes [N, B, n], one behind the other."""
    heads = [half.contiguous()[..., None].view(torch.uint8) for half in halves]
    return torch.cat([*heads, q], -1).flatten(1).cpu().numpy()


def _items(graph: Graph, architecture: Architecture, requantize: str | None) -> Iterator[_Item]:
    import gguf

    config = graph.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.name.upper()], config.n_layers)
    for name, divisors in rope_to_gguf(config, architecture)[1].items():
        yield _Item(name, tuple(divisors.shape), "F32", partial(_dense, divisors, "F32"))
    for name, shape in shapes(config).items():
        entry = graph.weights.entries[name]
        gguf_name = names.get_name(name, (".weight", ".bias"))
        assert gguf_name is not None
        order = _row_order(architecture.reordered_heads(name, config), config.head_dim)
        if isinstance(entry, QuantTensor):
            kind, make = _packed(name, entry, order, requantize)
        else:
            kind = DENSE.get(entry.dtype, "F32") if len(shape) == 2 else "F32"
            make = _reader(graph, name, order, kind)
        yield _Item(gguf_name, shape, kind, make)


def _packed(
    name: str, weight: QuantTensor, order: Tensor | None, requantize: str | None
) -> tuple[str, Callable[[], np.ndarray]]:
    try:
        kind = kind_of(name, weight)
    except InputError:
        if requantize is None:
            raise
        kind = requantize
        if kind.startswith("Q") and weight.shape[1] % BLOCK:
            given = f"{kind}, rows of {weight.shape[1]}"
            raise InputError(f"requantize of {name}", given, "F16, for rows that are no multiple of 32") from None
        return kind, lambda: _dense(_reordered(name, weight, order).dequantize(torch.float32), kind)
    half_scales(name, weight.scales)  # before anything is written
    return kind, lambda: blocks(name, _reordered(name, weight, order))


def _reader(graph: Graph, name: str, order: Tensor | None, kind: str) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        weight = graph.tensor(name).detach().cpu()
        check_finite(name, weight)
        return _dense(weight if order is None else weight[order], kind)

    return read


def _dense(weight: Tensor, kind: str) -> np.ndarray:
    """A dense tensor's bytes: [..., bytes a row]."""
    import gguf

    return gguf.quants.quantize(weight.float().contiguous().numpy(), gguf.GGMLQuantizationType[kind]).view(np.uint8)


def _reordered(name: str, weight: QuantTensor, order: Tensor | None) -> QuantTensor:
    return weight if order is None else weight.select(name, 0, order)


def _row_order(heads: int, head_dim: int) -> Tensor | None:
    """The rows of q and k in llama.cpp's order, from half-split pairs (i, i + d/2) to neighbours (2i, 2i + 1)."""
    rows = torch.arange(heads * head_dim)
    return rows.reshape(heads, 2, -1).transpose(1, 2).flatten() if heads else None


def _hyperparameters(config: Config) -> dict[str, Any]:
    """The architecture's keys."""
    architecture = architecture_of(config)
    heads, kv_heads, ffn = (list(widths) for widths in zip(*(layer.widths for layer in config.layers)))
    windows = [layer.window for layer in config.layers]
    context = min([config.max_position, *(window for window in windows if window)])
    keys: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": context,
        "embedding_length": config.hidden_size,
        "block_count": config.n_layers,
        "feed_forward_length": ffn if architecture.uneven else ffn[0],
        "attention.head_count": heads if architecture.uneven else heads[0],
        "attention.head_count_kv": kv_heads if architecture.uneven else kv_heads[0],
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        **rope_to_gguf(config, architecture)[0],
    }
    if context < config.max_position:
        kept = f"context_length is the window, {context}, and not {config.max_position}"
        warnings.warn(f"format gguf: llama.cpp's {architecture.name} has no window: {kept}", stacklevel=2)
    if context in windows:
        keys["attention.sliding_window"] = context
        if set(windows) != {context}:
            keys["attention.sliding_window_pattern"] = [window == context for window in windows]
    return {f"{architecture.name}.{key}": value for key, value in keys.items()}


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _add_info(writer: gguf.GGUFWriter, item: _Item) -> int:
    """Announces a tensor; returns its bytes."""
    import gguf

    kind = gguf.GGMLQuantizationType[item.kind]
    per_block, size = gguf.GGML_QUANT_SIZES[kind]
    row = item.shape[-1] // per_block * size
    nbytes = int(np.prod(item.shape[:-1], dtype=np.int64)) * row
    writer.add_tensor_info(item.name, (*item.shape[:-1], row), np.dtype(np.uint8), nbytes, kind)
    return nbytes
