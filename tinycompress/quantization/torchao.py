"""torchao both ways: packed weights as its tensor subclasses and back, and its fake-quantizers as a view to train.

torchao's IntxUnpackedToInt8Tensor holds signed integers, one a byte, of 1 to 8 bits in groups along a row, with a scale
and a zero point each; it runs on any device and exports with torch.export. A QuantTensor's q in 0 … 2^b - 1 is q - 2^(b-1)
there, and its zero point likewise, so both name the same weight: w = (q - z) · s.

`fake_quant_module` trains through torchao's IntxFakeQuantizer. Its symmetric grid is not find_grid's: s is
max|w| / (2^(b-1) - ½) a group, found again in every forward. `packed_graph` packs on that very grid, so the packed
graph computes what the training's forward did. (The distillation pass trains on this library's grids: fake_quant.py.)
Letters: N out_features, K in_features, g group_size, G = K / g groups.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..graph.graph import Graph, Weight
from ..graph.quant_tensor import BITS, QuantSpec, QuantTensor
from ..graph.topology import feeds
from ..model.linear import QuantLinear
from .linear_specs import targets

if TYPE_CHECKING:
    from torchao.quantization import IntxUnpackedToInt8Tensor

    from ..model.transformer import Transformer

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def to_torchao(weight: QuantTensor, dtype: torch.dtype | None = None) -> IntxUnpackedToInt8Tensor:
    """A packed weight [N, K] as torchao's tensor of the same integers, in `dtype` (the scales' by default) when computed
    with. Eight times the memory of 1 bit a byte: it is for computing and exporting, not for keeping."""
    from torchao.quantization import IntxUnpackedToInt8Tensor

    dtype, spec = dtype or weight.dtype, weight.grid
    if dtype not in FLOATS:
        raise InputError("dtype for torchao", dtype, " | ".join(map(str, FLOATS)))
    if spec.float_zero:
        raise InputError("a weight for torchao", str(spec), "integer zero points, or none")
    q = (weight.ints().to(torch.int16) - spec.zero).to(torch.int8)
    zeros = (
        torch.zeros_like(weight.scales, dtype=torch.int8)
        if weight.zeros is None
        else (weight.zeros.to(torch.int16) - spec.zero).to(torch.int8)
    )
    block = (1, weight.shape[1] // weight.scales.shape[1])
    return IntxUnpackedToInt8Tensor(
        q, weight.scales.to(dtype), zeros, getattr(torch, f"int{spec.bits}"), block, dtype, None
    )


def from_torchao(tensor: Any, name: str = "weight") -> QuantTensor:
    """The inverse: a weight [N, K] that torchao quantized (IntxWeightOnlyConfig) as a QuantTensor of the same integers."""
    from torchao.quantization import IntxUnpackedToInt8Tensor

    if not isinstance(tensor, IntxUnpackedToInt8Tensor):
        raise InputError(
            name, f"a {type(tensor).__name__}", "torchao's IntxUnpackedToInt8Tensor (IntxWeightOnlyConfig)"
        )
    bits = int(str(tensor.target_dtype).removeprefix("torch.int"))
    K = tensor.shape[1]
    rows, g = tensor.block_size
    if (
        bits not in BITS
        or rows != 1
        or tensor.zero_point.dtype != torch.int8
        or tensor.activation_quantization is not None
    ):
        found = f"{bits} bits in blocks of {rows} × {g}, {tensor.zero_point.dtype} zero points, activations {tensor.activation_quantization}"
        raise InputError(name, found, f"{BITS} bits, groups along a row, int8 zero points, float activations")
    symmetric = not tensor.zero_point.any()
    spec = QuantSpec(bits, None if g == K else g, symmetric)
    zeros = None if symmetric else (tensor.zero_point.to(torch.int16) + spec.zero).to(torch.uint8)
    return QuantTensor.from_ints((tensor.qdata.to(torch.int16) + spec.zero).to(torch.uint8), tensor.scale, zeros, spec)


def torchao_module(
    graph: Graph, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> Transformer:
    """The graph as a module whose packed linears are plain nn.Linear with torchao's tensors as weights. A packed embedding
    (and a head tied to it) stays as it is: torchao's tensor has no row look-up."""
    module = graph.module(device, dtype)
    for feed in feeds(graph.config):
        for name in feed.readers:
            packed = module.get_submodule(name)
            if not isinstance(packed, QuantLinear) or graph.config.weight_name(name) != f"{name}.weight":
                continue
            linear = nn.Linear(packed.in_features, packed.out_features, bias=packed.bias is not None, device="meta")
            linear.weight = nn.Parameter(to_torchao(packed.weight, module.dtype), requires_grad=False)
            if packed.bias is not None:
                linear.bias = packed.bias
            _replace(module, name, linear)
    return module


def fake_quant_module(graph: Graph, spec: QuantSpec) -> Transformer:
    """A trainable copy of a dense graph whose linears (the head aside) see their weights through torchao's fake-quantizer;
    gradients pass straight through the rounding."""
    from torchao.quantization.qat import FakeQuantizedLinear, IntxFakeQuantizeConfig

    if not spec.symmetric:
        raise InputError("fake_quant_module", str(spec), "a symmetric grid")
    names = targets(graph, spec)
    module = graph.replace(weights={name: graph.tensor(name).clone() for name in graph.weights}).module()
    module.requires_grad_(True).train()
    for name in names:
        linear: Any = module.get_submodule(name)
        config = IntxFakeQuantizeConfig(
            getattr(torch, f"int{spec.bits}"),
            group_size=spec.group(name, linear.in_features),
            is_symmetric=True,
            scale_precision=linear.weight.dtype,
        )
        _replace(module, name, FakeQuantizedLinear.from_linear(linear, weight_config=config))
    return module


def packed_graph(graph: Graph, module: Transformer, spec: QuantSpec) -> Graph:
    """`graph` with the weights that `module` (of `fake_quant_module`) was trained to: its linears packed on torchao's grid."""
    packed = set(targets(graph, spec))
    changed: dict[str, Weight] = {}
    parameters = dict(module.named_parameters())
    for name in graph.weights:
        weight = parameters[name].detach()
        owner = name.removesuffix(".weight")
        changed[name] = _pack(owner, module.get_submodule(owner), weight, spec) if owner in packed else weight.clone()
    return graph.replace(weights=changed)


def _pack(name: str, linear: Any, weight: Tensor, spec: QuantSpec) -> QuantTensor:
    """The integers of torchao's fake-quantizer for a weight [N, K], by its own scales [N, G] for that weight."""
    quantizer = linear.weight_fake_quantizer
    with torch.no_grad():
        seen = quantizer(weight)  # finds the scales again: the optimizer has moved the weight since
    scales = quantizer.scale.reshape(weight.shape[0], -1).to(weight.dtype)
    q = (seen.reshape(*scales.shape, -1) / scales[..., None]).round_().add_(spec.zero).clamp_(0, 2**spec.bits - 1)
    return QuantTensor.from_ints(q.to(torch.uint8).reshape(weight.shape), scales, None, spec)


def _replace(module: nn.Module, name: str, child: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, child)
