"""The architectures of llama.cpp that the graph carries, and which one computes a config.

  llama     Llama 1 to 3.x, TinyLlama, SmolLM, Mistral and others; the only one that reads stretched frequencies
  qwen2     Qwen1.5, Qwen2, Qwen2.5: biases on queries, keys and values
  qwen3     norms of queries and keys
  smollm3   every fourth layer without RoPE: fixed in llama.cpp, and no key of the file
  deci      layers of different widths (DeciLM, Nemotron-NAS): heads, KV heads and FFN channels are lists

llama, smollm3 and deci turn neighbouring channels (2i, 2i + 1), so their rows of queries and keys are reordered from
the half-split pairs (i, i + d/2) of Hugging Face; the two Qwens keep those. None has a window in llama.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from ..graph.config import LINEARS, Config, layer_of
from .families import QKV

PAIRS = {"q_proj": "n_heads", "k_proj": "n_kv_heads"}  # linears whose rows RoPE pairs, and the heads they are made of


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp computes under a name.

    Fields:
        name: general.architecture; also the prefix of its keys.
        biases: the linears that may have one.
        neighbours: whether RoPE turns channels (2i, 2i + 1), for which rows are reordered.
        qk_norm: whether queries and keys have norms.
        no_rope_every: n where layers n - 1, 2n - 1, … have no RoPE; 0: all have.
        divisors: whether it reads tensors that frequencies are divided by: Llama 3's stretch, and LongRoPE.
        uneven: whether layers may differ in width, and have no attention.
    """

    name: str
    biases: frozenset[str] = QKV
    neighbours: bool = False
    qk_norm: bool = False
    no_rope_every: int = 0
    divisors: bool = False
    uneven: bool = False

    def ropes(self, n_layers: int) -> list[bool]:
        """Whether each layer turns its queries and keys."""
        return [not self.no_rope_every or (index + 1) % self.no_rope_every != 0 for index in range(n_layers)]

    def reordered_heads(self, parameter: str, config: Config) -> int:
        """How many heads a parameter's rows are reordered in; 0: its rows stay in their places."""
        index = layer_of(parameter)
        linear = parameter.split(".")[-2]
        if index is None or linear not in PAIRS or not self.neighbours:
            return 0
        return int(getattr(config.layers[index], PAIRS[linear]))


ARCHITECTURES: Mapping[str, Architecture] = {
    architecture.name: architecture
    for architecture in (
        Architecture("llama", frozenset(LINEARS), neighbours=True, divisors=True),
        Architecture("qwen2"),
        Architecture("qwen3", qk_norm=True),
        Architecture("smollm3", neighbours=True, no_rope_every=4),
        Architecture("deci", frozenset(LINEARS), neighbours=True, divisors=True, uneven=True),
    )
}


def architecture_in(fields: Mapping[str, Any], where: str) -> Architecture:
    """The architecture that a file names; an `InputError` that lists them all for another."""
    name = fields.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise InputError(f"general.architecture in {where}", repr(name), " | ".join(ARCHITECTURES))
    return ARCHITECTURES[name]


def architecture_of(config: Config) -> Architecture:
    """The architecture that computes `config`; an `InputError` for a config that none does."""
    architecture = ARCHITECTURES[_name(config)]
    if architecture.uneven:
        _check_uneven(config)
    if architecture.qk_norm and config.qk_norm_eps != config.norm_eps:
        found = f"norms of queries and keys with eps {config.qk_norm_eps:g} beside {config.norm_eps:g}"
        raise InputError("format gguf", found, "one eps for all norms: all that llama.cpp runs")
    if [layer.rope for layer in config.layers] != architecture.ropes(config.n_layers):
        places = [index for index, layer in enumerate(config.layers) if not layer.rope]
        accepted = "every fourth layer (3, 7, …), as llama.cpp's smollm3 has them"
        raise InputError("format gguf", f"layers {places[:8]} without RoPE", accepted)
    if extra := config.biases - architecture.biases:
        accepted = f"biases on {' | '.join(sorted(architecture.biases))}, for llama.cpp's {architecture.name}"
        raise InputError("format gguf", f"biases on {', '.join(sorted(extra))}", accepted)
    return architecture


def _check_uneven(config: Config) -> None:
    """What llama.cpp's deci cannot run: it takes the width of a head from the first layer, and where there is no FFN it
    goes on to the next layer without what the attention has added."""
    if bare := [index for index, layer in enumerate(config.layers) if not layer.ffn_dim]:
        accepted = 'an FFN in every layer, as Prune(layout="deci") leaves it'
        raise InputError("format gguf", f"layers {bare[:8]} without an FFN beside layers of other widths", accepted)
    if not config.layers[0].n_heads:
        accepted = 'attention in the first layer, as Prune(layout="deci") leaves it'
        raise InputError("format gguf", "layer 0 without attention", accepted)
    if config.qk_norm_eps is not None or not all(layer.rope for layer in config.layers):
        found = "layers of different widths with norms of queries and keys, or with layers without RoPE"
        accepted = 'layers all as wide, as Prune(layout="uniform") leaves them'
        raise InputError("format gguf", found, accepted)


def _name(config: Config) -> str:
    if not config.uniform:
        return "deci"
    if config.qk_norm_eps is not None:
        return "qwen3"
    if not all(layer.rope for layer in config.layers):
        return "smollm3"
    plain = config.rope.type not in ("llama3", "longrope")  # qwen2 reads no such tensors; llama may have biases too
    square = config.layers[0].n_heads * config.head_dim == config.hidden_size  # qwen2 takes nothing else
    return "qwen2" if config.biases == QKV and plain and square else "llama"
