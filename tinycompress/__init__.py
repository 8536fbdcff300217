"""Prune, quantize, distil, stretch and export Llama-family models on one shared graph.

from tinycompress import GPTQ, Prune, load, tokens
graph = load("smollm2-135m")
text = tokens("pydoc", graph.tokenizer, n=32, seq_len=512)
small = GPTQ(text, "w4g64")(Prune(text, "params=0.8")(graph))
"""

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
