"""What the gate of an export compares: torch and the exported model on the same tokens, each check a figure.

Checks of level 0 give their figure, the largest logit of torch and a description. Far positions are reached without
computing everything before them: both runtimes get the same past in their caches and decode from there. That past is
real text, its keys turned to where they now stand: a random one drives a model where float32 itself is off by 1e-2
(SmolLM2 in torch, against float64).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinycompress.graph.config import Config
from tinycompress.model.fused_ops import rotate
from tinycompress.model.transformer import Transformer

from ..dynamic.attention import frequencies, unrotated_keys
from ..dynamic.emit import attention_layers
from ..dynamic.session import OrtModel
from ..read import initializers

PROMPT = 8  # tokens of the prompt in the decode check
STEPS = 16  # decoded behind it
TURNS = 3  # of a conversation
TURN = 5  # tokens of the one who asks
ANSWER = 3  # tokens of the one who answers
FAR_STEPS = 8  # decoded behind a past of repeated text
TILE = 64  # tokens of the text that is repeated
# bytes per runtime: a longer cache is not worth the last positions, whose tables are compared anyway
LARGEST_PAST = 1 << 27


def exact_checks(
    exported: OrtModel, model: Transformer, ids: Tensor
) -> Mapping[str, Callable[[], tuple[float, float, str]]]:
    """The checks of level 0 on one window [1, T], each giving its figure, the largest logit and a description."""
    out = {"prefill": partial(_prefill, exported, model, ids), "decode": partial(_decode, exported, model, ids)}
    out["turns"] = partial(_turns, exported, model, ids)
    if isinstance(exported, OrtModel) and ids.shape[1] > 3:
        out["padding"] = partial(_padding, exported, model, ids, "right")
        out["left_padding"] = partial(_padding, exported, model, ids, "left")
    return out | {check: partial(_far_steps, exported, model, ids, start) for check, start in far(model.config).items()}


def tables(folder: str | Path, config: Config) -> float:
    stored = initializers(folder)
    if unrotated_keys(config):
        expected = {"rope.frequencies": frequencies(config)}
    else:
        expected = dict(zip(("rope.cos", "rope.sin"), config.rope.tables(config.head_dim, config.max_position)))
    pairs = [(stored.get(name), table) for name, table in expected.items()]
    same = all(tensor is not None and tensor.shape == table.shape for tensor, table in pairs)
    return max(compare([pair])[0] for pair in pairs) if same else math.inf  # type: ignore[list-item]


def _prefill(exported: OrtModel, model: Transformer, ids: Tensor) -> tuple[float, float, str]:
    expected = model(ids)
    return *compare([(exported(ids), expected)]), f"{ids.shape[1]} positions"


def _decode(exported: OrtModel, model: Transformer, ids: Tensor) -> tuple[float, float, str]:
    """Every step behind a prompt, against torch's cached path and against its prefill."""
    prompt = min(PROMPT, ids.shape[1] // 2)
    T = min(prompt + STEPS, ids.shape[1])
    exported_cache = exported.new_cache(1, T)
    torch_cache = model.new_cache(1, T)
    whole = model(ids[:, :T])
    same_frequencies = not unrotated_keys(model.config) or model.config.rope.trained >= T
    pairs = []
    for start, stop in [(0, prompt), *((i, i + 1) for i in range(prompt, T))]:
        got = exported.step(ids[:, start:stop], exported_cache)
        pairs.append((got, model(ids[:, start:stop], torch_cache)))
        if same_frequencies:  # else the past was computed at others
            pairs.append((got, whole[:, start:stop]))
    return *compare(pairs), f"{T - prompt} steps behind {prompt} tokens"


def cached(exported: OrtModel, model: Transformer, ids: Tensor, limit: float) -> tuple[float, float, str]:
    """Mean KL of the steps behind a prompt, its limit, and a description: what a rounded cache costs those who read
    it."""
    prompt = min(PROMPT, ids.shape[1] // 2)
    T = min(prompt + TILE, ids.shape[1])
    cache = exported.new_cache(1, T)
    rows = []
    for start, stop in [(0, prompt), *((i, i + 1) for i in range(prompt, T))]:
        rows.append(exported.step(ids[:, start:stop], cache)[0, -1])
    expected = model(ids[:, :T])[0, prompt - 1 :].log_softmax(-1)
    got = torch.stack(rows).log_softmax(-1)
    kl = F.kl_div(got, expected, log_target=True, reduction="batchmean").item()
    return (
        kl,
        limit,
        f"nats a token over {T - prompt} steps behind {prompt} tokens, {cache.nbytes // T:,} bytes a position",
    )


def _padding(exported: OrtModel, model: Transformer, ids: Tensor, side: str) -> tuple[float, float, str]:
    """Two prompts of different lengths in one batch, the shorter padded on one side, and two steps behind them."""
    long = min(PROMPT, ids.shape[1] - 2)
    short = max(1, long // 2)
    real = slice(short) if side == "right" else slice(long - short, long)
    prompts = ids[:, :1].repeat(2, long)
    prompts[0] = ids[0, :long]
    prompts[1, real] = ids[0, :short]
    mask = torch.ones(2, long + 2, dtype=torch.long)
    mask[1, :long] = 0
    mask[1, real] = 1
    cache = exported.new_cache(2, long + 2)
    got = exported.step(prompts, cache, mask[:, :long])
    expected = model(ids[:, : long + 2])[0], model(torch.cat([ids[:, :short], ids[:, long : long + 2]], 1))[0]
    pairs = [(got[0], expected[0][:long]), (got[1, real], expected[1][:short])]
    for i in range(2):
        step = exported.step(ids[:, long + i : long + i + 1].repeat(2, 1), cache, mask[:, : long + i + 1])
        pairs += [(step[0, 0], expected[0][long + i]), (step[1, 0], expected[1][short + i])]
    return *compare(pairs), f"prompts of {long} and {short} in one batch, padded on the {side}, two steps"


def _turns(exported: OrtModel, model: Transformer, ids: Tensor) -> tuple[float, float, str]:
    """A conversation: turn by turn a prompt behind all that was said, then steps, the cache kept throughout."""
    T = min(TURNS * (TURN + ANSWER), ids.shape[1])
    exported_cache = exported.new_cache(1, T)
    torch_cache = model.new_cache(1, T)
    pairs = []
    start = 0
    while start < T:
        answering = start % (TURN + ANSWER) >= TURN
        stop = min(start + (1 if answering else TURN), T)
        new = ids[:, start:stop]
        pairs.append((exported.step(new, exported_cache), model(new, torch_cache)))
        start = stop
    return *compare(pairs), f"{T} tokens, {TURN} said and {ANSWER} answered in turn"


def _far_steps(exported: OrtModel, model: Transformer, ids: Tensor, start: int) -> tuple[float, float, str]:
    """Steps from position `start` on, behind a past that repeats the start of the window up to there."""
    config = model.config
    tile = max(1, min(TILE, ids.shape[1] - FAR_STEPS))
    stop = min(start + FAR_STEPS, config.max_position, start + ids.shape[1] - tile)
    near = model.new_cache(1, tile)
    torch_cache = model.new_cache(1, stop)
    exported_cache = exported.new_cache(1, stop)
    model(ids[:, :tile], near)
    index = (torch.arange(start) - start) % tile  # ends with the end of the tile, so that the text goes on
    (cos, sin), (far_cos, far_sin) = (config.rope.tables(config.head_dim, n) for n in (tile, start))
    for slot, (pair, i) in enumerate(zip(exported_cache.layers, attention_layers(config))):
        keys, values = near.layers[i]
        # then torch caches keys as they are; the file only if its context reaches that far
        varies = config.rope.varies_with_length
        turned = config.layers[i].rope
        plain = rotate(keys, cos, -sin) / config.rope.attention_scale() ** 2 if turned and not varies else keys
        far_keys = rotate(plain[:, :, index], far_cos, far_sin) if turned else plain[:, :, index]
        key_buffers = ((pair[0], unrotated_keys(config)), (torch_cache.layers[i][0], varies))
        for buffer, as_they_are in key_buffers:
            _fill(buffer, plain[:, :, index] if as_they_are else far_keys)
        if exported_cache.key_scales:
            pair[0][:, :, :start] /= exported_cache.key_scales[slot][:, None]
        for buffer in (pair[1], torch_cache.layers[i][1]):
            _fill(buffer, values[:, :, index])
    exported_cache.length = start
    torch_cache.length = start
    steps = ids[:, tile : tile + stop - start].split(1, 1)
    pairs = [(exported.step(step, exported_cache), model(step, torch_cache)) for step in steps]
    return *compare(pairs), f"positions {start} … {stop - 1} behind repeated text"


def _fill(buffer: Tensor, past: Tensor) -> None:
    """Writes past [1, K, n, d] to the front of a cache's buffer: the last of it, where a window keeps no more."""
    past = past[:, :, -buffer.shape[2] :]
    buffer[:, :, : past.shape[2]] = past


def compare(pairs: list[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """The largest difference (NaN if there is any) and the largest expected logit."""
    differences = torch.stack([(got - expected).abs().max() for got, expected in pairs])
    return differences.max().item(), max(expected.abs().max().item() for _, expected in pairs)


def far(config: Config) -> dict[str, int]:
    """Where the far checks start: none without attention."""
    if not attention_layers(config):
        return {}
    out = {}
    original = config.rope.original_max_position
    end = config.max_position
    if original and original < end:
        out["beyond_context"] = max(0, original - FAR_STEPS // 2)
    width = sum(layer.n_kv_heads for layer in config.layers) * config.head_dim * 2 * 4
    if width * end <= LARGEST_PAST:
        out["end_of_context"] = max(0, end - FAR_STEPS)
    return out


@dataclass(frozen=True)
class Shipped:
    """What the exported model as shipped says, beside torch.

    Fields:
        kl: mean KL(torch ‖ exported) of a token, in nats.
        flips: positions with another most probable token.
        count: tokens that were compared.
        perplexity: (torch, exported).
    """

    kl: float
    flips: int
    count: int
    perplexity: tuple[float, float]


def shipped(exported: OrtModel, model: Transformer, ids: Tensor, bar: Any) -> Shipped:
    """KL, flips and perplexity at the level in the file, on windows ids [W, T]."""
    kl = 0.0
    flips = 0
    nll = torch.zeros(2, dtype=torch.float64)
    count = 0
    for window in ids.split(1):
        p = model(window)[0]  # (T, V)
        q = exported(window)[0]
        kl += sum(
            F.kl_div(b.log_softmax(-1), a.log_softmax(-1), log_target=True, reduction="sum").item()
            for a, b in zip(p.split(64), q.split(64))
        )
        flips += int((p.argmax(-1) != q.argmax(-1)).sum())
        nll += torch.stack([F.cross_entropy(logits[:-1], window[0, 1:]).double() for logits in (p, q)])
        count += len(p)
        bar.update()
    torch_perplexity, exported_perplexity = (nll / len(ids)).exp().tolist()
    return Shipped(kl / count, flips, count, (torch_perplexity, exported_perplexity))
