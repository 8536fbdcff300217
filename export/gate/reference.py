"""What torch says about a graph, in files that any language reads: the yardstick of the checks in export/runtimes.

reference.json   ids [W, T], `prompt` (how many of the first window are prefilled), the greedy continuation of the
prompt with
                 the margin of each of its steps, the widths of the cache, the profile's limits, the ids that end
                 a text, and some texts with their ids, without and with the special tokens around them
reference.f32    logits float32 [W, T, V] of `ids`, little-endian, row by row
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from tinycompress.calibration.data import tokens as read_tokens
from tinycompress.errors import InputError
from tinycompress.files import write_json
from tinycompress.graph.graph import Graph
from tinycompress.model.generation import end_tokens

from ..dynamic.emit import attention_layers
from ..profiles import profile_of

NAME = "reference.json"
# the gate's text: with int8 activations a perplexity over 64 tokens is only known to 1%, its limit
WINDOWS = 8
POSITIONS = 512
# for a runtime's own tokenizer: a beginning of text that is asked for or not, spaces, bytes of several scripts
TEXTS = ("Once upon a time", " Once", "two  spaces\n\tand a tab", "é 模型 🙂")
LARGEST = 1 << 30  # bytes of logits that the default text may take: fewer windows where the vocabulary is large


@torch.inference_mode()
def write_reference(
    graph: Graph,
    folder: str | Path,
    profile: str = "ort",
    *,
    ids: Tensor | None = None,
    prompt: int = 8,
    steps: int = 24,
    progress: bool = True,
) -> Path:
    """Writes both files for a prepared graph and returns the path of the first. `ids` [W, T] or [T] is the text: by
    default that of `reference_text`; greedy decoding makes `steps` tokens."""
    config = graph.config
    ids = torch.atleast_2d(reference_text(graph) if ids is None else ids.long())
    if not 1 <= prompt < ids.shape[1] <= config.max_position:
        raise InputError(
            "reference ids", ids.shape[1], f"more than the prompt's {prompt}, at most {config.max_position}"
        )
    model = graph.dense(torch.float32).module()
    greedy, margins = _greedy(model, ids[0, :prompt], min(steps, config.max_position - prompt))
    out: dict[str, Any] = {
        "ids": ids.tolist(),
        "prompt": prompt,
        "vocab": config.vocab_size,
        "greedy": greedy,
        "margins": margins,
        "cache": [[config.layers[i].n_kv_heads, config.head_dim] for i in attention_layers(config)],
        "context": config.max_position,
        "limits": dict(profile_of(profile).limits),
        "ends": list(end_tokens(config)),
        "texts": _texts(graph),
    }
    if sys.byteorder != "little":
        raise InputError("byte order", sys.byteorder, "little, as in reference.f32")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "reference.f32").open("wb") as file:
        for window in tqdm(ids.split(1), desc="reference", unit="window", delay=2, disable=not progress):
            model(window).numpy().tofile(file)
    write_json(folder / NAME, out)
    return folder / NAME


def reference_text(graph: Graph, windows: int = WINDOWS, positions: int = POSITIONS) -> Tensor:
    """ids [W, T] of the "pydoc" test split, or random ones without a tokenizer: at most what LARGEST allows."""
    T = min(positions, graph.config.max_position)
    W = fitting(windows, T, graph.config.vocab_size)
    if graph.tokenizer is not None:
        return read_tokens("pydoc", graph.tokenizer, W, T, split="test").long()
    usable = torch.tensor(
        sorted(set(range(graph.config.vocab_size)) - set(end_tokens(graph.config)))
    )  # genai takes them for padding
    return usable[torch.randint(len(usable), (W, T), generator=torch.Generator().manual_seed(1))]


def fitting(windows: int, positions: int, vocab_size: int) -> int:
    """How many of so many windows may be judged: their logits take at most LARGEST, but one window always may."""
    return max(1, min(windows, LARGEST // (4 * positions * vocab_size)))


def _texts(graph: Graph) -> list[dict[str, Any]]:
    """Texts and their ids, `plain` and with what the tokenizer puts around a text (`special`); none without one."""
    if graph.tokenizer is None:
        return []
    encode = graph.tokenizer.encode
    return [{"text": text, "plain": encode(text), "special": encode(text, add_special_tokens=True)} for text in TEXTS]


def _greedy(model: Any, prompt: Tensor, steps: int) -> tuple[list[int], list[float]]:
    """The continuation and, a step, how far its token was ahead of the next best: what rounding may turn over."""
    cache = model.new_cache(1, len(prompt) + steps)
    new = prompt[None]
    tokens = []
    margins = []
    for _ in range(steps):
        best = model(new, cache)[0, -1].topk(2)
        tokens.append(int(best.indices[0]))
        margins.append(float(best.values[0] - best.values[1]))
        new = best.indices[None, :1]
    return tokens, margins
