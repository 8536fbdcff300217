"""What torch says about a graph, in files that any language reads: the yardstick of the checks in export/runtimes.

reference.json   ids [T], `prompt` (how many of them are prefilled), the greedy continuation of the prompt with the margin
                 of each of its steps, the widths of the cache, and the profile's limits
reference.f32    logits float32 [T, V] of `ids`, little-endian, row by row
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinycompress.data import tokens as read_tokens
from tinycompress.errors import InputError
from tinycompress.files import write_json
from tinycompress.graph import Graph

from .emit import attention_layers
from .profiles import profile_of

NAME = "reference.json"


@torch.inference_mode()
def write_reference(graph: Graph, folder: str | Path, profile: str = "ort", *, ids: Tensor | None = None, prompt: int = 8, steps: int = 24) -> Path:
    """Writes both files for a prepared graph and returns the path of the first. `ids` [T] is the text: by default 64
    tokens of the "pydoc" test split, or random ids without a tokenizer; greedy decoding makes `steps` tokens."""
    config = graph.config
    ids = _ids(graph) if ids is None else ids.long().reshape(-1)
    if not 1 <= prompt < len(ids) <= config.max_position:
        raise InputError("reference ids", len(ids), f"more than the prompt's {prompt}, at most {config.max_position}")
    model = graph.dense(torch.float32).module()
    logits = model(ids[None])[0]
    greedy, margins = _greedy(model, ids[:prompt], min(steps, config.max_position - prompt))
    out: dict[str, Any] = {
        "ids": ids.tolist(),
        "prompt": prompt,
        "vocab": config.vocab_size,
        "greedy": greedy,
        "margins": margins,
        "cache": [[config.layers[i].n_kv_heads, config.head_dim] for i in attention_layers(config)],
        "context": config.max_position,
        "limits": dict(profile_of(profile).limits),
    }
    if sys.byteorder != "little":
        raise InputError("byte order", sys.byteorder, "little, as in reference.f32")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    logits.numpy().tofile(folder / "reference.f32")
    write_json(folder / NAME, out)
    return folder / NAME


def _ids(graph: Graph) -> Tensor:
    T = min(64, graph.config.max_position)
    if graph.tokenizer is not None:
        return read_tokens("pydoc", graph.tokenizer, 1, T, split="test")[0].long()
    return torch.randint(graph.config.vocab_size, (T,), generator=torch.Generator().manual_seed(1))


def _greedy(model: Any, prompt: Tensor, steps: int) -> tuple[list[int], list[float]]:
    """The continuation and, a step, how far its token was ahead of the next best: what rounding may turn over."""
    cache, new, tokens, margins = model.new_cache(1, len(prompt) + steps), prompt[None], [], []
    for _ in range(steps):
        best = model(new, cache)[0, -1].topk(2)
        tokens.append(int(best.indices[0]))
        margins.append(float(best.values[0] - best.values[1]))
        new = best.indices[None, :1]
    return tokens, margins
