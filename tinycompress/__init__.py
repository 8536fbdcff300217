"""Prune, quantize, distil, stretch and export Llama-family models on one shared graph.

from tinycompress import GPTQ, PruneFFN, QuantSpec, load, tokens
graph = load("smollm2-135m")
text = tokens("pydoc", graph.tokenizer, n=32, seq_len=512)
small = GPTQ(text, QuantSpec.parse("w4g64"))(PruneFFN(text, keep=0.75, multiple_of=64)(graph))
"""

from .calibrate import Inputs, gram, walk
from .checkpoint import load, save
from .data import tokens
from .errors import InputError
from .evaluate import agreement, perplexity
from .graph import LLAMA_2_7B, SMOLLM2_135M, TINYLLAMA_1_1B, Axis, Config, Feed, Graph, Layer, Pass, axes, cut, feeds, shapes
from .passes.gptq import GPTQ
from .passes.prune import PruneFFN
from .passes.rope import ScaleRope
from .passes.rtn import RTN
from .pipeline import run
from .quantize import QuantSpec, QuantTensor
from .rope import Rope

__version__ = "0.1.0"

__all__ = [
    "GPTQ",
    "LLAMA_2_7B",
    "RTN",
    "SMOLLM2_135M",
    "TINYLLAMA_1_1B",
    "Axis",
    "Config",
    "Feed",
    "Graph",
    "InputError",
    "Inputs",
    "Layer",
    "Pass",
    "PruneFFN",
    "QuantSpec",
    "QuantTensor",
    "Rope",
    "ScaleRope",
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
