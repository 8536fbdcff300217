"""Rewrites of an exported graph that benchmarks/decode_forms.py measures."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

MS = "com.microsoft"


class Rewriter:
    """Replaces nodes of a model in memory."""

    def __init__(self, model: Any) -> None:
        self.graph = model.graph
        self.made = {output: node for node in self.graph.node for output in node.output}
        self.stored = {tensor.name: tensor for tensor in self.graph.initializer}

    def joined(self, nodes: list[Any], name: str) -> Any:
        """One MatMulNBits in the place of several of one input: integers and scales one below the other."""
        first = nodes[0]
        inputs = [first.input[0]]
        for i in range(1, len(first.input)):
            rows = np.concatenate([numpy_helper.to_array(self.stored[node.input[i]]) for node in nodes])
            self.graph.initializer.append(numpy_helper.from_array(rows, f"{name}.{i}"))
            inputs.append(f"{name}.{i}")
        new = helper.make_node("MatMulNBits", inputs, [name], name=name, domain=MS)
        new.attribute.extend(first.attribute)
        attribute(new, "N").i = sum(attribute(node, "N").i for node in nodes)
        self.place(new, first)
        for node in nodes:
            self.graph.node.remove(node)
            for used in node.input[1:]:
                self.graph.initializer.remove(self.stored[used])
        return new

    def place(self, new: Any, before: Any) -> None:
        self.graph.node.insert(list(self.graph.node).index(before), new)


def attribute(node: Any, name: str) -> Any:
    return next(a for a in node.attribute if a.name == name)


def join_qkv(model: Any) -> None:
    """q, k and v in one product, which GroupQueryAttention reads packed."""
    rewriter = Rewriter(model)
    for node in [n for n in model.graph.node if n.op_type == "GroupQueryAttention"]:
        new = rewriter.joined([rewriter.made[x] for x in node.input[:3]], f"{node.name}.qkv")
        node.input[0], node.input[1], node.input[2] = new.output[0], "", ""


def gates(rewriter: Rewriter) -> list[tuple[Any, Any, Any, Any, Any]]:
    """(gate, up, sigmoid, gate · sigmoid, silu · up) of every FFN."""
    out = []
    for sigmoid in [n for n in rewriter.graph.node if n.op_type == "Sigmoid"]:
        silu = next(n for n in rewriter.graph.node if sigmoid.output[0] in n.input)
        product = next(n for n in rewriter.graph.node if silu.output[0] in n.input)
        up = next(x for x in product.input if x != silu.output[0])
        out.append((rewriter.made[sigmoid.input[0]], rewriter.made[up], sigmoid, silu, product))
    return out


def join_gate_up(model: Any) -> None:
    """gate and up in one product behind which Split parts them."""
    rewriter = Rewriter(model)
    for gate, up, sigmoid, *_ in gates(rewriter):
        names = [gate.output[0], up.output[0]]
        new = rewriter.joined([gate, up], f"{gate.name}.up")
        rewriter.place(
            helper.make_node("Split", [new.output[0]], names, axis=-1, num_outputs=2, name=f"{gate.name}.split"),
            sigmoid,
        )


def swiglu(model: Any) -> None:
    """gate and up in one product, and silu(gate) · up in one operator."""
    rewriter = Rewriter(model)
    for gate, up, sigmoid, silu, product in gates(rewriter):
        new = rewriter.joined([gate, up], f"{gate.name}.up")
        one = helper.make_node("SwiGLU", [new.output[0]], list(product.output), domain=MS, name=f"{gate.name}.swiglu")
        rewriter.place(one, product)
        for node in (sigmoid, silu, product):
            model.graph.node.remove(node)


def join_both(model: Any) -> None:
    join_qkv(model)
    join_gate_up(model)


def join_swiglu(model: Any) -> None:
    join_qkv(model)
    swiglu(model)


def int8_cache(model: Any) -> None:
    """Keys and values as int8 with one scale a tensor."""
    model.graph.initializer.append(numpy_helper.from_array(np.array([0.02], np.float32), "kv.scale"))
    for node in model.graph.node:
        if node.op_type == "GroupQueryAttention":
            node.input.extend([""] * (12 - len(node.input)) + ["kv.scale", "kv.scale"])
            for name, value in (
                ("k_quant_type", "PER_TENSOR"),
                ("v_quant_type", "PER_TENSOR"),
                ("kv_cache_bit_width", 8),
            ):
                node.attribute.append(helper.make_attribute(name, value))
    for value in (*model.graph.input, *model.graph.output):
        if "past_key_values" in value.name or "present" in value.name:
            value.type.tensor_type.elem_type = onnx.TensorProto.INT8
