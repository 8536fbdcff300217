"""Random models of every family, as transformers makes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SLIDING = {"use_sliding_window": True, "sliding_window": 9}
CASES = {
    "llama": {},
    "llama, biases": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 16},
    "mistral, all positions": {"sliding_window": None},
    "qwen2": {},
    "qwen2, tied": {"tie_word_embeddings": True},
    "qwen2, windows": {**SLIDING, "max_window_layers": 2},
    "qwen3": {"head_dim": 32},
    "qwen3, tied, biases, windows": {
        "attention_bias": True,
        "tie_word_embeddings": True,
        **SLIDING,
        "max_window_layers": 1,
    },
    "smollm3": {},
    "smollm3, all": {"no_rope_layers": [0, 1, 1, 0], "attention_bias": True, "mlp_bias": True, **SLIDING},
}


def model_of(case: str, **sizes: Any) -> Any:
    """A random model of transformers, its norms and biases no ones and zeros."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(case.partition(",")[0], **{**SIZES, **CASES[case], **sizes})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data = torch.randn_like(parameter) * 0.3 + ("norm" in name)
    return model
