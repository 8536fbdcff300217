"""The graph: a model as a value, what reads what in it, and what is cut together."""

from .config import Config, Layer, Linear, shapes
from .edit import cut, fold
from .graph import Graph, LazyTensor, Pass, Weight, Weights
from .presets import LLAMA_2_7B, SMOLLM2_135M, TINYLLAMA_1_1B
from .quant_tensor import Grid, QuantSpec, QuantTensor
from .rope import Rope
from .topology import Axis, Feed, axes, feeds

__all__ = [
    "LLAMA_2_7B",
    "SMOLLM2_135M",
    "TINYLLAMA_1_1B",
    "Axis",
    "Config",
    "Feed",
    "Graph",
    "Grid",
    "Layer",
    "LazyTensor",
    "Linear",
    "Pass",
    "QuantSpec",
    "QuantTensor",
    "Rope",
    "Weight",
    "Weights",
    "axes",
    "cut",
    "feeds",
    "fold",
    "shapes",
]
