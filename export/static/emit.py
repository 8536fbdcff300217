"""Graph → ONNX of fixed shapes, for NPU compilers: a walk over the config that draws standard operators only.

  hidden [1,S,D] ─ x ─┬─ norm ─ q,k,v ─ attention ─ o ─(+)─┬─ norm ─ gate,up ─ silu·mul ─ down ─(+)─ … ─ norm ─ head
                      └────────────────────────────────────┘└───────────────────────────────────┘
  norm        x·x ─ mean ─ +ε ─ √ ─ x/· ─ ·w                     or RMSNormalization
  q,k,v       linear ─ Reshape [1,S,n,d] ─ Transpose [1,n,S,d]
              q and k may have norms, and turn: halves a, b ─ Concat(a·cos - b·sin, b·cos + a·sin)
  attention   q ─ Reshape [1,K,g·S,d] ─┐                        past_value ┐
     past_key ┐                        MatMul ─ Reshape [1,H,S,C+S] ─ +mask ─ Softmax ─ Reshape ─ MatMul ─ …
     new key  ┴ Concat ─ Transpose ────┘                  new value ┴ Concat ───────────────────────────────────┘

The queries of a group are rows of one product, so keys and values are never repeated. Embedding, mask and rotation come
from the host, which also writes the new keys and values into its cache. With integer activations every value passes
through Quantize- and DequantizeLinear on the grid of its key; values that are only moved share a key, hence a grid.
There keys, which an NPU may read at 8 bits, are also balanced: k / s and q · s channel by channel, behind the rotation;
and keys and values are split in two of 8 bits each, unless 8 are enough (`attend`).

Letters: S new positions, C slots of the cache, D hidden, H heads, K KV heads, g = H / K, d head_dim, V vocabulary;
for weights N out_features, K in_features.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tinycompress.errors import InputError
from tinycompress.graph.config import FINAL_NORM, HEAD, Layer, LayerNames, layer_names, layer_prefix
from tinycompress.graph.graph import Graph
from tinycompress.graph.quant_tensor import QuantTensor

from ..dynamic.attention import window_of
from ..dynamic.draw import Choices, Draw
from ..dynamic.emit import attention_layers
from ..profiles import Profile
from .activation_ranges import GRIDS, ActivationGrid, Activations
from .forms import FORMS, turns, windows
from .host import mask_name
from .weights import block_weight, channel_weight

if TYPE_CHECKING:
    import onnx_ir as ir

UNIT = 1 / 65536  # HTP's own step for sigmoid and softmax
MASK = "mask"
COS = "cos"
SIN = "sin"
MOVES = ("Reshape", "Transpose", "Slice", "Concat")
Points = dict[str, list["ir.Value"]]


def emit_static(graph: Graph, profile: Profile, length: int, activations: Activations | None = None) -> ir.Model:
    """The ONNX model of a graph made ready (`static_forms.make_ready`) for `length` new positions.

    Inputs, float32: hidden [1, S, D]; mask [1, 1, S, C + S], or mask_W for layers with a window W; cos, sin [1, 1, S,
    d/2]; past_key_j, past_value_j [1, K, C, d], j counting the layers that have attention. Outputs: logits [1, S, V];
    new_key_j, new_value_j [1, K, S, d].
    `activations`: integer ones, with the grid of every key (see `observed`); None draws float activations.
    """
    emitter = _Static(graph, profile, length, activations)
    emitter.draw_model()
    return emitter.draw.model()


def observed(
    graph: Graph, profile: Profile, length: int, key_scales: Mapping[str, Tensor]
) -> tuple[ir.Model, dict[str, str], dict[str, ir.Value]]:
    """The float model with every computed activation as an output; the key of each of these outputs; and by key the
    constants and inputs that need a grid. What is only moved has a key already, and so has the cache."""
    emitter = _Static(graph, profile, length, None)
    emitter.key_scales = key_scales
    emitter.draw_model()
    draw = emitter.draw
    named: dict[str, str] = {}
    given: dict[str, ir.Value] = {}
    for key, values in emitter.points.items():
        for value in values:
            node = value.producer()
            if node is None:
                given.setdefault(key, value)
            elif node.op_type not in MOVES and not emitter.fixed(key):
                if value not in draw.outputs:
                    value.name = f"point_{len(named)}"
                    value.dtype = draw.ir.DataType.FLOAT
                    draw.outputs.append(value)
                named[str(value.name)] = key
    return draw.model(), named, given


class _Static:
    """Draws one graph of fixed shapes. Methods append nodes and return the value they end in."""

    def __init__(self, graph: Graph, profile: Profile, length: int, activations: Activations | None) -> None:
        self.draw = Draw(graph, profile, Choices(accuracy_level=0))
        self.graph = graph
        self.config = graph.config
        self.profile = profile
        self.form = FORMS[profile.name]
        self.S = length
        self.C = graph.config.max_position
        self.grids: Mapping[str, ActivationGrid] | None = activations.grids if activations else None
        self.key_scales: Mapping[str, Tensor] = activations.key_scales if activations else {}
        self.attention_bits = activations.attention_bits if activations else None
        self.points: Points = {}  # activations by key
        self.count: Counter[tuple[str, str]] = Counter()  # nodes by key and kind
        self.host: dict[str, ir.Value] = {}  # mask, cos and sin, on their grids

    def draw_model(self) -> None:
        D = self.config.hidden_size
        S = self.S
        C = self.C
        half = self.config.head_dim // 2
        x = self.act(self.draw.input("hidden", "FLOAT", (1, S, D)), "hidden")
        if attention_layers(self.config):
            masks = [(mask_name(window), (1, 1, S, C + S)) for window in windows(self.config)]
            tables = [(name, (1, 1, S, half)) for name in (COS, SIN) if turns(self.config)]
            for name, sizes in (*masks, *tables):
                self.host[name] = self.act(self.draw.input(name, "FLOAT", sizes), name)
        caches: list[tuple[str, ir.Value, tuple[int, ...]]] = []
        for i, layer in enumerate(self.config.layers):
            at = layer_prefix(i)
            names = layer_names(i)
            if layer.n_heads:
                y = self.attention(names, self.norm(names.attention_norm, x), layer, caches)
                x = self.op(f"{at}.attention_sum", "Add", [x, y])
            if layer.ffn_dim:
                y = self.ffn(names, self.norm(names.ffn_norm, x))
                x = self.op(f"{at}.ffn_sum", "Add", [x, y])
        logits = self.linear(HEAD, self.norm(FINAL_NORM, x))
        self.draw.output("logits", logits, (1, S, self.config.vocab_size))
        for name, value, shape in caches:
            self.draw.output(name, value, shape)

    def norm(self, name: str, x: ir.Value, eps: float | None = None) -> ir.Value:
        """RMSNorm along the last axis of x, with `norm_eps` unless another is given."""
        eps = eps or self.config.norm_eps
        weight = self.act(self.draw.dense(f"{name}.weight"), f"{name}.weight")
        if self.form.fused_norm:
            return self.op(name, "RMSNormalization", [x, weight], axis=-1, epsilon=eps)
        axis = self.draw.constant("last_axis", torch.tensor([-1]))
        mean = self.op(f"{name}.mean", "ReduceMean", [self.op(f"{name}.square", "Mul", [x, x]), axis], keepdims=1)
        root = self.op(
            f"{name}.root",
            "Sqrt",
            [self.op(f"{name}.sum", "Add", [mean, self.number(f"norm_eps_{eps:g}", eps)])],
        )
        return self.op(name, "Mul", [self.op(f"{name}.unit", "Div", [x, root]), weight])

    def attention(
        self, names: LayerNames, x: ir.Value, layer: Layer, caches: list[tuple[str, ir.Value, tuple[int, ...]]]
    ) -> ir.Value:
        """Grouped-query attention behind the cache; the new keys and values are added to `caches`."""
        S = self.S
        C = self.C
        d = self.config.head_dim
        H = layer.n_heads
        K = layer.n_kv_heads
        slot = len(caches) // 2
        at = names.attention
        _, q = self.positioned(f"{at}.query", names.query, names.query_norm, self.heads(names.query, x, H), layer)
        key, new_keys = self.positioned(f"{at}.key", names.key, names.key_norm, self.heads(names.key, x, K), layer)
        new_values = self.heads(names.value, x, K)
        if at in self.key_scales:
            scales = self.key_scales[at]  # [K, d]
            key = f"{at}.key_balanced"
            q = self.op(
                f"{at}.query_scaled",
                "Mul",
                [q, self.table(f"{at}.query_scale", scales.repeat_interleave(layer.group, 0) * d**-0.5)],
            )
            new_keys = self.op(key, "Mul", [new_keys, self.table(f"{at}.key_scale", 1 / scales)])
        else:
            q = self.op(f"{at}.query_scaled", "Mul", [q, self.number("scale", d**-0.5)])
        keys = self.behind(f"past_key_{slot}", new_keys, key, K)
        values = self.behind(f"past_value_{slot}", new_values, names.value, K)
        caches += [(f"new_key_{slot}", new_keys, (1, K, S, d)), (f"new_value_{slot}", new_values, (1, K, S, d))]
        rows = self.reshape(q, f"{at}.query_scaled", (1, K, layer.group * S, d))
        scores = self.attend(f"{at}.scores", rows, self.transpose(keys, key, (0, 1, 3, 2)), key)
        scores = self.reshape(scores, f"{at}.scores", (1, H, S, C + S))
        mask = self.host[mask_name(window_of(self.config, layer))]
        probs = self.op(f"{at}.softmax", "Softmax", [self.op(f"{at}.masked", "Add", [scores, mask])], axis=-1)
        probs = self.reshape(probs, f"{at}.softmax", (1, K, layer.group * S, C + S))
        out = self.attend(f"{at}.heads", probs, values, names.value)
        out = self.transpose(self.reshape(out, f"{at}.heads", (1, H, S, d)), f"{at}.heads", (0, 2, 1, 3))
        return self.linear(names.output, self.reshape(out, f"{at}.heads", (1, S, H * d)))

    def attend(self, key: str, x: ir.Value, cached: ir.Value, cached_key: str) -> ir.Value:
        """x · cached, keys or values on the grid of `cached_key`. HTP reads the second factor at 8 bits, so where 16
        are wanted it comes as two: c = u8(cached), whose step is 257 of the grid's, and r = u8(cached - c), whose step
        is 2."""
        if self.grids is None or self.attention_bits == 8:
            return self.op(key, "MatMul", [x, cached])
        grid = self.grids[cached_key]
        at = f"{key}.second"
        coarse = self.on(cached, f"{at}.coarse", ActivationGrid(257 * grid.scale, round(grid.zero / 257), "uint8"))
        rest = self.draw.op(f"{at}.rest", "Sub", [cached, self.on(coarse, f"{at}.coarse16", grid)])
        # its grid reaches 327 steps: more than the coarse one's step
        rest = self.on(rest, f"{at}.rest16", ActivationGrid(grid.scale / 100, 32768, "uint16"))
        fine = self.on(rest, f"{at}.fine", ActivationGrid(2 * grid.scale, 128, "uint8"))
        return self.op(key, "Add", [self.op(key, "MatMul", [x, coarse]), self.op(key, "MatMul", [x, fine])])

    def heads(self, name: str, x: ir.Value, n: int) -> ir.Value:
        """A linear's output as heads, [1, n, S, d]."""
        y = self.reshape(self.linear(name, x), name, (1, self.S, n, self.config.head_dim))
        return self.transpose(y, name, (0, 2, 1, 3))

    def positioned(self, key: str, source: str, norm: str, x: ir.Value, layer: Layer) -> tuple[str, ir.Value]:
        """Heads [1, n, S, d] of the linear `source` normed and turned, as the layer has it, and the key of their
        grid."""
        if self.config.qk_norm_eps is not None:
            x = self.norm(norm, x, self.config.qk_norm_eps)
            source = norm
        if not layer.rope:
            return source, x
        return key, self.rotate(key, source, x)

    def rotate(self, key: str, source: str, x: ir.Value) -> ir.Value:
        """x [1, n, S, d] turned by the half-split rule; its own grid is that of `source`, where it comes from."""
        half = self.config.head_dim // 2
        a = self.slice(x, source, 0, half)
        b = self.slice(x, source, half, 2 * half)
        cos = self.host[COS]
        sin = self.host[SIN]
        products = [
            self.op(f"{key}.turned", "Mul", [half_x, table])
            for half_x, table in ((a, cos), (b, sin), (b, cos), (a, sin))
        ]
        first = self.op(key, "Sub", products[:2])
        second = self.op(key, "Add", products[2:])
        return self.op(key, "Concat", [first, second], axis=3)

    def behind(self, name: str, new: ir.Value, key: str, kv_heads: int) -> ir.Value:
        """The cache input [1, K, C, d] with the new positions behind it."""
        past = self.act(self.draw.input(name, "FLOAT", (1, kv_heads, self.C, self.config.head_dim)), key)
        return self.op(key, "Concat", [past, new], axis=2)

    def ffn(self, names: LayerNames, x: ir.Value) -> ir.Value:
        """down(silu(gate) · up)."""
        at = names.ffn
        gate = self.linear(names.gate, x)
        up = self.linear(names.up, x)
        silu = self.op(f"{at}.silu", "Mul", [gate, self.op(f"{at}.sigmoid", "Sigmoid", [gate])])
        return self.linear(names.down, self.op(f"{at}.mid", "Mul", [silu, up]))

    def linear(self, name: str, x: ir.Value) -> ir.Value:
        """x [1, S, K] to [1, S, N]."""
        weight = self.draw.entry(f"{name}.weight")
        bias = f"{name}.bias" in self.graph.weights
        key = f"{name}.product" if bias else name
        if not isinstance(weight, QuantTensor):
            y = self.op(key, "MatMul", [x, self.draw.dense(f"{name}.weight", transposed=True)])
        elif weight.scales.shape[1] == 1:
            y = self.op(key, "MatMul", [x, channel_weight(self.draw, f"{name}.weight", weight)])
        else:
            inputs, attributes = block_weight(self.draw, f"{name}.weight", weight)
            y = self.act(self.draw.op(name, "MatMulNBits", [x, *inputs], "com.microsoft", **attributes), key)
        if bias:
            y = self.op(name, "Add", [y, self.act(self.draw.dense(f"{name}.bias"), f"{name}.bias")])
        return y

    # Nodes ----------------------------------------------------------------------------------------------------------

    def op(self, key: str, kind: str, inputs: list[ir.Value], **attributes: Any) -> ir.Value:
        """A node whose output lies on the grid of `key`."""
        return self.act(self.draw.op(self.at(key, kind), kind, inputs, **attributes), key)

    def at(self, key: str, kind: str) -> str:
        """A node's name must be its own: the second of a kind with one key is numbered."""
        self.count[key, kind] += 1
        return key if self.count[key, kind] == 1 else f"{key}.{self.count[key, kind]}"

    def reshape(self, x: ir.Value, key: str, shape: tuple[int, ...]) -> ir.Value:
        return self.op(
            key, "Reshape", [x, self.draw.constant("shape_" + "_".join(map(str, shape)), torch.tensor(shape))]
        )

    def transpose(self, x: ir.Value, key: str, order: tuple[int, ...]) -> ir.Value:
        return self.op(key, "Transpose", [x], perm=order)

    def slice(self, x: ir.Value, key: str, start: int, stop: int) -> ir.Value:
        """Channels start … stop - 1 of the last of four axes."""
        ends = [self.draw.constant(f"at_{n}", torch.tensor([n])) for n in (start, stop, 3)]
        return self.op(key, "Slice", [x, *ends])

    def table(self, name: str, values: Tensor) -> ir.Value:
        """A number for each channel of each head, [n, d] as [1, n, 1, d]."""
        return self.act(self.draw.constant(name, values.float()[None, :, None].contiguous()), name)

    def number(self, name: str, value: float) -> ir.Value:
        return self.act(self.draw.constant(name, torch.tensor([value])), name)

    def act(self, x: ir.Value, key: str) -> ir.Value:
        """x on the grid of `key`; with float activations x itself, noted as a point that a grid would need."""
        if self.grids is None:
            self.points.setdefault(key, []).append(x)
            return x
        return self.on(x, key, self.grid(key))

    def on(self, x: ir.Value, key: str, grid: ActivationGrid) -> ir.Value:
        """x through a grid's integers and back; `key` names the grid's constants."""
        zero = torch.tensor(grid.zero, dtype=getattr(torch, grid.dtype))
        step = [self.draw.constant(f"{key}.step", torch.tensor(grid.scale)), self.draw.constant(f"{key}.zero", zero)]
        at = self.at(key, "QuantizeLinear")
        return self.draw.op(at, "DequantizeLinear", [self.draw.op(at, "QuantizeLinear", [x, *step]), *step])

    def fixed(self, key: str) -> bool:
        """Between 0 and 1, on a grid that the compiler prescribes."""
        return key.endswith((".softmax", ".sigmoid")) and self.form.activations == "uint16"

    def grid(self, key: str) -> ActivationGrid:
        assert self.grids is not None
        if self.fixed(key):
            return ActivationGrid(UNIT, 0, "uint16")
        if key not in self.grids:
            raise InputError(f"activation {key}", "no range", "the ranges of every activation (see observed)")
        grid = self.grids[key]
        if grid.dtype not in GRIDS or grid.dtype != self.form.activations:
            raise InputError(
                f"activation {key}", grid.dtype, f"{self.form.activations} for the {self.profile.name} profile"
            )
        return grid
