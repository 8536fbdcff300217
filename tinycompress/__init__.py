"""Prune, quantize, distil, stretch and export Llama-family models on one shared graph.

from tinycompress import GPTQ, PruneFFN, QuantSpec, load, tokens
graph = load("smollm2-135m")
text = tokens("pydoc", graph.tokenizer, n=32, seq_len=512)
small = GPTQ(text, QuantSpec.parse("w4g64"))(PruneFFN(text, keep=0.75, multiple_of=64)(graph))
"""

from .calibration.data import tokens
from .calibration.gram import gram
from .calibration.walk import Inputs, walk
from .checkpoints.checkpoint import load, save
from .context.longrope import LongRope
from .context.scale_rope import ChooseRope, ScaleRope
from .distillation.distill import Distill, HiddenLoss
from .distillation.fused_loss import Loss
from .distillation.lora import LoRA
from .distillation.schedule import Ramp
from .distillation.training import Training
from .errors import InputError
from .evaluation.perplexity import agreement, perplexity
from .graph.config import LLAMA_2_7B, SMOLLM2_135M, TINYLLAMA_1_1B, Config, Layer, shapes
from .graph.edit import cut
from .graph.graph import Graph, Pass
from .graph.quant_tensor import QuantSpec, QuantTensor
from .graph.rope import Rope
from .graph.topology import Axis, Feed, axes, feeds
from .model.cpu_memory import keep_memory
from .pipeline import run
from .pruning.prune import Prune
from .pruning.prune_ffn import PruneFFN
from .quantization.autoround import AutoRound
from .quantization.awq import AWQ
from .quantization.block_tuning import BlockTuning
from .quantization.gptq import GPTQ
from .quantization.hqq import HQQ
from .quantization.rotate import Rotate
from .quantization.rtn import RTN

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
    "Feed",
    "Graph",
    "HiddenLoss",
    "InputError",
    "Inputs",
    "Layer",
    "LoRA",
    "LongRope",
    "Loss",
    "Pass",
    "Prune",
    "PruneFFN",
    "QuantSpec",
    "QuantTensor",
    "Ramp",
    "Rope",
    "Rotate",
    "ScaleRope",
    "Training",
    "agreement",
    "axes",
    "cut",
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
