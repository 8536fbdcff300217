"""The drawing board of an emitter: nodes, inputs, outputs, and initializers whose bytes are made when they are written.

A form (`forms_contrib`, `forms_standard`) draws with it; it knows names and tensors and nothing of what they mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tinycompress.errors import need
from tinycompress.graph.graph import Graph
from tinycompress.graph.quant_tensor import QuantTensor

from ..profiles import Profile

if TYPE_CHECKING:
    import onnx_ir as ir

ONNX_TYPES = {
    torch.float32: "FLOAT",
    torch.float16: "FLOAT16",
    torch.uint8: "UINT8",
    torch.int8: "INT8",
    torch.int64: "INT64",
    torch.bool: "BOOL",
    torch.uint16: "UINT16",
}


@dataclass(frozen=True)
class Choices:
    """What a caller may choose within a profile.

    Fields:
        accuracy_level: that of quantized products in ONNX Runtime. Default 4: int8 arithmetic.
        half_scales: whether scales are stored as float16; a graph prepared so holds no other values. Default False:
            float32.
        kv_scales: those of an int8 cache, as `kv_cache.cache_scales` gives them. Default empty: a float cache.
    """

    accuracy_level: int = 4
    half_scales: bool = False
    kv_scales: Mapping[str, Tensor] = field(default_factory=dict)


class Draw:
    """Draws one graph. Every method appends nodes to the tape and returns the value they end in."""

    def __init__(self, graph: Graph, profile: Profile, choices: Choices) -> None:
        need("onnx_ir", "export")
        import onnx_ir as ir

        self.ir = ir
        self.graph = graph
        self.config = graph.config
        self.profile = profile
        self.choices = choices
        self.tape = ir.tape.Tape()
        self.known: dict[str, ir.Value] = {}  # initializers by name
        self.shared: dict[str, ir.Value] = {}  # computed values that several readers share
        self.inputs: list[ir.Value] = []
        self.outputs: list[ir.Value] = []

    def model(self) -> ir.Model:
        """What was drawn: every input, output and initializer in the order of its making."""
        graph = self.ir.Graph(
            self.inputs,
            self.outputs,
            nodes=self.tape.nodes,
            initializers=list(self.known.values()),
            opset_imports={"": self.profile.opset, **self.profile.domains},
            name="tinycompress",
        )
        return self.ir.Model(graph, ir_version=self.profile.ir_version, producer_name="tinycompress")

    # Initializers ---------------------------------------------------------------------------------------------------

    def entry(self, name: str) -> Any:
        """A parameter's entry: packed, or dense and not yet read."""
        return self.graph.weights.entries[name]

    def joins(self, linears: Sequence[str]) -> bool:
        """Whether linears of one input become one product: the profile wants it and they are packed on one grid."""
        weights = [self.entry(f"{name}.weight") for name in linears]
        if not self.profile.joins or not all(isinstance(w, QuantTensor) for w in weights):
            return False
        with_bias = {f"{name}.bias" in self.graph.weights for name in linears}
        return len({weight.grid for weight in weights}) == 1 and len(with_bias) == 1

    def dense(self, name: str, transposed: bool = False) -> ir.Value:
        """A float32 parameter; matrices of linears are stored [K, N]."""
        shape = tuple(self.entry(name).shape)
        if transposed:
            return self.lazy(name, torch.float32, shape[::-1], lambda: self.graph.tensor(name).T)
        return self.lazy(name, torch.float32, shape, partial(self.graph.tensor, name))

    def dense_rows(self, name: str, parts: Sequence[str]) -> ir.Value:
        """float32 parameters one below the other, as one."""
        shape = (sum(self.entry(part).shape[0] for part in parts), *self.entry(parts[0]).shape[1:])
        return self.lazy(
            name, torch.float32, tuple(shape), lambda: torch.cat([self.graph.tensor(part) for part in parts])
        )

    def scales(self, name: str, shape: tuple[int, ...], read: Callable[[], Tensor]) -> ir.Value:
        """Quantization scales, float32 to the reader; stored as float16 they are widened when the model is loaded."""
        if not self.choices.half_scales:
            return self.lazy(name, torch.float32, shape, read)
        widened = f"{name}.wide"
        if widened not in self.shared:
            stored = self.lazy(name, torch.float16, shape, lambda: read().half())
            self.shared[widened] = self.op(name, "Cast", [stored], to=int(self.ir.DataType.FLOAT))
        return self.shared[widened]

    def rope(self) -> list[ir.Value]:
        """cos and sin [max_position, d/2], whatever the scaling: runtimes need not know the method."""
        if "rope.cos" not in self.known:
            for name, table in zip(
                ("rope.cos", "rope.sin"), self.config.rope.tables(self.config.head_dim, self.config.max_position)
            ):
                self.constant(name, table)
        return [self.known["rope.cos"], self.known["rope.sin"]]

    def constant(self, name: str, tensor: Tensor) -> ir.Value:
        return self.lazy(name, tensor.dtype, tuple(tensor.shape), lambda: tensor)

    def lazy(self, name: str, dtype: torch.dtype, shape: tuple[int, ...], read: Callable[[], Tensor]) -> ir.Value:
        """An initializer whose bytes are made when they are written, and not kept."""
        return self._initializer(name, ONNX_TYPES[dtype], shape, lambda kind: self.ir.Tensor(_numpy(read()), name=name))

    def lazy_nibbles(self, name: str, signed: bool, shape: tuple[int, ...], read: Callable[[], Tensor]) -> ir.Value:
        """An INT4 or UINT4 initializer; `read` gives its bytes, two values each, the first in the low half."""
        kind = "INT4" if signed else "UINT4"
        return self._initializer(
            name,
            kind,
            shape,
            lambda kind: self.ir.PackedTensor(_numpy(read()).reshape(-1), kind, shape=shape, name=name),
        )

    def _initializer(self, name: str, kind: str, shape: tuple[int, ...], make: Callable[[Any], Any]) -> ir.Value:
        if name not in self.known:
            dtype = self.ir.DataType[kind]
            tensor = self.ir.LazyTensor(lambda: make(dtype), dtype, self.ir.Shape(shape), name=name)
            self.known[name] = self.ir.val(name, dtype, shape, const_value=tensor)
        return self.known[name]

    # Nodes ----------------------------------------------------------------------------------------------------------

    def op(
        self, at: str, kind: str, inputs: Sequence[ir.Value | None], domain: str = "", **attributes: Any
    ) -> ir.Value:
        return self.ops(at, kind, inputs, 1, domain, **attributes)[0]

    def ops(
        self, at: str, kind: str, inputs: Sequence[ir.Value | None], n: int, domain: str = "", **attributes: Any
    ) -> list[ir.Value]:
        """A node named after the module it belongs to."""
        return list(self.tape.op_multi_out(kind, inputs, attributes, num_outputs=n, domain=domain, name=f"{at}/{kind}"))

    def input(self, name: str, kind: str, shape: Sequence[str | int]) -> ir.Value:
        self.inputs.append(self.ir.val(name, self.ir.DataType[kind], shape))
        return self.inputs[-1]

    def output(self, name: str, value: ir.Value, shape: Sequence[str | int], kind: str = "FLOAT") -> None:
        value.name = name
        value.dtype = self.ir.DataType[kind]
        value.shape = self.ir.Shape(shape)
        self.outputs.append(value)


def _numpy(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().numpy()
