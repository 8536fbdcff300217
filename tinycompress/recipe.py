"""From the options of `tinycompress compress` to a list of passes, everything checked on the config before any work."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .context.scale_rope import METHODS as ROPE_METHODS
from .context.scale_rope import ChooseRope, ScaleRope, method_of
from .distillation.distill import Distill
from .distillation.training import Training
from .errors import InputError
from .graph.config import EMBEDDING, Config, shapes
from .graph.graph import Graph, Pass
from .graph.quant_tensor import QuantSpec
from .graph.topology import feeds
from .pruning.allocation import PRUNABLE
from .pruning.prune import Prune
from .pruning.target import TARGET_KINDS, BudgetTarget
from .quantization.embedding import QuantizeEmbedding
from .quantization.gptq import GPTQ
from .quantization.linear_specs import targets
from .quantization.rotate import Rotate
from .quantization.rtn import RTN

METHODS = ("gptq", "rtn")
AUTO = "auto"  # the context scaling that a window of the new length speaks for
WIDTHS = 64  # what FFN widths are multiples of where no quantization asks for another group: NPUs want it


@dataclass(frozen=True)
class Recipe:
    """Prune, then stretch the context, then quantize: each measures the model that the one before it left.

    Fields:
        prune: a budget or axis, as `prune_pass` reads it, such as "params=0.8". Default None: nothing is pruned.
        context: the new context in positions. Default None: it stays.
        rope_method: one of ROPE_METHODS, or AUTO. Default None: that by which the model is already scaled; AUTO for an
            unscaled one.
        quantize: the grid of the linears of the layers. Default None: they stay.
        quantize_method: "gptq" (default) or "rtn", which needs no text.
        quantize_embedding: the grid of the embedding and the head. Default None: they stay.
        rotate: whether the model is turned before GPTQ rounds it. Default None: where that costs nothing, as the head
            has a table of its own.
        tune: whether the scales learn from the model that was given, last of all. Default False.

    Errors: an `InputError` for fields that do not go together; `check` for what does not fit a graph.
    """

    prune: str | None = None
    context: int | None = None
    rope_method: str | None = None
    quantize: QuantSpec | None = None
    quantize_method: str = "gptq"
    quantize_embedding: QuantSpec | None = None
    rotate: bool | None = None
    tune: bool = False

    def __post_init__(self) -> None:
        if self.quantize_method not in METHODS:
            raise InputError("Recipe.quantize_method", repr(self.quantize_method), " | ".join(METHODS))
        if self.rotate and self.quantize is None:
            raise InputError(
                "Recipe.rotate", "without Recipe.quantize", "both: a rotation alone changes nothing but the basis"
            )
        if self.tune and self.quantize is None:
            raise InputError(
                "Recipe.tune", "without Recipe.quantize", "both: what learns are the scales of quantized weights"
            )
        if self.rope_method not in (None, AUTO, *ROPE_METHODS):
            raise InputError("Recipe.rope_method", repr(self.rope_method), " | ".join((AUTO, *ROPE_METHODS)))

    @property
    def calibrates(self) -> bool:
        return self.prune is not None or self.tune or (self.quantize is not None and self.quantize_method == "gptq")

    def rotates(self, graph: Graph) -> bool:
        """Whether the model is rotated before it is quantized."""
        if self.rotate is not None:
            return self.rotate
        return self.quantize is not None and self.quantize_method == "gptq" and not graph.config.tie_embeddings

    @property
    def multiple_of(self) -> int:
        """What pruned widths are multiples of: the groups of the quantization that follows divide them."""
        return (self.quantize and self.quantize.group_size) or WIDTHS

    def scaling(self, graph: Graph) -> str:
        """How the context of `graph` is stretched: one of ROPE_METHODS, or AUTO."""
        return self.rope_method or method_of(graph.config.rope) or AUTO

    def measures_context(self, graph: Graph) -> bool:
        return self.context is not None and self.scaling(graph) == AUTO

    def passes(self, graph: Graph, tokens: Tensor | None = None, long_tokens: Tensor | None = None) -> list[Pass]:
        """The passes for `graph`; those that calibrate do so on `tokens`, and refuse to run without. `long_tokens`
        [windows, context] are what the scaling of the context is chosen on, where it is."""
        tokens = torch.empty(0, 0, dtype=torch.long) if tokens is None else tokens
        out: list[Pass] = []
        if self.prune:
            out.append(prune_pass(tokens, self.prune, self.multiple_of))
        if self.context is not None and self.measures_context(graph):
            out.append(
                ChooseRope(torch.empty(0, self.context, dtype=torch.long) if long_tokens is None else long_tokens)
            )
        elif self.context is not None:
            out.append(ScaleRope(context=self.context, method=self.scaling(graph)))
        if self.rotates(graph):
            out.append(Rotate())
        if self.quantize:
            out.append(
                RTN(without_data(self.quantize)) if self.quantize_method == "rtn" else best_gptq(tokens, self.quantize)
            )
        if self.quantize_embedding:
            out.append(QuantizeEmbedding(self.quantize_embedding))
        if self.tune:
            out.append(tuned_scales(tokens, graph))
        return out

    def check(self, graph: Graph) -> Config:
        """The config that `passes` will arrive at; an InputError for what could not work, without reading a weight."""
        config = graph.config
        for step in self.passes(graph):
            if isinstance(step, Prune):
                config = self._pruned(step, graph)
            else:
                config = planned(step, config)
        if self.quantize_embedding:
            spec = QuantSpec.of(self.quantize_embedding)
            QuantizeEmbedding(dataclasses.replace(spec, group_size=None)).tables(graph)  # still dense?
            spec.group(EMBEDDING, config.hidden_size)
        if self.quantize:
            targets(graph, dataclasses.replace(self.quantize, group_size=None))  # still dense?
            for name, width in linear_inputs(config).items():
                self.quantize.group(name, width)
        return config

    def _pruned(self, step: Prune, graph: Graph) -> Config:
        """The config behind the pruning; its errors name the option and the whole of what was asked for."""
        try:
            step.check(graph)
            return step.plan(graph.config, graph.dtype.itemsize)
        except InputError as error:
            if error.field == "Recipe.prune":
                raise
            raise InputError("Recipe.prune", f"{self.prune} ({error.field}: {error.found})", error.accepted) from None


def planned(step: Pass, config: Config) -> Config:
    """The config behind a pass: its own `plan`, or the same shapes for a pass that has none."""
    plan = getattr(step, "plan", None)
    if plan is None:
        return config
    behind: Config = plan(config)
    return behind


def best_gptq(tokens: Tensor, spec: QuantSpec | Mapping[str, QuantSpec]) -> GPTQ:
    """The gradient-free recipe with the lowest perplexity in benchmarks/results/quantize.md, of those that leave the
    basis alone."""
    return GPTQ(tokens, spec, propagate=0.5, refine=2)


def without_data(spec: QuantSpec) -> QuantSpec:
    """The grid search of the lowest perplexity in benchmarks/results/quantize.md where there is no text; eight bits
    cover the range, which keeps their scales positive, as some NPUs want them."""
    return dataclasses.replace(spec, search="mse") if spec.search == "auto" and spec.bits < 8 else spec


def tuned_scales(tokens: Tensor, teacher: Graph) -> Distill:
    """One pass over the calibration text, window by window in memory: scales and norms towards the float model's
    distribution."""
    return Distill(tokens, teacher, Training(epochs=1, lr=1e-3, warmup=0.1, batch=2, micro_batch=1), scales=True)


def linear_inputs(config: Config) -> dict[str, int]:
    """The input width of every linear of the layers (the head aside)."""
    sizes = shapes(config)
    return {
        name: sizes[f"{name}.weight"][1] for feed in feeds(config) if feed.layer is not None for name in feed.readers
    }


def prune_pass(tokens: Tensor, text: str, multiple_of: int) -> Prune:
    """The pass for `params=0.8`, `bytes=300MB` or `flops=0.8` (one budget; `params=0.8,ffn,heads` names the axes it is
    taken from), or for one axis: a share `ffn=0.75`, or a count `layers=20`."""
    key, _, number = text.partition("=")
    if key in TARGET_KINDS:
        target, *names = text.split(",")
        BudgetTarget.parse(target, "Recipe.prune")
        if unknown := [name for name in names if name not in PRUNABLE]:
            raise InputError(
                "Recipe.prune",
                f"{text!r}: axes {unknown}",
                "the axes behind the budget, such as params=0.8,ffn,heads: " + " | ".join(PRUNABLE),
            )
        return Prune(tokens, target, axes=tuple(names) or Prune.axes, multiple_of=multiple_of)
    budgets = "params=SHARE, bytes=SIZE or flops=SHARE"
    accepted = f"{budgets}, or a share (at most 1.0) or count of ffn=, heads=, kv_heads=, layers= or hidden="
    try:
        amount = float(number) if "." in number else int(number)
    except ValueError:
        amount = -1
    if key not in (*PRUNABLE, "layers", "hidden") or amount <= 0 or (isinstance(amount, float) and not amount <= 1):
        raise InputError("Recipe.prune", repr(text), f"{accepted}, such as params=0.8")
    return Prune(tokens, keep={key: amount}, multiple_of=multiple_of)
