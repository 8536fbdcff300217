"""What the commands' arguments stand for: a model, its runtime and tokenizer, windows of a text, an export."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from ..graph.config import Config
    from ..graph.graph import Graph
    from ..graph.quant_tensor import QuantSpec


MOST_POSITIONS = (1 << 31) - 1  # runtimes count positions in 32 bits
LARGEST_DENSE = 1 << 33  # bytes of float32 weights that any machine is taken to have room for


def open_model(name: str) -> Graph:
    """MODEL as a Graph: an exported folder gives back the graph that it was made from."""
    if is_export(name):
        from tinycompress.export import read

        return read(name)
    from ..checkpoints.checkpoint import load

    graph = load(name)
    check_positions(graph.config, f"max_position_embeddings of {name}")
    return graph


def check_positions(config: Config, field: str) -> None:
    """An `InputError` for more positions than this machine could hold the angles of: a cosine and a sine, in float32,
    for every position and every channel of a head."""
    each = 2 * 4 * config.head_dim
    most = min(memory_here() // each, MOST_POSITIONS)
    if config.max_position > most:
        accepted = f"at most {most:,}, for which this machine has memory"
        raise InputError(field, f"{config.max_position:,}", accepted)


def memory_here() -> int:
    """Bytes of memory of this machine; where the system does not say, more than any has."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 1 << 62


def check_export(graph: Graph, specs: Mapping[str, QuantSpec], name: str) -> None:
    """What the export would refuse, before the work of compressing: draws the final shapes without weights.

    graph: the shapes and grids that will be there. specs: how these grids will be searched, by parameter.
    """
    import torch

    from tinycompress.export import PROFILES, check_static, emit

    from ..graph.config import shapes
    from ..graph.graph import Graph, LazyTensor, Weights
    from ..recipe.options import linear_inputs

    if name not in PROFILES:
        raise InputError("--profile", repr(name), " | ".join(PROFILES))
    profile = PROFILES[name]
    config = graph.config
    grids = {n: (specs[f"{n}.weight"], width) for n, width in linear_inputs(config).items() if f"{n}.weight" in specs}
    if profile.form == "static":
        check_static(config, profile, None, {})
        for linear, (spec, width) in grids.items():
            check_static(config, profile, spec, {linear: width})
        return
    dense = {n: LazyTensor(s, torch.float32, torch.Tensor) for n, s in shapes(config).items()}
    emit(Graph(config, Weights(dense)), profile)
    for linear, (spec, width) in grids.items():
        profile.check_zeros(linear, spec)
        profile.block(linear, spec.group(linear, width), width)


def is_export(name: str) -> bool:
    return (Path(name) / "manifest.json").is_file() and any(
        (Path(name) / model).exists() for model in ("model.onnx", "onnx", "prefill.onnx")
    )


def runnable(name: str, graph: Graph) -> Any:
    """What computes logits and generates: the runtime for an exported folder, else torch. Where memory allows, torch
    gets packed weights unpacked, which gives the same numbers many times as fast, and everything in float32."""
    if is_export(name):
        from tinycompress.export import OrtModel, StaticModel

        return StaticModel(name) if (Path(name) / "prefill.onnx").is_file() else OrtModel(name)
    import torch

    if 4 * graph.config.n_params > LARGEST_DENSE:
        return graph.module()
    return graph.dense(torch.float32).module()


def need_tokenizer(graph: Graph) -> Any:
    """The tokenizer; an `InputError` for a model without one."""
    if graph.tokenizer is None:
        raise InputError("tokenizer", "none in this model", "a model with one (tokenizer.json beside the weights)")
    return graph.tokenizer


def read_tokens(
    graph: Graph, source: str, n: int, seq_len: int | None, default: int, split: str, seed: int | None = None
) -> Tensor:
    """Windows of `source`: of `seq_len` tokens, or of `default`, or of the model's context where that is shorter."""
    from ..calibration.data import tokens

    context = graph.config.max_position
    if seq_len and seq_len > context:
        raise InputError("--seq-len", seq_len, f"at most the model's context, {context}")
    return tokens(source, need_tokenizer(graph), n, seq_len or min(default, context), seed=seed, split=split)


def training_windows(graph: Graph, source: str, seq_len: int | None, at_most: int, split: str = "train") -> Tensor:
    """The first windows [n, seq_len] of a text: as many as it has, and at most `at_most`."""
    from ..recipe.sources import Loaded
    from ..recipe.vocabulary import Data

    return Loaded(graph, graph.config.max_position).tokens(Data(source, at_most, seq_len, split=split, in_order=True))
