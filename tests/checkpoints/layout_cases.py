"""What the tests of other tools' layouts share: a small model on every grid, and ways to change what was written."""

import dataclasses
import json

import torch
from conftest import random_graph
from safetensors.torch import load_file, save_file

from tinycompress.graph.config import Config, Layer
from tinycompress.graph.quant_tensor import QuantSpec, QuantTensor
from tinycompress.quantization.rtn import RTN

CONFIG = Config(vocab_size=96, hidden_size=64, head_dim=16, layers=(Layer(4, 2, 96),) * 2, max_position=64)
IDS = torch.arange(24)[None]
GRIDS = {"gptq": ("w2g32", "w3g32", "w4g16", "w4g32-asym", "w8", "w3g16-asym"), "awq": ("w4g32", "w4g16-asym", "w4")}
GRIDS["compressed-tensors"] = ("w2g32", "w3g32", "w4g16", "w4g32-asym", "w8", "w3g16-asym", "w4")
CASES = [(format, grid) for format, grids in GRIDS.items() for grid in grids]


def quantized(grid, config=CONFIG):
    """Scales that float16 holds, so that nothing is rounded on the way."""
    graph = RTN(QuantSpec.parse(grid))(random_graph(config))
    halves = {
        n: dataclasses.replace(w, scales=w.scales.half().float())
        for n, w in graph.weights.items()
        if isinstance(w, QuantTensor)
    }
    return graph.replace(weights=halves)


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def settings_of(**fields):
    """Changes fields of the quantization config, in every file that has it; ... removes one."""

    def changed(settings):
        return {key: value for key, value in (settings | fields).items() if value is not ...}

    def change(folder):
        data = json.loads((folder / "config.json").read_text())
        data["quantization_config"] = changed(data["quantization_config"])
        (folder / "config.json").write_text(json.dumps(data))
        beside = folder / "quantize_config.json"
        if beside.exists():
            beside.write_text(json.dumps(changed(json.loads(beside.read_text()))))

    return change
