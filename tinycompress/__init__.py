"""Prune, quantize, distil, stretch and export Llama-family models on one shared graph.

from tinycompress import GPTQ, PruneFFN, QuantSpec, load, tokens
graph = load("smollm2-135m")
text = tokens("pydoc", graph.tokenizer, n=32, seq_len=512)
small = GPTQ(text, QuantSpec.parse("w4g64"))(PruneFFN(text, keep=0.75, multiple_of=64)(graph))
"""

from .block_tuning import BlockTuning
from .calibrate import Inputs, gram, walk
from .checkpoint import load, save
from .data import tokens
from .errors import InputError
from .evaluate import agreement, perplexity
from .graph import LLAMA_2_7B, SMOLLM2_135M, TINYLLAMA_1_1B, Axis, Config, Feed, Graph, Layer, Pass, axes, cut, feeds, shapes
from .lora import LoRA
from .losses import Loss
from .passes.autoround import AutoRound
from .passes.awq import AWQ
from .passes.distill import Distill, HiddenLoss
from .passes.gptq import GPTQ
from .passes.hqq import HQQ
from .passes.longrope import LongRope
from .passes.prune import Prune
from .passes.prune_ffn import PruneFFN
from .passes.rope import ChooseRope, ScaleRope
from .passes.rotate import Rotate
from .passes.rtn import RTN
from .pipeline import run
from .quantize import QuantSpec, QuantTensor
from .rope import Rope
from .schedule import Ramp
from .training import Training

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
    "load",
    "perplexity",
    "run",
    "save",
    "shapes",
    "tokens",
    "walk",
]
