"""Graph → ONNX by a walk over the config: no tracing, no pattern matching, one function a subgraph.

  input_ids ─ embedding ─ x ─┬─ norm ─ q,k,v ─ attention ─ o ─(+)─┬─ norm ─ gate,up ─ silu·mul ─ down ─(+)─ norm ─ head
                             └────────────────────────────────────┘   └────────────────────────────────────┘
  attention_mask ─ prelude ─ what every attention reads       (tokens of left-padded rows come first: padding.py)

One walk serves every form: `forms_contrib` draws the parts in ONNX Runtime's operators, `forms_standard` in those of
the ONNX standard, each as a module with the same seven functions, and the profile says which. Activations are float32.
Initializers carry the parameters' names, so `read` gets the graph back. Weights are lazy: each is made when it is
written, one at a time.

Letters: B batch, T new positions, S all positions, D hidden, H heads, K KV heads, d head_dim, F ffn, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tinycompress.errors import InputError
from tinycompress.graph.config import EMBEDDING, FINAL_NORM, HEAD, Config, Layer, LayerNames, layer_names
from tinycompress.graph.graph import Graph
from tinycompress.graph.quant_tensor import QuantTensor

from ..profiles import Profile
from . import forms_contrib, forms_standard, padding
from .attention import LayerAttention, apart, fused, heads_apart, merge_heads, window_of
from .draw import Choices, Draw

if TYPE_CHECKING:
    import onnx_ir as ir

DTYPES = ("auto", "float32")
SCALES = ("float32", "float16")
ACCURACY_LEVELS = (0, 1, 2, 3, 4)
FORMS: dict[str, Any] = {"contrib": forms_contrib, "standard": forms_standard}


def prepare(graph: Graph, dtype: str = "auto", scales: str = "float32") -> Graph:
    """The graph as it will be exported: dense weights and scales in float32, lazily; `dtype="float32"` also turns
    packed weights into dense ones; `scales="float16"` rounds the scales of packed weights to values that float16
    holds."""
    if dtype not in DTYPES:
        raise InputError("dtype", repr(dtype), " | ".join(DTYPES))
    if scales not in SCALES:
        raise InputError("scales", repr(scales), " | ".join(SCALES))
    packed = {n: w for n, w in graph.weights.entries.items() if isinstance(w, QuantTensor)}
    if scales == "float16":
        packed = {n: _half_scales(n, w) for n, w in packed.items()}
        graph = graph.replace(weights=packed) if packed else graph
    floats = graph.dense(torch.float32)
    if dtype == "float32" or not packed:
        return floats
    # only scales are converted: integers are shared
    return floats.replace(weights={name: weight.to(dtype=torch.float32) for name, weight in packed.items()})


def shortened(graph: Graph, context: int | None) -> Graph:
    """The graph good for `context` positions, which its rotary tables then end with; None: the model's own."""
    own = graph.config.max_position
    if context is None or context == own:
        return graph
    if not 2 <= context <= own:
        raise InputError("context", context, f"2 … {own}, the model's own (compress --context stretches it)")
    return graph.replace(config=dataclasses.replace(graph.config, max_position=context))


def emit(
    graph: Graph,
    profile: Profile,
    dtype: str = "auto",
    accuracy_level: int = 4,
    scales: str = "float32",
    kv_scales: Mapping[str, Tensor] | None = None,
) -> ir.Model:
    """The ONNX model of a graph.

    Inputs: input_ids, attention_mask int64 [B, T] and [B, S] (and position_ids where the profile has them);
    past_key_values.{j}.key, .value float [B, K, S - T, d], j counting the layers that have attention; int8 with
    `kv_scales`. Outputs: logits float [B, T, V]; present.{j}.key, .value [B, K, S, d].
    """
    check(graph, profile, accuracy_level)
    draw = Draw(prepare(graph, dtype, scales), profile, Choices(accuracy_level, scales == "float16", kv_scales or {}))
    _walk(draw, FORMS[profile.form])
    return draw.model()


def features(graph: Graph, profile: Profile) -> set[str]:
    """What a prepared graph needs of the runtime beyond the base, as keys of `Profile.floors`."""
    packed = {n: w for n, w in graph.weights.entries.items() if isinstance(w, QuantTensor)}
    out = {f"bits_{profile.container(w.grid.bits)}" for w in packed.values()}
    out |= {"gather"} if EMBEDDING in packed else set()
    windowed = any(window_of(graph.config, layer) for layer in graph.config.layers if layer.n_heads)
    return out | {"window"} if windowed and fused(graph.config, profile) else out


def attention_layers(config: Config) -> list[int]:
    """Indices of the layers that have attention: cache entry j belongs to the j-th of them."""
    return [i for i, layer in enumerate(config.layers) if layer.n_heads]


def check(graph: Graph, profile: Profile, accuracy_level: int = 4) -> None:
    """What a profile cannot carry, as an `InputError` before any work."""
    if accuracy_level not in ACCURACY_LEVELS:
        raise InputError(
            "accuracy_level",
            accuracy_level,
            f"{ACCURACY_LEVELS}: 0 is the runtime's float arithmetic, 4 int8 activations",
        )
    config = graph.config
    multiple = profile.width_multiple
    widths = {"Config.hidden_size": config.hidden_size, "Config.vocab_size": config.vocab_size}
    widths |= {"Config.head_dim": config.head_dim} if attention_layers(config) else {}
    widths |= {f"Config.layers[{i}].ffn_dim": layer.ffn_dim for i, layer in enumerate(config.layers)}
    for name, width in widths.items():
        if width % multiple:
            raise InputError(
                name,
                width,
                f"a multiple of {multiple} for the {profile.name} profile (prune to such widths, or another profile)",
            )
    for i, layer in enumerate(config.layers):
        if profile.grouped and layer.n_heads and layer.group < 2:
            accepted = f"fewer than its {layer.n_heads} heads for the {profile.name} profile (the std profile takes it)"
            raise InputError(f"Config.layers[{i}].n_kv_heads", layer.n_kv_heads, accepted)
    for name, weight in graph.weights.entries.items():
        if isinstance(weight, QuantTensor):
            _check_grid(name, weight, profile)


def _check_grid(name: str, weight: QuantTensor, profile: Profile) -> None:
    profile.check_zeros(name, weight.grid)
    if name == EMBEDDING and weight.grid.float_zero:  # GatherBlockQuantized has no such form
        raise InputError(
            f"grid of {name}", f"{weight.grid}: float zero points", "integer ones (-asym), or none, for the embedding"
        )
    profile.block(name, weight.shape[1] // weight.scales.shape[1], weight.shape[1])
    if name == EMBEDDING and weight.shape[1] % 2:
        raise InputError(
            f"{name} for export", f"{weight.shape[1]} packed columns", "an even number, or a dense embedding"
        )


def _half_scales(name: str, weight: QuantTensor) -> QuantTensor:
    half = weight.scales.half()
    if not torch.isfinite(half).all() or ((half == 0) & (weight.scales != 0)).any():
        raise InputError(f"scales of {name}", "values that float16 cannot hold", 'scales="float32"')
    return QuantTensor(weight.packed, half.to(weight.scales.dtype), weight.zeros, weight.grid, weight.shape)


# The walk -----------------------------------------------------------------------------------------------------------


def _walk(draw: Draw, form: Any) -> None:
    config = draw.config
    ids = draw.input("input_ids", "INT64", ["batch_size", "sequence_length"])
    mask = draw.input("attention_mask", "INT64", ["batch_size", "total_sequence_length"])
    moved = padding.tokens_first(draw, ids, mask) if fused(config, draw.profile) and attention_layers(config) else None
    shared = form.prelude(draw, ids, mask) if attention_layers(config) else []
    cached = "INT8" if draw.choices.kv_scales else "FLOAT"
    x = form.embedding(draw, moved.ids if moved else ids)
    residual = None
    slot = 0
    presents: list[tuple[int, list[ir.Value]]] = []
    # x is what the last sublayer wrote, not yet added to `residual`: the next norm adds and normalises
    for i, layer in enumerate(config.layers):
        names = layer_names(i)
        if layer.n_heads:
            n, residual = form.norm(draw, names.attention_norm, x, residual)
            qkv = _linears(draw, form, names, names.qkv, n)
            past = [
                draw.input(f"past_key_values.{slot}.{kind}", cached, _cache(config, layer, "past"))
                for kind in ("key", "value")
            ]
            if config.qk_norm_eps is not None:
                qkv = _normed(draw, form, names, qkv, layer, config.qk_norm_eps)
            heads = LayerAttention(
                names.attention,
                qkv,
                past,
                shared,
                layer.n_heads,
                layer.n_kv_heads,
                window_of(config, layer),
                layer.rope,
            )
            y, new = form.attention(draw, heads)
            presents.append((i, new))
            x = _linear(draw, form, names.output, y)
            slot += 1
        if layer.ffn_dim:
            n, residual = form.norm(draw, names.ffn_norm, x, residual)
            x = _ffn(draw, form, names, n)
    n, _ = form.norm(draw, FINAL_NORM, x, residual)
    if moved:
        n = padding.put_back(draw, n, moved)
    draw.output("logits", _linear(draw, form, HEAD, n), ["batch_size", "sequence_length", config.vocab_size])
    for slot, (i, new) in enumerate(presents):
        for kind, value in zip(("key", "value"), new):
            draw.output(f"present.{slot}.{kind}", value, _cache(config, config.layers[i], "total"), cached)


def _cache(config: Config, layer: Any, span: str) -> list[str | int]:
    return ["batch_size", layer.n_kv_heads, f"{span}_sequence_length", config.head_dim]


def _normed(draw: Draw, form: Any, names: LayerNames, qkv: list[ir.Value], layer: Layer, eps: float) -> list[ir.Value]:
    """Queries [B, T, H·d] and keys [B, T, K·d] behind their norms, head by head, and the values."""
    q, k, v = apart(draw, names.qkv, qkv, layer.n_heads, layer.n_kv_heads)
    out = []
    for name, x, heads in ((names.query_norm, q, layer.n_heads), (names.key_norm, k, layer.n_kv_heads)):
        y = form.last_axis_norm(draw, name, heads_apart(draw, name, x, heads), eps)
        out.append(merge_heads(draw, f"{name}.heads", y, heads * draw.config.head_dim))
    return [*out, v]


def _ffn(draw: Draw, form: Any, names: LayerNames, x: ir.Value) -> ir.Value:
    """down(silu(gate) · up); runtimes fuse x · sigmoid(x)."""
    at = names.ffn
    both = _linears(draw, form, names, names.gate_up, x)
    gate, up = both if len(both) == 2 else draw.ops(at, "Split", both, 2, axis=-1, num_outputs=2)
    silu = draw.op(f"{at}.silu", "Mul", [gate, draw.op(at, "Sigmoid", [gate])])
    return _linear(draw, form, names.down, draw.op(at, "Mul", [silu, up]))


def _linears(draw: Draw, form: Any, names: LayerNames, joined: str, x: ir.Value) -> list[ir.Value]:
    """The linears of `names.joined`, one value each; or one value, all side by side, where they are one product."""
    parts = list(names.joined[joined])
    if not draw.joins(parts):
        return [_linear(draw, form, part, x) for part in parts]
    y = form.product(draw, joined, parts, x)
    biases = [f"{part}.bias" for part in parts]
    if biases[0] not in draw.graph.weights:
        return [y]
    return [draw.op(joined, "Add", [y, draw.dense_rows(f"{joined}.bias", biases)])]


def _linear(draw: Draw, form: Any, name: str, x: ir.Value) -> ir.Value:
    y = form.linear(draw, name, x)
    return draw.op(name, "Add", [y, draw.dense(f"{name}.bias")]) if f"{name}.bias" in draw.graph.weights else y
