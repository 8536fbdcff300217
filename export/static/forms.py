"""What the static (NPU) profiles take beyond a `Profile`: frozen data, and the graph made ready for it.

  qnn      Qualcomm HTP: activations uint16 between Quantize/DequantizeLinear, weights int8 or int4 per channel, or int4
           in blocks (MatMulNBits, which HTP runs as LPBQ when the scales are of that form)
  static   RKNN and others: float, every norm decomposed, opset 19

Both run fixed shapes: one graph takes `chunk` new positions (prefill), another takes one (decode), both behind a cache
of `max_position` slots. The embedding is not in the graph: the host gathers its rows.
Letters: N out_features, K in_features, G groups.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from tinycompress.errors import InputError
from tinycompress.graph.config import EMBEDDING, Config
from tinycompress.graph.graph import Graph
from tinycompress.graph.quant_tensor import Grid, QuantSpec, QuantTensor
from tinycompress.graph.topology import feeds
from tinycompress.progress import tqdm
from tinycompress.quantization.grid_search import find_grid, round_to_grid

from ..dynamic.attention import window_of
from ..profiles import Profile

LONGEST = 2048  # default context: every step pays for all the slots, filled or not


@dataclass(frozen=True)
class StaticForm:
    """How a static profile draws.

    Fields:
        activations: integer type of every activation; None: float.
        fused_norm: whether RMSNormalization is one operator: its squares would not fit 16 bits.
        packed_weights: whether linears are stored as integers.
        headroom: of ranges over what calibration saw. Default 1.25: a third of a bit of sixteen, against clipping
            unseen text.
        chunk: new positions of the prefill graph. Default 128.
        mask: added to scores that must not count. Default -100: within 16 bits, and e⁻¹⁰⁰ is 0 in float32.
    """

    activations: str | None
    fused_norm: bool
    packed_weights: bool
    headroom: float = 1.25
    chunk: int = 128
    mask: float = -100.0


FORMS: Mapping[str, StaticForm] = MappingProxyType(
    {
        "qnn": StaticForm(activations="uint16", fused_norm=True, packed_weights=True),
        "static": StaticForm(activations=None, fused_norm=False, packed_weights=False),
    }
)


def is_static(profile: str | Profile) -> bool:
    return (profile if isinstance(profile, str) else profile.name) in FORMS


def make_ready(graph: Graph, profile: Profile, dtype: str = "auto", context: int | None = None) -> Graph:
    """The graph as it will be exported: `max_position` is the context of the cache, the head has a weight of its own,
    dense parameters are float32; for a profile with packed weights every linear that is still dense becomes w8, one
    scale a channel, to the nearest step. Packed weights keep their integers and scales bit for bit.
    """
    form = FORMS[profile.name]
    check(graph.config, profile, context)
    length = context or min(graph.config.max_position, LONGEST)
    config = dataclasses.replace(graph.config, max_position=length, tie_embeddings=False)
    floats = graph.dense(torch.float32)
    if graph.config.tie_embeddings:
        floats = _untied(floats, EMBEDDING)
    packed = {n: w.to(dtype=torch.float32) for n, w in graph.weights.entries.items() if isinstance(w, QuantTensor)}
    if graph.config.tie_embeddings and EMBEDDING in packed:
        packed["lm_head.weight"] = packed[EMBEDDING]
    if dtype == "float32" and form.packed_weights:
        raise InputError("dtype", "'float32'", f"auto: the {profile.name} profile has no float weights")
    if not form.packed_weights:
        return floats.replace(config=config)
    for name in _linears(config):
        if name in packed:
            check_grid(name, packed[name], profile)
    return _rounded(floats.replace(config=config, weights=packed))


def check(config: Config, profile: Profile, context: int | None = None) -> None:
    """An `InputError` for what the profile cannot carry, before any work."""
    length = context or min(config.max_position, LONGEST)
    if not 2 <= length <= config.max_position:
        raise InputError("context", length, f"2 … {config.max_position}, the model's own")
    rope = config.rope
    if rope.varies_with_length and length > (rope.original_max_position or 0):
        kinds = "default | linear | yarn | llama3 (one table serves every length)"
        accepted = f"{kinds}, or a context of at most original_max_position"
        raise InputError(f"rope.type for the {profile.name} profile", repr(rope.type), accepted)


def check_static(config: Config, profile: Profile, spec: QuantSpec | None, inputs: Mapping[str, int]) -> None:
    """`check` and `check_spec` for a config whose linears, of the widths `inputs`, are to be quantized."""
    check(config, profile)
    if spec is None:
        return
    if FORMS[profile.name].packed_weights and spec.search not in ("lpbq", "minmax"):
        raise InputError(
            "quantization",
            str(spec),
            f"a spec that ends in -lpbq for the {profile.name} profile, which takes positive scales only",
        )
    for name, width in inputs.items():
        check_spec(name, spec, width, profile)


def check_spec(name: str, spec: QuantSpec | Grid, in_features: int, profile: Profile) -> None:
    """An `InputError` for a grid that the profile cannot carry as it is."""
    if not FORMS[profile.name].packed_weights:
        return
    grouped = spec.group(name, in_features) != in_features
    if not spec.symmetric:
        raise InputError(
            f"grid of {name}", str(spec), f"a symmetric one for the {profile.name} profile (w4, w8, w4g64-lpbq)"
        )
    if grouped and spec.bits == 8:
        raise InputError(
            f"grid of {name}", str(spec), f"w8, one scale a channel, for the {profile.name} profile (blocks are 4-bit)"
        )
    if grouped:
        profile.block(name, spec.group(name, in_features), in_features)


def check_grid(name: str, weight: QuantTensor, profile: Profile) -> None:
    """`check_spec`, and that the scales are positive: a negative one mirrors a grid that has no mirror image in
    int4."""
    check_spec(name, weight.grid, weight.shape[1], profile)
    if (weight.scales <= 0).any():
        found = f"{int((weight.scales <= 0).sum())} of {weight.scales.numel()} not positive"
        remedy = "quantize with a spec that ends in -lpbq, or with search='minmax'"
        accepted = f"positive scales for the {profile.name} profile: {remedy}"
        raise InputError(f"scales of {name}", found, accepted)


def _linears(config: Config) -> list[str]:
    return [config.weight_name(reader) for feed in feeds(config) for reader in feed.readers]


def _untied(graph: Graph, table: str) -> Graph:
    """The same function, its head a parameter of its own that shares the table's memory."""
    config = dataclasses.replace(graph.config, tie_embeddings=False)
    return graph.replace(config=config, weights={"lm_head.weight": graph.weights.entries[table]})


def _rounded(graph: Graph) -> Graph:
    """Dense linears to w8, one scale a channel that covers its range."""
    spec = QuantSpec(8, None, search="minmax")
    dense = [name for name in _linears(graph.config) if not isinstance(graph.weights.entries[name], QuantTensor)]
    changed = {}
    for name in tqdm(dense, desc="rounding to int8", unit="linear", delay=2, disable=not dense):
        weight: Tensor = graph.tensor(name).float()
        scales, _ = find_grid(name, weight, spec)
        changed[name] = QuantTensor.from_ints(round_to_grid(weight, scales, None, spec), scales, None, spec)
    return graph.replace(weights=changed)


def layout(graph: Graph, profile: Profile) -> dict[str, Any]:
    """What the host must know of a graph made ready: the manifest's "static"."""
    form = FORMS[profile.name]
    config = graph.config
    weight = graph.weights.entries[EMBEDDING]
    return {
        "chunk": min(form.chunk, config.max_position),
        "context": config.max_position,
        "mask": form.mask,
        "windows": windows(config),
        "rope": turns(config),
        "hidden": config.hidden_size,
        "head_dim": config.head_dim,
        "kv_heads": [layer.n_kv_heads for layer in config.layers if layer.n_heads],
        "embedding_bits": weight.grid.bits if isinstance(weight, QuantTensor) else 32,
    }


def turns(config: Config) -> bool:
    """Whether any layer turns its queries and keys: without one the graphs have no cos and sin to read."""
    return any(layer.rope for layer in config.layers if layer.n_heads)


def windows(config: Config) -> list[int | None]:
    """The windows of the layers with attention, each once; None: all positions. Each has a mask of its own."""
    found = {window_of(config, layer) for layer in config.layers if layer.n_heads}
    return sorted(found, key=lambda window: window or 0)


def host_tensors(graph: Graph) -> dict[str, Tensor]:
    """What the host reads: the embedding [V, D], dense or packed, and cos and sin [C, d/2]."""
    weight = graph.weights[EMBEDDING]
    config = graph.config
    parts = {"": weight} if isinstance(weight, Tensor) else weight.tensors()
    cos, sin = config.rope.tables(config.head_dim, config.max_position)
    return {EMBEDDING + suffix: t.contiguous() for suffix, t in parts.items()} | {"rope.cos": cos, "rope.sin": sin}
