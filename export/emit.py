"""Graph → ONNX by a walk over the config: no tracing, no pattern matching, one function a subgraph.

  input_ids ─ embedding ─ x ─┬─ norm ─ q,k,v ─ GroupQueryAttention ─ o ─(+)─┬─ norm ─ gate,up ─ silu·mul ─ down ─(+)─ … ─ norm ─ head ─ logits
                             └──────────────────────────────────────────┘   └────────────────────────────────────┘
  attention_mask ─┬─ ReduceSum ─ Sub 1 ─ Cast ─ seqlens_k [B] ──────┐
                  └─ Shape ─ Gather 1 ─ Cast ─ total_sequence_length ┴─ every GroupQueryAttention

Operators: docs/ContribOperators.md of ONNX Runtime (GroupQueryAttention, MatMulNBits, GatherBlockQuantized,
SkipSimplifiedLayerNormalization, FusedMatMul) and standard ONNX. Activations are float32. Initializers carry the
parameters' names, so `read` gets the graph back. Weights are lazy: each is made when it is written, one at a time.

Letters: B batch, T new positions, S all positions, D hidden, H heads, K KV heads, d head_dim, F ffn, V vocabulary;
for packed weights N out_features, K in_features, b block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinycompress.config import layer_prefix
from tinycompress.errors import InputError
from tinycompress.graph import Config, Graph
from tinycompress.quantize import QuantTensor, pack

from .profiles import Profile

if TYPE_CHECKING:
    import onnx_ir as ir

MS = "com.microsoft"
DTYPES = ("auto", "float32")
LEVELS = (0, 1, 2, 3, 4)
EMBEDDING = "model.embed_tokens.weight"


def prepare(graph: Graph, dtype: str = "auto") -> Graph:
    """The graph as it will be exported: dense weights and scales in float32, lazily; `dtype="float32"` also turns
    packed weights into dense ones."""
    if dtype not in DTYPES:
        raise InputError("dtype", repr(dtype), " | ".join(DTYPES))
    packed = {n: w for n, w in graph.weights.entries.items() if isinstance(w, QuantTensor)}
    floats = graph.dense(torch.float32)
    if dtype == "float32" or not packed:
        return floats
    return floats.replace(weights={n: w.to(dtype=torch.float32) for n, w in packed.items()})  # the scales; integers are shared


def emit(graph: Graph, profile: Profile, dtype: str = "auto", accuracy_level: int = 4) -> ir.Model:
    """The ONNX model of a graph.

    Inputs: input_ids, attention_mask int64 [B, T] and [B, S]; past_key_values.{j}.key, .value float [B, K, S - T, d],
    j counting the layers that have attention. Outputs: logits float [B, T, V]; present.{j}.key, .value [B, K, S, d].
    """
    import onnx_ir as ir

    _check(graph.config, profile, accuracy_level)
    return _Emitter(ir, prepare(graph, dtype), profile, accuracy_level).model()


def features(graph: Graph, profile: Profile) -> set[str]:
    """What a prepared graph needs of the runtime beyond the base, as keys of `Profile.floors`."""
    packed = {n: w for n, w in graph.weights.entries.items() if isinstance(w, QuantTensor)}
    out = {f"bits_{profile.container(w.spec.bits)}" for w in packed.values()}
    return out | {"gather"} if EMBEDDING in packed else out


def attention_layers(config: Config) -> list[int]:
    """Indices of the layers that have attention: cache entry j belongs to the j-th of them."""
    return [i for i, layer in enumerate(config.layers) if layer.n_heads]


def _check(config: Config, profile: Profile, accuracy_level: int) -> None:
    rope = config.rope
    if rope.varies_with_length and config.max_position > (rope.original_max_position or 0):
        accepted = "default | linear | yarn | llama3 (one table serves every length), or a max_position of at most original_max_position"
        raise InputError("rope.type for export", repr(rope.type), accepted)
    if attention_layers(config) and config.head_dim % profile.head_dim_multiple:
        raise InputError("Config.head_dim", config.head_dim, f"a multiple of {profile.head_dim_multiple} for the {profile.name} profile")
    if accuracy_level not in LEVELS:
        raise InputError("accuracy_level", accuracy_level, f"{LEVELS}: 0 is the runtime's float arithmetic, 4 int8 activations")


class _Emitter:
    """Draws one graph. Every method appends nodes to the tape and returns the value they end in."""

    def __init__(self, ir: Any, graph: Graph, profile: Profile, accuracy_level: int) -> None:
        self.ir, self.graph, self.config = ir, graph, graph.config
        self.profile, self.accuracy_level = profile, accuracy_level
        self.tape = ir.tape.Tape()
        self.known: dict[str, ir.Value] = {}  # initializers by name
        self.inputs: list[ir.Value] = []
        self.outputs: list[ir.Value] = []

    def model(self) -> ir.Model:
        ids = self.input("input_ids", self.ir.DataType.INT64, ["batch_size", "sequence_length"])
        mask = self.input("attention_mask", self.ir.DataType.INT64, ["batch_size", "total_sequence_length"])
        lengths = self.lengths(mask) if attention_layers(self.config) else []
        x, residual, slot = self.embedding(ids), None, 0
        # x is what the last sublayer wrote, not yet added to `residual`: the next norm adds and normalises in one node
        for i, layer in enumerate(self.config.layers):
            at = layer_prefix(i)
            if layer.n_heads:
                n, residual = self.norm(f"{at}.input_layernorm", x, residual)
                x = self.attention(f"{at}.self_attn", n, lengths, slot, layer.n_heads, layer.n_kv_heads)
                slot += 1
            if layer.ffn_dim:
                n, residual = self.norm(f"{at}.post_attention_layernorm", x, residual)
                x = self.ffn(f"{at}.mlp", n)
        n, _ = self.norm("model.norm", x, residual)
        logits = self.output("logits", self.linear("lm_head", n), ["batch_size", "sequence_length", self.config.vocab_size])
        graph = self.ir.Graph(
            self.inputs,
            [logits, *self.outputs],
            nodes=self.tape.nodes,
            initializers=list(self.known.values()),
            opset_imports={"": self.profile.opset, **self.profile.domains},
            name="tinycompress",
        )
        return self.ir.Model(graph, ir_version=self.profile.ir_version, producer_name="tinycompress")

    def lengths(self, mask: ir.Value) -> list[ir.Value]:
        """seqlens_k int32 [B] = positions in use - 1, and total_sequence_length int32 []."""
        one, axis = self.constant("lengths.one", torch.tensor([1])), self.constant("lengths.axis", torch.tensor(1))
        int32 = int(self.ir.DataType.INT32)
        used = self.op("lengths", "ReduceSum", [mask, one], keepdims=0)
        last = self.op("lengths", "Cast", [self.op("lengths", "Sub", [used, one])], to=int32)
        total = self.op("lengths", "Gather", [self.op("lengths", "Shape", [mask]), axis], axis=0)
        return [last, self.op("lengths.total", "Cast", [total], to=int32)]

    def embedding(self, ids: ir.Value) -> ir.Value:
        """ids [B, T] to rows [B, T, D] of the table [V, D], dense or packed."""
        weight = self.entry(EMBEDDING)
        if not isinstance(weight, QuantTensor):
            return self.op("model.embed_tokens", "Gather", [self.dense(EMBEDDING), ids], axis=0)
        block = self.profile.block(EMBEDDING, *_groups(weight))
        if weight.shape[1] % block:
            raise InputError(EMBEDDING, f"{weight.shape[1]} packed columns", f"a multiple of {self.profile.min_block}, or a dense embedding")
        packed, scales, *zeros = self.packed(EMBEDDING, flat=not self.config.tie_embeddings)
        if self.config.tie_embeddings:  # one table for both ends: the head reads blocks, this reads rows (folded at load)
            packed = self.op("model.embed_tokens", "Reshape", [packed, self.constant("rows", torch.tensor([weight.shape[0], -1]))])
        attributes = {"bits": self.profile.container(weight.spec.bits), "block_size": block, "gather_axis": 0, "quantize_axis": 1}
        return self.op("model.embed_tokens", "GatherBlockQuantized", [packed, ids, scales, *zeros], MS, **attributes)

    def norm(self, name: str, x: ir.Value, residual: ir.Value | None) -> tuple[ir.Value, ir.Value]:
        """RMSNorm of residual + x, and that sum."""
        weight, eps = self.dense(f"{name}.weight"), self.config.norm_eps
        if residual is None:
            return self.op(name, "SimplifiedLayerNormalization", [x, weight], axis=-1, epsilon=eps, stash_type=1), x
        outs = self.ops(name, "SkipSimplifiedLayerNormalization", [residual, x, weight], 4, MS, epsilon=eps)
        return outs[0], outs[3]

    def attention(self, at: str, x: ir.Value, lengths: list[ir.Value], slot: int, heads: int, kv_heads: int) -> ir.Value:
        """Grouped-query attention with the rotation, the cache and the causal mask inside one operator."""
        d = self.config.head_dim
        q, k, v = (self.linear(f"{at}.{n}_proj", x) for n in "qkv")
        past, present = (("batch_size", kv_heads, length, d) for length in ("past_sequence_length", "total_sequence_length"))
        caches = [self.input(f"past_key_values.{slot}.{kind}", self.ir.DataType.FLOAT, past) for kind in ("key", "value")]
        y, *new = self.ops(
            at,
            "GroupQueryAttention",
            [q, k, v, *caches, *lengths, *self.rope()],
            3,
            MS,
            num_heads=heads,
            kv_num_heads=kv_heads,
            do_rotary=1,
            rotary_interleaved=0,
            scale=d**-0.5,
        )
        self.outputs += [self.output(f"present.{slot}.{kind}", value, present) for kind, value in zip(("key", "value"), new)]
        return self.linear(f"{at}.o_proj", y)

    def rope(self) -> list[ir.Value]:
        """cos and sin [max_position, d/2], whatever the scaling: runtimes need not know the method."""
        if "rope.cos" not in self.known:
            for name, table in zip(("rope.cos", "rope.sin"), self.config.rope.tables(self.config.head_dim, self.config.max_position)):
                self.constant(name, table)
        return [self.known["rope.cos"], self.known["rope.sin"]]

    def ffn(self, at: str, x: ir.Value) -> ir.Value:
        """down(silu(gate) · up); the runtime fuses x · sigmoid(x)."""
        gate, up = self.linear(f"{at}.gate_proj", x), self.linear(f"{at}.up_proj", x)
        silu = self.op(f"{at}.silu", "Mul", [gate, self.op(at, "Sigmoid", [gate])])
        return self.linear(f"{at}.down_proj", self.op(at, "Mul", [silu, up]))

    def linear(self, name: str, x: ir.Value) -> ir.Value:
        """x [B, T, K] to [B, T, N]."""
        weight_name = self.config.weight_name(name)
        weight = self.entry(weight_name)
        if isinstance(weight, QuantTensor):
            (N, K), bits, block = weight.shape, self.profile.container(weight.spec.bits), self.profile.block(name, *_groups(weight))
            attributes = {"K": K, "N": N, "bits": bits, "block_size": block, "accuracy_level": self.accuracy_level}
            y = self.op(name, "MatMulNBits", [x, *self.packed(weight_name)], MS, **attributes)
        elif weight_name == EMBEDDING:  # the table is stored once, as [V, D]; as fast as a transposed copy, and no bigger
            y = self.op(name, "FusedMatMul", [x, self.dense(EMBEDDING)], MS, transB=1)
        else:
            y = self.op(name, "MatMul", [x, self.dense(weight_name, transposed=True)])
        if f"{name}.bias" in self.graph.weights:
            y = self.op(name, "Add", [y, self.dense(f"{name}.bias")])
        return y

    # Initializers ---------------------------------------------------------------------------------------------------

    def entry(self, name: str) -> Any:
        """A parameter's entry: packed, or dense and not yet read."""
        return self.graph.weights.entries[name]

    def dense(self, name: str, transposed: bool = False) -> ir.Value:
        """A float32 parameter; matrices of linears are stored [K, N]."""
        shape = tuple(self.entry(name).shape)
        if transposed:
            return self.lazy(name, torch.float32, shape[::-1], lambda: self.graph.weights[name].T)
        return self.lazy(name, torch.float32, shape, partial(self.graph.weights.__getitem__, name))

    def packed(self, name: str, flat: bool = False) -> list[ir.Value]:
        """A packed parameter as uint8 [N, blocks, bytes] (or [N, blocks · bytes]), scales float [N, blocks] and, when
        asymmetric, zero points uint8 [N, ⌈blocks · bits / 8⌉]."""
        weight: QuantTensor = self.entry(name)
        bits, (group, K) = self.profile.container(weight.spec.bits), _groups(weight)
        block = self.profile.block(name, group, K)
        N, blocks, width = weight.shape[0], -(-K // block), block * bits // 8
        repeats = -(-group // block)
        shape = (N, blocks * width) if flat else (N, blocks, width)
        values = [
            self.lazy(f"{name}.packed", torch.uint8, shape, lambda: _blocks(weight, bits, blocks * width).reshape(shape)),
            self.lazy(f"{name}.scales", torch.float32, (N, blocks), lambda: weight.scales.repeat_interleave(repeats, 1)),
        ]
        if weight.zeros is not None:
            zeros, nbytes = weight.zeros, -(-blocks * bits // 8)
            values.append(self.lazy(f"{name}.zeros", torch.uint8, (N, nbytes), lambda: pack(zeros.repeat_interleave(repeats, 1), bits)[:, :nbytes]))
        return values

    def constant(self, name: str, tensor: Tensor) -> ir.Value:
        return self.lazy(name, tensor.dtype, tuple(tensor.shape), lambda: tensor)

    def lazy(self, name: str, dtype: torch.dtype, shape: tuple[int, ...], read: Callable[[], Tensor]) -> ir.Value:
        """An initializer whose bytes are made when they are written, and not kept."""
        if name not in self.known:
            kind = {torch.float32: self.ir.DataType.FLOAT, torch.uint8: self.ir.DataType.UINT8, torch.int64: self.ir.DataType.INT64}[dtype]
            tensor = self.ir.LazyTensor(
                lambda: self.ir.Tensor(read().detach().cpu().contiguous().numpy(), name=name), kind, self.ir.Shape(shape), name=name
            )
            self.known[name] = self.ir.val(name, kind, shape, const_value=tensor)
        return self.known[name]

    # Nodes ----------------------------------------------------------------------------------------------------------

    def op(self, at: str, kind: str, inputs: list[ir.Value], domain: str = "", **attributes: Any) -> ir.Value:
        return self.ops(at, kind, inputs, 1, domain, **attributes)[0]

    def ops(self, at: str, kind: str, inputs: list[ir.Value], n: int, domain: str = "", **attributes: Any) -> list[ir.Value]:
        """A node named after the module it belongs to."""
        return list(self.tape.op_multi_out(kind, inputs, attributes, num_outputs=n, domain=domain, name=f"{at}/{kind}"))

    def input(self, name: str, dtype: Any, shape: Sequence[str | int]) -> ir.Value:
        self.inputs.append(self.ir.val(name, dtype, shape))
        return self.inputs[-1]

    def output(self, name: str, value: ir.Value, shape: Sequence[str | int]) -> ir.Value:
        value.name, value.dtype, value.shape = name, self.ir.DataType.FLOAT, self.ir.Shape(shape)
        return value


def _groups(weight: QuantTensor) -> tuple[int, int]:
    """Group length and in_features."""
    return weight.shape[1] // weight.scales.shape[1], weight.shape[1]


def _blocks(weight: QuantTensor, bits: int, nbytes: int) -> Tensor:
    """uint8 [N, nbytes]: the packed integers as they are, 3-bit ones in 4-bit containers, padded to whole blocks."""
    packed = weight.packed
    if bits != weight.spec.bits:
        shift = 2 ** (bits - 1) - weight.spec.zero if weight.zeros is None else 0  # the container's zero is implied, so it moves
        packed = pack(weight.ints().reshape(*weight.scales.shape, -1) + shift, bits)
    rows = packed.flatten(1)[:, :nbytes]
    return F.pad(rows, (0, nbytes - rows.shape[1]))
