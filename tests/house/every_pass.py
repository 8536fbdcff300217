"""Every pass that the package exports, small."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from conftest import random_graph

import tinycompress as tc

CONFIG = tc.Config(
    vocab_size=128, hidden_size=64, head_dim=16, layers=(tc.Layer(4, 2, 96),) * 2, max_position=32, tie_embeddings=False
)
SPEC = "w4g16"
TOKENS = torch.randint(128, (8, 16), generator=torch.Generator().manual_seed(0))
TEACHER = random_graph(CONFIG, seed=1)
TUNING = tc.BlockTuning(steps=2)

PASSES: dict[str, Callable[[], Any]] = {
    "AWQ": lambda: tc.AWQ(TOKENS, SPEC),
    "AutoRound": lambda: lambda graph: tc.AutoRound(TOKENS, graph, TUNING)(tc.RTN(SPEC)(graph)),
    "ChooseRope": lambda: tc.ChooseRope(torch.cat([TOKENS, TOKENS, TOKENS, TOKENS], 1)[:2]),
    "Distill": lambda: tc.Distill(TOKENS, TEACHER, tc.Training(steps=2, batch=2), held_out=TOKENS[:2], on_policy=0.5),
    "Drop": lambda: tc.Drop(TOKENS, 1),
    "GPTQ": lambda: tc.GPTQ(TOKENS, SPEC),
    "HQQ": lambda: tc.HQQ(SPEC),
    "LongRope": lambda: tc.LongRope(torch.cat([TOKENS, TOKENS, TOKENS, TOKENS], 1)[:1], population=4, generations=1),
    "MixedBits": lambda: tc.MixedBits(TOKENS, tc.RTN, bits=6, choices=("w3g16", "w4g16", "w8g16")),
    "Prune": lambda: tc.Prune(TOKENS, "params=0.8", multiple_of=16),
    "PruneFFN": lambda: tc.PruneFFN(TOKENS, keep=0.75, multiple_of=16),
    "QuantizeEmbedding": lambda: tc.QuantizeEmbedding("w8g16"),
    "RTN": lambda: tc.RTN(SPEC),
    "Rotate": lambda: tc.Rotate(),
    "ScaleRope": lambda: tc.ScaleRope(64),
    "Slice": lambda: tc.Slice(TOKENS, 48),
    "SmoothQuant": lambda: tc.SmoothQuant(TOKENS),
}
