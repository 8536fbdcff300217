"""Configs of well-known models: vocabulary, hidden size, head_dim and layers, then what is out of the ordinary."""

from __future__ import annotations

from .config import Config, Layer
from .rope import Rope

TINYLLAMA_1_1B = Config(32000, 2048, 64, (Layer(32, 4, 5632),) * 22, bos_token_id=1, eos_token_id=2)
LLAMA_2_7B = Config(
    *(32000, 4096, 128, (Layer(32, 32, 11008),) * 32), max_position=4096, bos_token_id=1, eos_token_id=2
)
SMOLLM2_135M = Config(
    *(49152, 576, 64, (Layer(9, 3, 1536),) * 30, Rope(100000.0), 8192),
    tie_embeddings=True,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=2,
)
