"""torchao both ways: packed weights as its tensor subclasses and back, and its fake-quantizers as a view to train.

torchao's IntxUnpackedToInt8Tensor holds signed integers of 1 to 8 bits, one per byte, in groups along a row, with a
scale and a zero point each; it runs on any device and exports with torch.export. A QuantTensor's q in 0 … 2^b - 1 is q
- 2^(b-1) there, and its zero point likewise, so both name the same weight: w = (q - z) · s.

`fake_quant_module` trains through torchao's IntxFakeQuantizer. Its symmetric grid is not find_grid's: s is
max|w| / (2^(b-1) - ½) of each group, found again in every forward. `packed_graph` packs on that very grid, so the
packed graph computes what the training's forward did. (The distillation pass trains on this library's grids:
fake_quant.py.)

Letters: N out_features, K in_features, G groups of g = K / G inputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import InputError, need
from ..graph.graph import Graph, Weight
from ..graph.quant_tensor import BITS, Grid, QuantSpec, QuantTensor
from ..model.linear import QuantLinear
from .linear_specs import Spec, targets

if TYPE_CHECKING:
    from torchao.quantization import IntxUnpackedToInt8Tensor

    from ..model.transformer import Transformer

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def to_torchao(weight: QuantTensor, dtype: torch.dtype | None = None) -> IntxUnpackedToInt8Tensor:
    """A packed weight [N, K] as torchao's tensor of the same integers.

    It takes a byte per integer whatever its bits: it is for computing and exporting, not for keeping.

    Arguments:
        dtype: what it computes in: float32, float16 or bfloat16. None: that of the scales.

    Errors: an `InputError` for another dtype and for float zero points.
    """
    need("torchao", "quantize")
    from torchao.quantization import IntxUnpackedToInt8Tensor

    dtype = dtype or weight.dtype
    grid = weight.grid
    if dtype not in FLOATS:
        raise InputError("dtype for torchao", dtype, " | ".join(map(str, FLOATS)))
    if grid.float_zero:
        raise InputError("a weight for torchao", str(grid), "integer zero points, or none")
    q = (weight.ints().to(torch.int16) - grid.zero).to(torch.int8)
    if weight.zeros is None:
        zeros = torch.zeros_like(weight.scales, dtype=torch.int8)
    else:
        zeros = (weight.zeros.to(torch.int16) - grid.zero).to(torch.int8)
    block = (1, weight.shape[1] // weight.scales.shape[1])
    kind = getattr(torch, f"int{grid.bits}")
    return IntxUnpackedToInt8Tensor(q, weight.scales.to(dtype), zeros, kind, block, dtype, None)


def from_torchao(tensor: Any, name: str = "weight") -> QuantTensor:
    """The inverse: a weight [N, K] that torchao quantized (IntxWeightOnlyConfig) as a QuantTensor of the same
    integers."""
    need("torchao", "quantize")
    from torchao.quantization import IntxUnpackedToInt8Tensor

    if not isinstance(tensor, IntxUnpackedToInt8Tensor):
        accepted = "torchao's IntxUnpackedToInt8Tensor (IntxWeightOnlyConfig)"
        raise InputError(name, f"a {type(tensor).__name__}", accepted)
    bits = int(str(tensor.target_dtype).removeprefix("torch.int"))
    K = tensor.shape[1]
    rows, g = tensor.block_size
    zero_dtype = tensor.zero_point.dtype
    activations = tensor.activation_quantization
    if bits not in BITS or rows != 1 or zero_dtype != torch.int8 or activations is not None:
        found = f"{bits} bits in blocks of {rows} × {g}, {zero_dtype} zero points, activations {activations}"
        raise InputError(name, found, f"{BITS} bits, groups along a row, int8 zero points, float activations")
    symmetric = not tensor.zero_point.any()
    grid = Grid(bits, None if g == K else g, symmetric)
    zeros = None if symmetric else (tensor.zero_point.to(torch.int16) + grid.zero).to(torch.uint8)
    return QuantTensor.from_ints((tensor.qdata.to(torch.int16) + grid.zero).to(torch.uint8), tensor.scale, zeros, grid)


def torchao_module(
    graph: Graph, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> Transformer:
    """The graph as a module whose packed linears are plain nn.Linear with torchao's tensors as weights. A packed
    embedding (and a head tied to it) stays as it is: torchao's tensor has no row look-up."""
    module = graph.module(device, dtype)
    for linear in graph.config.linears():
        packed = module.get_submodule(linear.name)
        tied = linear.weight != f"{linear.name}.weight"
        if not isinstance(packed, QuantLinear) or tied:
            continue
        replacement = nn.Linear(packed.in_features, packed.out_features, bias=packed.bias is not None, device="meta")
        replacement.weight = nn.Parameter(to_torchao(packed.weight, module.dtype), requires_grad=False)
        if packed.bias is not None:
            replacement.bias = packed.bias
        module.replace_linear(linear.name, replacement)
    return module


def fake_quant_module(graph: Graph, spec: Spec) -> Transformer:
    """A trainable copy of a dense graph whose linears (the head aside) see their weights through torchao's
    fake-quantizer; gradients pass straight through the rounding. `spec` is symmetric."""
    need("torchao", "quantize")
    from torchao.quantization.qat import FakeQuantizedLinear, IntxFakeQuantizeConfig

    spec = QuantSpec.of(spec)
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
        module.replace_linear(name, FakeQuantizedLinear.from_linear(linear, weight_config=config))
    return module


def packed_graph(graph: Graph, module: Transformer, spec: Spec) -> Graph:
    """`graph` with the weights that `module` (of `fake_quant_module`) was trained to: its linears packed on torchao's
    grid."""
    spec = QuantSpec.of(spec)
    packed = set(targets(graph, spec))
    changed: dict[str, Weight] = {}
    parameters = dict(module.named_parameters())
    for name in graph.weights:
        weight = parameters[name].detach()
        owner = name.removesuffix(".weight")
        changed[name] = _pack(module.get_submodule(owner), weight, spec) if owner in packed else weight.clone()
    return graph.replace(weights=changed)


def _pack(linear: Any, weight: Tensor, grid: Grid) -> QuantTensor:
    """The integers of torchao's fake-quantizer for a weight [N, K], by its own scales [N, G] for that weight."""
    quantizer = linear.weight_fake_quantizer
    with torch.no_grad():
        seen = quantizer(weight)  # finds the scales again: the optimizer has moved the weight since
    scales = quantizer.scale.reshape(weight.shape[0], -1).to(weight.dtype)
    q = (seen.reshape(*scales.shape, -1) / scales[..., None]).round_().add_(grid.zero).clamp_(0, 2**grid.bits - 1)
    return QuantTensor.from_ints(q.to(torch.uint8).reshape(weight.shape), scales, None, grid)
