"""Configs of every architecture and stretch that a GGUF file may carry, and those that it may not."""

from tinycompress.graph.config import LINEARS, Config, Layer
from tinycompress.graph.rope import Rope

QKV = frozenset({"q_proj", "k_proj", "v_proj"})
LAYER = Layer(4, 2, 96)
SHORT = tuple(1.0 + i / 10 for i in range(8))
LONG = tuple(2.0 + i / 3 for i in range(8))


def config(layers=(LAYER,) * 4, **fields) -> Config:
    """A tiny config: 64 channels, 4 heads of 16."""
    return Config(
        **{"vocab_size": 96, "hidden_size": 64, "head_dim": 16, "layers": layers, "max_position": 64} | fields
    )


def layers(ropes=(True,) * 4, windows=(None,) * 4) -> tuple[Layer, ...]:
    return tuple(Layer(4, 2, 96, window, rope) for window, rope in zip(windows, ropes))


UNEVEN = (Layer(4, 2, 96), Layer(2, 2, 64), Layer(0, 0, 32), Layer(4, 1, 160))
FOURTH = layers(ropes=(True, True, True, False))
CARRIED = {  # the architecture that is written, and the config
    "llama": ("llama", config()),
    "llama, tied": ("llama", config(tie_embeddings=True)),
    "llama, every bias": ("llama", config(biases=frozenset(LINEARS))),
    "llama, one bias": ("llama", config(biases=frozenset({"k_proj"}))),
    "llama, wide heads": ("llama", config(head_dim=32, biases=QKV)),
    "llama, linear": ("llama", config(rope=Rope(1e4, "linear", 2.5))),
    "llama, yarn": ("llama", config(rope=Rope(1e4, "yarn", 4.0, 16))),
    "llama, yarn, attention factor": ("llama", config(rope=Rope(1e4, "yarn", 4.0, 16, 1.5))),
    "llama, llama3": ("llama", config(rope=Rope(5e5, "llama3", 32.0, 8192), biases=QKV)),
    "qwen2": ("qwen2", config(biases=QKV)),
    "qwen2, tied": ("qwen2", config(biases=QKV, tie_embeddings=True)),
    "qwen2, yarn": ("qwen2", config(biases=QKV, rope=Rope(1e4, "yarn", 4.0, 16))),
    "qwen3": ("qwen3", config(qk_norm_eps=1e-5)),
    "qwen3, wide heads, biases": ("qwen3", config(qk_norm_eps=1e-5, head_dim=32, biases=QKV, tie_embeddings=True)),
    "deci": ("deci", config(UNEVEN)),
    "deci, tied, every bias": ("deci", config(UNEVEN, tie_embeddings=True, biases=frozenset(LINEARS))),
    "deci, llama3": ("deci", config(UNEVEN, rope=Rope(5e5, "llama3", 32.0, 8192))),
    "deci, yarn": ("deci", config(UNEVEN, rope=Rope(1e4, "yarn", 4.0, 16))),
    "smollm3": ("smollm3", config(FOURTH)),
    "smollm3, tied, biases": ("smollm3", config(FOURTH, tie_embeddings=True, biases=QKV)),
}
DIVIDED = {  # stretches that only tensors of divisors can say: the same function, with another name for it
    "yarn, other betas": config(rope=Rope(1e4, "yarn", 4.0, 16, beta_fast=4.0, beta_slow=0.25)),
    "yarn, not truncated": config(rope=Rope(1e4, "yarn", 4.0, 16, truncate=False)),
    "llama3, other ends": config(rope=Rope(1e4, "llama3", 4.0, 16, low_freq_factor=0.5, high_freq_factor=2.0)),
    "longrope, one list": config(rope=Rope(1e4, "longrope", 4.0, 16, short_factor=LONG, long_factor=LONG)),
    "longrope": config(rope=Rope(1e4, "longrope", 4.0, 16, short_factor=SHORT, long_factor=LONG)),
}
WINDOWED = {  # llama.cpp has no windows here: the context is held to the window
    "mistral": ("llama", config(layers(windows=(32,) * 4))),
    "qwen2, some": ("qwen2", config(layers(windows=(None, None, 32, 32)), biases=QKV)),
    "smollm3": ("smollm3", config(layers((True, True, True, False), (None, 32, None, 32)))),
}
