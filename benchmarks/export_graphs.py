"""Graphs of TinyLlama's shape with random weights, and a tokenizer for them: what benchmarks/export.py exports."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from tinycompress.files import write_json
from tinycompress.graph.graph import Graph
from tinycompress.graph.presets import TINYLLAMA_1_1B
from tinycompress.graph.quant_tensor import QuantSpec, QuantTensor

GGUF = "q4_0.gguf"
OURS = {
    "g32": (32, "float32"),
    "g32-half": (32, "float16"),
    "g64": (64, "float32"),
    "g128": (128, "float32"),
    "g128-half": (128, "float16"),
}


def config(layers: int) -> Any:
    return dataclasses.replace(TINYLLAMA_1_1B, layers=TINYLLAMA_1_1B.layers[:layers])


def make_graphs(work: Path, layers: int) -> None:
    """What the processes start from: bfloat16 for the builder, packed checkpoints for us, one of them as Q4_0 too."""
    from tinycompress.checkpoints.checkpoint import save

    if not (work / "dense").is_dir():
        save(dense(layers), work / "dense")
        write_tokenizer(work / "dense")
    for group in sorted({group for group, _ in OURS.values()}):
        if not (work / f"packed{group}").is_dir():
            save(packed(layers, group), work / f"packed{group}")
    if not (work / GGUF).is_file():
        save(packed(layers, 32), work / GGUF, format="gguf")


def write_tokenizer(folder: Path) -> None:
    """Words that nobody reads: the builder asks for a tokenizer."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    Tokenizer(WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, "<unk>")).save(str(folder / "tokenizer.json"))
    names = {
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_json(folder / "tokenizer_config.json", names)


def dense(layers: int) -> Graph:
    """Random weights in bfloat16, never more than one of them in float32."""
    from tinycompress.graph.config import shapes

    generator = torch.Generator().manual_seed(0)
    drawn = {}
    for name, shape in shapes(config(layers)).items():
        weight = torch.randn(shape, generator=generator) * 0.02 if len(shape) > 1 else torch.ones(shape)
        drawn[name] = weight.bfloat16()
    return Graph(config(layers), drawn, history=("random",))


def packed(layers: int, group: int) -> Graph:
    """Random integers and scales in every matrix: what an export does not look at."""
    from tinycompress.graph.config import shapes

    generator, spec, weights = torch.Generator().manual_seed(0), QuantSpec(4, group), {}
    for name, shape in shapes(config(layers)).items():
        if len(shape) == 1:
            weights[name] = torch.ones(shape)
            continue
        integers = torch.randint(
            0, 256, (shape[0], shape[1] // group, group // 2), dtype=torch.uint8, generator=generator
        )
        scales = torch.rand(shape[0], shape[1] // group, generator=generator) * 0.004 + 0.001
        weights[name] = QuantTensor(integers, scales, None, spec, (shape[0], shape[1]))
    return Graph(config(layers), weights, history=("random integers",))
