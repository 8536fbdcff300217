"""The int8 cache of GroupQueryAttention: its scales, from text.

  q = clip(round(x / s), -128, 127),   x ≈ s · q,   s = h · max|x| / 127, one a channel of a KV head, fixed in the file

The operator rounds new keys (rotated) and values as it writes them, and reads them back as s · q
(docs/ContribOperators.md of ONNX Runtime, k_scale and v_scale, "PER_CHANNEL": keys have channels of their own size,
KIVI, arXiv:2402.02750). A position then costs a quarter of the float cache's bytes.

A rotated key turns within its pairs of channels (i, i + d/2), by another angle at every position: what one channel
holds at the positions of the text says little of the others. The pair's length √(k_i² + k_{i+d/2}²) is the same at all
of them, so it is the range of both. One channel rarely holds all of it, so keys have room for unseen text without a
margin (h = 1); values have h = 1.25.

Letters: B batch, K KV heads, T positions, d head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tinycompress.calibration.walk import check_calibration
from tinycompress.errors import InputError
from tinycompress.graph.config import Config, layer_names
from tinycompress.graph.graph import Graph
from tinycompress.progress import tqdm

from ..profiles import Profile
from .attention import fused
from .emit import attention_layers

CACHES = ("float32", "int8")
HEADROOM = {"key": 1.0, "value": 1.25}  # of ranges over what the text showed, against clipping unseen text
LARGEST_INTEGER = 127
SMALLEST = 1e-6  # a channel that is always zero still needs a step
LARGEST_DENSE = 1 << 33  # bytes up to which torch runs packed weights unpacked


def check_cache(cache: str, config: Config, profile: Profile) -> None:
    """An `InputError` for a cache type that the profile, or its attention operator, does not take."""
    if cache not in CACHES:
        raise InputError("kv", repr(cache), " | ".join(CACHES))
    if cache not in profile.caches:
        raise InputError(
            f"kv for the {profile.name} profile",
            repr(cache),
            " | ".join(profile.caches) + " (int8 is the ort profile's)",
        )
    if cache == "int8" and not fused(config, profile):
        found = f"head_dim {config.head_dim}, rope.type {config.rope.type!r}"
        multiple = profile.head_dim_multiple
        accepted = (
            f"float32: int8 is GroupQueryAttention's, for head_dim in multiples of {multiple} and one rotary table"
        )
        raise InputError("kv 'int8'", found, accepted)


def scale_names(config: Config) -> list[tuple[str, str]]:
    """The initializers of every cache entry: key and value scales, float32 [1, K, 1, d]."""
    return [
        (f"{layer_names(i).attention}.key_scale", f"{layer_names(i).attention}.value_scale")
        for i in attention_layers(config)
    ]


@torch.inference_mode()
def cache_scales(graph: Graph, tokens: Tensor, progress: bool = True) -> dict[str, Tensor]:
    """The scales of every cache entry, by the names above, from `tokens` [windows, T]."""
    tokens = check_calibration(graph, tokens)
    config = graph.config
    model = (graph.dense(torch.float32) if 4 * config.n_params <= LARGEST_DENSE else graph).module()
    entries = list(zip(attention_layers(config), scale_names(config)))
    peaks: dict[str, Tensor] = {}
    for window in tqdm(tokens, desc="cache ranges", unit="window", delay=2, disable=not progress):
        cache = model.new_cache(1, len(window))  # of one prefill it keeps all, also where a layer has a window
        model(window[None], cache)
        for i, names in entries:
            keys, values = cache.layers[i]  # (1, K, T, d)
            length = keys.unflatten(-1, (2, -1)).square().sum(-2).sqrt()  # (1, K, T, d/2)
            for name, x in zip(names, (torch.cat([length, length], -1), values.abs())):
                peak = x.amax(2, keepdim=True)
                if not torch.isfinite(peak).all():
                    raise InputError(
                        f"range of {name}", "NaN or infinite values", "finite ones (look at the weights before it)"
                    )
                peaks[name] = torch.maximum(peaks[name], peak) if name in peaks else peak
    return {
        name: (peak * (HEADROOM[_kind(name)] / LARGEST_INTEGER)).clamp_min(SMALLEST) for name, peak in peaks.items()
    }


def _kind(name: str) -> str:
    return "key" if name.endswith("key_scale") else "value"
