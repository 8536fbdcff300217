"""Measuring: perplexity by a stated protocol, and speed.

A model is anything that maps token ids [1, T] to logits [1, T, V]: `graph.module()`, or an exported model in its
runtime. Comparisons are paired: the same windows for both models, and a bootstrap over windows.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..calibration.walk import Stream, blocks, check_calibration
from ..errors import InputError
from ..graph.config import FINAL_NORM, HEAD
from ..graph.graph import Graph
from ..model.generation import check_ids
from ..model.matmul import product
from ..model.transformer import Norm, Transformer
from ..progress import tqdm

Model = Callable[[Tensor], Tensor]
CHUNK = 2048  # positions whose logits exist at one time, at most
LOGITS = 1 << 27  # numbers that logits may hold at one time


@dataclass(frozen=True)
class Perplexity:
    """A measured perplexity; `value` is the number.

    Fields:
        nll: float64 [windows], the mean negative log-likelihood of each window's tokens, in nats.
        seq_len: tokens of a window.
    """

    nll: Tensor
    seq_len: int

    @property
    def value(self) -> float:
        return math.exp(self.nll.mean().item())

    @property
    def tokens(self) -> int:
        """Predicted tokens: the first of each window has no context and is not counted."""
        return len(self.nll) * (self.seq_len - 1)

    @property
    def protocol(self) -> str:
        windows = f"{len(self.nll)} non-overlapping windows of {self.seq_len} tokens"
        return f"{windows}, tokenized once, no BOS, exp of the mean token NLL"


@torch.inference_mode()
def perplexity(model: Model, tokens: Tensor, progress: bool = True) -> Perplexity:
    """Perplexity of `model` over `tokens` [windows, seq_len]."""
    check_windows(model, tokens)
    together = max(1, CHUNK // tokens.shape[1]) if isinstance(model, Transformer) else 1
    nll = []
    with tqdm(total=len(tokens), desc="perplexity", unit="window", delay=2, disable=not progress) as bar:
        for windows in tokens.split(together):
            nll.append(window_nll(model, windows).mean(1))
            bar.update(len(windows))
    return Perplexity(torch.cat(nll).double().cpu(), tokens.shape[1])


def check_windows(model: Model, tokens: Tensor) -> None:
    """An `InputError` for tokens that are not windows [windows, seq_len], or that a Transformer cannot read."""
    if tokens.dim() != 2 or tokens.shape[1] < 2:
        raise InputError("evaluation tokens", tuple(tokens.shape), "[windows, seq_len], windows of at least 2")
    if isinstance(model, Transformer):
        check_ids(tokens, model.config.vocab_size)
        if tokens.shape[1] > model.config.max_position:
            raise InputError("seq_len", tokens.shape[1], f"at most the model's context, {model.config.max_position}")


@torch.inference_mode()
def streamed_perplexity(graph: Graph, tokens: Tensor, progress: bool = True) -> Perplexity:
    """What `perplexity` finds of `graph.module()` in float32, but for the last bits of its sums, with one block's
    weights in memory at a time."""
    states = streamed_states(graph, tokens, progress)
    dense = graph.dense(torch.float32)
    head = dense.tensor(dense.config.weight_name(HEAD)).to(tokens.device)
    targets = F.pad(tokens[:, 1:], (0, 1), value=-100).flatten()
    positions = logits_together(dense.config.vocab_size)
    hidden = (h for batch in states for h in batch.split(positions))
    nll = []
    start = 0
    for h in hidden:
        target = targets[start : start + len(h)]
        nll.append(F.cross_entropy(product(h, head), target, reduction="none"))
        start += len(h)
    return Perplexity(torch.cat(nll).view(tokens.shape)[:, :-1].mean(1).double().cpu(), tokens.shape[1])


@torch.inference_mode()
def streamed_states(graph: Graph, tokens: Tensor, progress: bool = True) -> Iterator[Tensor]:
    """The normalised last hidden states of all windows, float32, in batches [n, D] of whole windows: as
    `graph.module().hidden` gives them, with one block's weights in memory at a time."""
    check_calibration(graph, tokens)
    dense = graph.dense(torch.float32)
    stream = Stream(dense, tokens, dtype=torch.float32)
    for block in blocks(dense, stream.device, torch.float32, "layers" if progress else None):
        stream.step(block)
    norm = Norm(dense.tensor(f"{FINAL_NORM}.weight").to(stream.device), dense.config.norm_eps)
    for batch in stream.hidden:
        yield norm(batch).flatten(0, 1)


def logits_together(vocab_size: int) -> int:
    """Positions whose logits exist at one time: `CHUNK`, or fewer for a large vocabulary."""
    return max(1, min(CHUNK, LOGITS // vocab_size))


def window_nll(model: Model, ids: Tensor) -> Tensor:
    """ids [B, T] to the NLL of tokens 1 … T-1, float32 [B, T-1]; logits of a Transformer exist for some
    positions at a time."""
    targets = F.pad(ids[:, 1:], (0, 1), value=-100).flatten()  # nothing follows a window's last token: it counts as 0
    parts: Iterable[tuple[Tensor, Tensor]]
    if isinstance(model, Transformer):
        hidden = model.hidden(ids.to(model.device)).flatten(0, 1)
        n = logits_together(model.config.vocab_size)
        parts = ((model.lm_head(h), t.to(h.device)) for h, t in zip(hidden.split(n), targets.split(n)))
    else:
        logits = model(ids).flatten(0, 1)
        parts = zip(logits.split(CHUNK), targets.to(logits.device).split(CHUNK))
    nll = torch.cat([F.cross_entropy(logits.float(), target, reduction="none") for logits, target in parts])
    return nll.view(ids.shape)[:, :-1]


@torch.inference_mode()
def tokens_per_second(model: Model, ids: Tensor, repeats: int = 3) -> float:
    """Prompt tokens a second of whole forwards over ids [B, T]: the best of `repeats`, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        model(ids)
        times.append(time.perf_counter() - start)
    return ids.numel() / min(times[1:])


def environment() -> dict[str, Any]:
    """What a committed figure must name: versions and the kind of machine."""
    packages = ("torch", "transformers", "onnxruntime", "tokenizers", "datasets")
    versions = {}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    processor = f"{platform.machine()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    return {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {processor}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": versions,
    }
