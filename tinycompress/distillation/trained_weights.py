"""Which weights of a network learn, and the way back from a trained network to the weights of a graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from ..graph.graph import Graph, LazyTensor, Weight
from ..graph.quant_tensor import QuantSpec, QuantTensor
from ..quantization.fake_quant import learned_scales, packed
from .distributed import full_tensor
from .lora import LoRA, merge
from .stable_embedding import stable_rows
from .student import Network


def matching(names: Iterable[str], patterns: Sequence[str]) -> set[str]:
    """The parameters that `patterns` name: by their own name, or by that of a module that they belong to.

    A pattern is as in a shell: "*" is any text, dots included. One that names nothing is an InputError.
    """
    names = list(names)
    out: set[str] = set()
    for pattern in patterns:
        named = {name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")}
        if not named:
            raise InputError("Distill.trainable", repr(pattern), f"patterns of names such as {names[0]}")
        out |= named
    return out


def train_only(network: Network, names: set[str]) -> None:
    """Freezes every parameter of the graph but those that are named."""
    for name, parameter in network.transformer.named_parameters():
        parameter.requires_grad_(name in names)


def trained_weights(
    graph: Graph,
    network: Network,
    parameters: Mapping[str, nn.Parameter],
    quantized: Mapping[str, QuantSpec],
    lora: LoRA | None,
) -> dict[str, Weight | LazyTensor]:
    """The weights of `graph` that training changed, in their own dtype and place.

    parameters: of the network by name, as they were before it computed (shards, if it is split). quantized: the linears
    that were fake-quantized and their grids; these come back packed. lora: what the low-rank updates were made with.
    """
    out: dict[str, Weight | LazyTensor] = {}
    for name, entry in graph.weights.entries.items():
        owner, _, what = name.rpartition(".")
        table = parameters.get(f"transformer.{owner}.table")
        if table is not None:
            embedding: Any = network.transformer.get_submodule(owner)
            folded = stable_rows(
                full_tensor(table), embedding.length, full_tensor(parameters[f"transformer.{owner}.gain"])
            )
            out[name] = folded.to(_device(entry), entry.dtype)
            continue
        if isinstance(entry, QuantTensor):
            delta = parameters.get(f"transformer.{owner}.scales_delta")
            if delta is not None:  # else a table, which stays
                learned = learned_scales(entry.scales.to(delta.dtype), full_tensor(delta).detach().to(entry.device))
                out[name] = replace(entry, scales=learned.to(entry.dtype))
            continue
        parameter = parameters[f"transformer.{name}"]
        lora_a = parameters.get(f"transformer.{owner}.lora_a") if what == "weight" else None
        if not parameter.requires_grad and lora_a is None:
            continue  # frozen: the very tensor that was given
        weight = full_tensor(parameter).detach()
        if lora_a is not None:
            b = full_tensor(parameters[f"transformer.{owner}.lora_b"])
            assert lora
            weight = merge(weight, full_tensor(lora_a), b, lora.alpha / lora.rank)
        if what == "weight" and owner in quantized:
            delta = parameters.get(f"transformer.{owner}.scales_delta")
            module: Any = network.transformer.get_submodule(owner)
            scales = None if delta is None else learned_scales(module.start, full_tensor(delta).detach())
            out[name] = packed(owner, weight, quantized[owner], scales, module.zeros).to(_device(entry))
        else:
            out[name] = weight.to(_device(entry), entry.dtype)
    return out


def _device(entry: Weight | LazyTensor) -> torch.device:
    return torch.device("cpu") if isinstance(entry, LazyTensor) else entry.device
