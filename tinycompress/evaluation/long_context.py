"""Measuring a longer context: perplexity against length with intervals, memory and speed against length.

  full windows     non-overlapping windows of each length, every token counted: what a user of that length gets
  sliding windows  the same target tokens at every length, each after (at least) length - stride tokens of context
                   (Train Short, Test Long, arXiv:2108.12409): does more context help, or break the model?

Both return the NLL by window, so that methods are compared pairwise (`evaluate.paired_difference`). Letters: N tokens
of the text, T length, V vocabulary.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from ..graph.config import Config
from ..model.generation import check_ids
from ..model.transformer import Transformer
from ..progress import tqdm
from .perplexity import CHUNK, perplexity
from .statistics import Interval, bootstrap


def full_windows(
    model: Transformer, stream: Tensor, length: int, windows: int | None = None, progress: bool = True
) -> Tensor:
    """NLL float64 [windows] of the first `windows` (by default all) non-overlapping windows of `length` of `stream`
    [N]."""
    fits = len(stream) // length
    windows = fits if windows is None else windows
    if windows < 1 or windows > fits:
        raise InputError(f"windows of {length} tokens", windows, f"1 … {fits}: the text has {len(stream)} tokens")
    return perplexity(model, stream[: windows * length].view(windows, length), progress).nll


@torch.inference_mode()
def sliding_windows(
    model: Transformer, stream: Tensor, length: int, stride: int, first: int, windows: int, progress: bool = True
) -> Tensor:
    """NLL float64 [windows] of segments of `stride` tokens from position `first` of `stream` [N] on, in a row; each is
    predicted in a window of `length` that ends with it. With one `first` the targets are the same at every length."""
    if not 0 < stride < length or first < length - stride:
        raise InputError(
            "stride, first",
            f"{stride}, {first}",
            f"a stride of 1 … {length - 1} and a first target of at least {length - stride}",
        )
    if windows < 1 or first + windows * stride > len(stream):
        raise InputError(
            "windows", windows, f"1 … {max(0, len(stream) - first) // stride}: the text has {len(stream)} tokens"
        )
    check_length(model, length)
    out = []
    for i in tqdm(range(windows), desc=f"sliding {length}", unit="window", delay=2, disable=not progress):
        stop = first + (i + 1) * stride
        out.append(tail_nll(model, stream[stop - length : stop], stride).mean())
    return torch.stack(out).double().cpu()


def tail_nll(model: Transformer, ids: Tensor, n: int) -> Tensor:
    """ids [T] to the NLL of the last n tokens, float32 [n]; logits exist only `CHUNK` at a time."""
    hidden = model.hidden(ids[None].to(model.device))[0, -n - 1 : -1]
    parts = zip(hidden.split(CHUNK), ids[-n:].to(model.device).split(CHUNK))
    return torch.cat([F.cross_entropy(model.lm_head(h).float(), target, reduction="none") for h, target in parts])


@torch.inference_mode()
def cached_nll(model: Transformer, ids: Tensor, int8: bool = False) -> Tensor:
    """ids [T] to the NLL of tokens 1 … T-1, float32 [T-1], through the cache in chunks of `CHUNK`: what its dtype
    costs."""
    check_ids(ids, model.config.vocab_size)
    check_length(model, len(ids))
    cache, out = model.new_cache(1, len(ids), int8), []
    for start in range(0, len(ids) - 1, CHUNK):
        stop = min(start + CHUNK, len(ids) - 1)
        logits = model(ids[None, start:stop].to(model.device), cache)[0].float()
        out.append(F.cross_entropy(logits, ids[start + 1 : stop + 1].to(model.device), reduction="none"))
    return torch.cat(out)


def perplexity_interval(nll: Tensor, seed: int = 0) -> Interval:
    """exp of the mean NLL [windows], with a 95% bootstrap interval over windows."""
    return bootstrap(lambda index: nll[index].mean(-1).exp(), len(nll), seed)


def check_length(model: Transformer, length: int) -> None:
    if length > model.config.max_position:
        raise InputError(
            "length",
            length,
            f"at most the model's context, {model.config.max_position} (ScaleRope or LongRope stretches it)",
        )


@dataclass(frozen=True)
class Footprint:
    """Speed and memory at one length.

    Fields:
        length: positions in the cache.
        int8: whether the cache holds int8.
        prefill_tokens_per_second: of the prompt.
        decode_tokens_per_second: of single tokens behind it.
        kv_bytes: of the whole cache, in bytes.
    """

    length: int
    int8: bool
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    kv_bytes: int


@torch.inference_mode()
def footprint(model: Transformer, length: int, int8: bool = False, steps: int = 8, seed: int = 0) -> Footprint:
    """Reads length - steps random ids in chunks of `CHUNK` into a cache, then decodes `steps` tokens up to `length`."""
    check_length(model, length)
    if not 1 <= steps < length:
        raise InputError("steps", steps, f"1 … {length - 1}")
    ids = torch.randint(model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(seed)).to(
        model.device
    )
    prompt, rest = ids[:, : length - steps], ids[:, length - steps :]
    model(prompt[:, :CHUNK], model.new_cache(1, length, int8))  # warms up
    cache = model.new_cache(1, length, int8)
    start = time.perf_counter()
    for chunk in prompt.split(CHUNK, 1):
        last = model.hidden(chunk, cache)[:, -1:]
    _settle(model.lm_head(last))
    prefilled = time.perf_counter()
    for token in rest.split(1, 1):
        _settle(model(token, cache))
    done = time.perf_counter()
    return Footprint(length, int8, prompt.shape[1] / (prefilled - start), steps / (done - prefilled), cache.nbytes)


def kv_bytes(config: Config, length: int, int8: bool = False, itemsize: int = 4) -> int:
    """Bytes that keys and values of `length` positions take: `itemsize` a number, or one and a float32 scale a head."""
    heads = sum(layer.n_kv_heads for layer in config.layers)
    return 2 * heads * length * (config.head_dim + 4 if int8 else config.head_dim * itemsize)


def _settle(logits: Tensor) -> None:
    """Waits for an accelerator; nothing on the CPU."""
    logits.flatten()[0].item()
