"""What the tests of folders share: a small config, every kind of RoPE, and ways to write, edit and damage a folder."""

import json

import torch
from safetensors.torch import load_file, save_file

from tinycompress.checkpoints.checkpoint import save
from tinycompress.graph.config import Config, Layer
from tinycompress.graph.graph import Graph
from tinycompress.graph.quant_tensor import QuantSpec, QuantTensor
from tinycompress.graph.rope import Rope
from tinycompress.quantization.grid_search import find_grid, round_to_grid

IDS = torch.randint(0, 128, (1, 48), generator=torch.Generator().manual_seed(3))
SMALL = Config(vocab_size=128, hidden_size=64, head_dim=16, layers=(Layer(4, 2, 96),) * 2, max_position=64)


def longrope(factor, original, short, long):
    return Rope(1e4, "longrope", factor, original, short_factor=tuple(short), long_factor=tuple(long))


ROPES = {
    "default": (Rope(theta=5000.0), 64),
    "linear": (Rope(type="linear", factor=2.0), 64),
    "dynamic": (Rope(type="dynamic", factor=3.0, original_max_position=32), 96),
    "yarn": (Rope(type="yarn", factor=4.0, original_max_position=16, beta_fast=8.0, attention_factor=1.2), 64),
    "yarn mscale": (
        Rope(type="yarn", factor=4.0, original_max_position=16, mscale=0.7, mscale_all_dim=0.5, truncate=False),
        64,
    ),
    "llama3": (Rope(type="llama3", factor=4.0, original_max_position=16), 64),
    "longrope": (longrope(4.0, 16, [1.0] * 8, [1.0 + i for i in range(8)]), 64),
    "longrope short": (longrope(3.0, 60, [1.5] * 8, [2.0] * 8), 64),
}


def quantize(graph: Graph, spec: QuantSpec) -> Graph:
    changed = {}
    for name, weight in graph.weights.items():
        if name.endswith("_proj.weight"):
            scales, zeros = find_grid(name, weight, spec)
            changed[name] = QuantTensor.from_ints(round_to_grid(weight, scales, zeros, spec), scales, zeros, spec)
    return graph.replace(weights=changed, by="Quantize()")


def edit(folder, name="config.json", **fields):
    """Changes fields of a JSON file; ... removes one."""
    data = json.loads((folder / name).read_text())
    data = {k: v for k, v in (data | fields).items() if v is not ...}
    (folder / name).write_text(json.dumps(data))


def as_hf(graph, folder):
    """A folder that only Hugging Face's config describes."""
    save(graph, folder)
    (folder / "tinycompress.json").unlink()
    return folder


def transformers_logits(folder):
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(IDS).logits


def broken(change):
    def damage(folder):
        path = folder / "model.safetensors"
        tensors = load_file(path)
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        change(tensors)
        save_file(tensors, path)

    return damage
