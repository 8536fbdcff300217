"""Prune, quantize, distil, stretch and export Llama-family models on one shared graph.

from tinycompress import GPTQ, Prune, load, tokens
graph = load("smollm2-135m")
text = tokens("pydoc", graph.tokenizer, n=32, seq_len=512)
small = GPTQ(text, "w4g64")(Prune(text, "params=0.8")(graph))

A name is imported when it is first used (PEP 562), so that a command that only answers a typing mistake need not wait
for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .calibration.data import as_tokens, tokens
    from .calibration.gram import gram
    from .calibration.walk import Inputs, walk
    from .checkpoints.checkpoint import load, save
    from .context.longrope import LongRope
    from .context.scale_rope import ChooseRope, ScaleRope
    from .distillation.distill import Distill
    from .distillation.divergences import Loss
    from .distillation.hidden_losses import HiddenLoss
    from .distillation.lora import LoRA
    from .distillation.schedule import Ramp
    from .distillation.training import Training
    from .errors import InputError
    from .evaluation.divergence import divergence
    from .evaluation.perplexity import perplexity
    from .graph import (
        LLAMA_2_7B,
        SMOLLM2_135M,
        TINYLLAMA_1_1B,
        Axis,
        Config,
        Feed,
        Graph,
        Grid,
        Layer,
        Linear,
        Pass,
        QuantSpec,
        QuantTensor,
        Rope,
        axes,
        cut,
        feeds,
        shapes,
    )
    from .model.cpu_memory import keep_memory
    from .pipeline import run
    from .pruning.drop import Drop
    from .pruning.prune import Prune
    from .pruning.prune_ffn import PruneFFN
    from .pruning.slice import Slice
    from .quantization.autoround import AutoRound
    from .quantization.awq import AWQ
    from .quantization.block_tuning import BlockTuning
    from .quantization.embedding import QuantizeEmbedding
    from .quantization.gptq import GPTQ
    from .quantization.hqq import HQQ
    from .quantization.mixed_bits import MixedBits
    from .quantization.rotate import Rotate
    from .quantization.rtn import RTN
    from .quantization.smoothquant import SmoothQuant

__version__ = "0.1.0"

MODULES = {  # what each module gives to the package; the imports above say the same to type checkers
    "calibration.data": "as_tokens tokens",
    "calibration.gram": "gram",
    "calibration.walk": "Inputs walk",
    "checkpoints.checkpoint": "load save",
    "context.longrope": "LongRope",
    "context.scale_rope": "ChooseRope ScaleRope",
    "distillation.distill": "Distill",
    "distillation.divergences": "Loss",
    "distillation.hidden_losses": "HiddenLoss",
    "distillation.lora": "LoRA",
    "distillation.schedule": "Ramp",
    "distillation.training": "Training",
    "errors": "InputError",
    "evaluation.divergence": "divergence",
    "evaluation.perplexity": "perplexity",
    "graph": "Axis Config Feed Graph Grid LLAMA_2_7B Layer Linear Pass QuantSpec QuantTensor Rope SMOLLM2_135M "
    "TINYLLAMA_1_1B axes cut feeds shapes",
    "model.cpu_memory": "keep_memory",
    "pipeline": "run",
    "pruning.drop": "Drop",
    "pruning.prune": "Prune",
    "pruning.prune_ffn": "PruneFFN",
    "pruning.slice": "Slice",
    "quantization.autoround": "AutoRound",
    "quantization.awq": "AWQ",
    "quantization.block_tuning": "BlockTuning",
    "quantization.embedding": "QuantizeEmbedding",
    "quantization.gptq": "GPTQ",
    "quantization.hqq": "HQQ",
    "quantization.mixed_bits": "MixedBits",
    "quantization.rotate": "Rotate",
    "quantization.rtn": "RTN",
    "quantization.smoothquant": "SmoothQuant",
}
ROOMS = (
    *("calibration", "checkpoints", "context", "distillation", "evaluation", "files", "graph", "model", "pruning"),
    *("quantization", "recipe"),
)
HOMES = {name: module for module, names in MODULES.items() for name in names.split()}

__all__ = [
    "AWQ",
    "GPTQ",
    "HQQ",
    "LLAMA_2_7B",
    "RTN",
    "SMOLLM2_135M",
    "TINYLLAMA_1_1B",
    "AutoRound",
    "Axis",
    "BlockTuning",
    "ChooseRope",
    "Config",
    "Distill",
    "Drop",
    "Feed",
    "Graph",
    "Grid",
    "HiddenLoss",
    "InputError",
    "Inputs",
    "Layer",
    "Linear",
    "LoRA",
    "LongRope",
    "Loss",
    "MixedBits",
    "Pass",
    "Prune",
    "PruneFFN",
    "QuantSpec",
    "QuantTensor",
    "QuantizeEmbedding",
    "Ramp",
    "Rope",
    "Rotate",
    "ScaleRope",
    "Slice",
    "SmoothQuant",
    "Training",
    "as_tokens",
    "axes",
    "cut",
    "divergence",
    "feeds",
    "gram",
    "keep_memory",
    "load",
    "perplexity",
    "run",
    "save",
    "shapes",
    "tokens",
    "walk",
]


def __getattr__(name: str) -> Any:
    """The public name, from the module that defines it; or a room of the package, such as `tinycompress.graph`."""
    if name in ROOMS:
        return importlib.import_module(f".{name}", __name__)
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{HOMES[name]}", __name__), name)
    globals()[name] = value  # so that this is asked once
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
