"""From the options of `tinycompress compress` to a recipe: which passes, with which fields, in which order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..context.scale_rope import METHODS as ROPE_METHODS
from ..context.scale_rope import method_of
from ..distillation.distill import Distill
from ..distillation.training import Training
from ..errors import InputError
from ..graph.config import Config, shapes
from ..graph.graph import Graph
from ..graph.quant_tensor import Grid, QuantSpec
from ..graph.topology import feeds
from ..pruning.allocation import PRUNABLE
from ..pruning.target import TARGET_KINDS, BudgetTarget
from ..quantization.gptq import GPTQ
from .recipe import Recipe

AUTO = "auto"  # the context scaling that a window of the new length speaks for
LONGROPE = "longrope"
STRETCHING = (AUTO, *ROPE_METHODS, LONGROPE)
WIDTHS = 64  # what FFN widths are multiples of where no quantization asks for another group: NPUs want it
# the lowest perplexity in benchmarks/results/quantize.md of the gradient-free recipes that leave the basis alone
BEST_GPTQ: dict[str, Any] = {"propagate": 0.5, "refine": 2}
TUNED = {"epochs": 1, "lr": 1e-3, "warmup": 0.1, "batch": 2, "micro_batch": 1}  # window by window in memory
MIXED_BITS = (2, 3, 4, 8)
METHODS = ("gptq", "rtn", "hqq", "awq", "autoround", "smoothquant", "mixed")
Step = dict[str, Any]  # a [[pass]] table


@dataclass(frozen=True)
class Options:
    """Prune, then stretch the context, then quantize: each measures the model that the one before it left.

    Fields:
        prune: a budget or axis, as `prune_step` reads it, such as "params=0.8". Default None: nothing is pruned.
        context: the new context in positions. Default None: it stays.
        rope_method: one of ROPE_METHODS, AUTO or LONGROPE. Default None: that by which the model is already scaled;
            AUTO for an unscaled one.
        quantize: the grid of the linears of the layers. Default None: they stay.
        quantize_method: one of METHODS. Default "gptq"; "rtn" and "hqq" need no text.
        quantize_embedding: the grid of the embedding and the head. Default None: they stay.
        rotate: whether the model is turned before GPTQ rounds it. Default None: where that costs nothing, as the head
            has a table of its own.
        tune: whether the scales learn from the model that was given, last of all. Default False.

    Errors: an `InputError` for fields that do not go together.
    """

    prune: str | None = None
    context: int | None = None
    rope_method: str | None = None
    quantize: str | None = None
    quantize_method: str = "gptq"
    quantize_embedding: str | None = None
    rotate: bool | None = None
    tune: bool = False

    def __post_init__(self) -> None:
        for text in (self.quantize, self.quantize_embedding):
            if text is not None:
                QuantSpec.parse(text)
        if self.quantize_method not in METHODS:
            raise InputError("Options.quantize_method", repr(self.quantize_method), " | ".join(METHODS))
        if self.rotate and self.quantize is None:
            accepted = "both: a rotation alone changes nothing but the basis"
            raise InputError("Options.rotate", "without Options.quantize", accepted)
        if self.tune and self.quantize is None:
            accepted = "both: what learns are the scales of quantized weights"
            raise InputError("Options.tune", "without Options.quantize", accepted)
        if self.rope_method not in (None, *STRETCHING):
            raise InputError("Options.rope_method", repr(self.rope_method), " | ".join(STRETCHING))

    def steps(self, config: Config) -> list[Step]:
        """The [[pass]] tables for a model."""
        out: list[Step] = []
        if self.prune:
            group = QuantSpec.parse(self.quantize).group_size if self.quantize else None
            out.append(prune_step(self.prune, group or WIDTHS) | self._stored(config))
        if self.context is not None:
            out.append(self._stretch(config, self.context))
        if self._rotates(config):
            out.append({"name": "Rotate"})
        if self.quantize:
            out += quantize_steps(self.quantize, self.quantize_method)
        if self.quantize_embedding:
            out.append({"name": "QuantizeEmbedding", "spec": self.quantize_embedding})
        if self.tune:
            out.append({"name": "Distill", "teacher": "model", "scales": True, "training": dict(TUNED)})
        return out

    def recipe(self, config: Config) -> Recipe:
        """The recipe for a model; it names none."""
        return Recipe.of({"pass": self.steps(config)})

    def _stored(self, config: Config) -> dict[str, Any]:
        """How a budget in bytes counts: as the weights will lie on disk."""
        grids = {"linears": self.quantize, "tables": self.quantize_embedding}
        stored = {key: grid for key, grid in grids.items() if grid is not None}
        if not stored or not (self.prune or "").lower().startswith("bytes="):
            return {}
        return {"stored": stored | ({"head": "own"} if self._rotates(config) and config.tie_embeddings else {})}

    def _rotates(self, config: Config) -> bool:
        if self.rotate is not None:
            return self.rotate
        return self.quantize is not None and self.quantize_method == "gptq" and not config.tie_embeddings

    def _stretch(self, config: Config, context: int) -> Step:
        method = self.rope_method or method_of(config.rope) or AUTO
        if method in (AUTO, LONGROPE):
            name = "ChooseRope" if method == AUTO else "LongRope"
            return {"name": name, "tokens": {"samples": 1, "seq_len": context}}
        return {"name": "ScaleRope", "context": context, "method": method}


def quantize_steps(spec: str, method: str) -> list[Step]:
    """The passes by which `method`, one of METHODS, packs the linears of the layers on the grid `spec`."""
    if method == "gptq":
        return [{"name": "GPTQ", "spec": spec} | BEST_GPTQ]
    if method in ("awq", "hqq"):
        return [{"name": method.upper(), "spec": spec}]
    if method == "mixed":
        return [mixed_step(QuantSpec.parse(spec))]
    rounding: Step = {"name": "RTN", "spec": searched(spec)}
    if method == "smoothquant":
        return [{"name": "SmoothQuant"}, rounding]
    if method == "autoround":
        return [rounding, {"name": "AutoRound", "reference": "model"}]
    return [rounding]


def searched(spec: str) -> str | dict[str, str]:
    """The grid search of the lowest perplexity in benchmarks/results/quantize.md where there is no text; eight bits
    cover the range, which keeps their scales positive, as some NPUs want them."""
    parsed = QuantSpec.parse(spec)
    least_squares = parsed.search == "auto" and parsed.bits < 8
    return {"grid": spec, "search": "mse"} if least_squares else spec


def mixed_step(spec: Grid) -> Step:
    """Grids of the same groups for every linear, with as many bits on the average as `spec` takes with its scales."""
    if spec.group_size is None:
        raise InputError("Options.quantize_method", f"'mixed' with {spec}", "a grid with groups, such as w4g64")
    choices = [str(Grid(bits, spec.group_size)) for bits in MIXED_BITS]
    average = spec.bits + 32 / spec.group_size
    return {"name": "MixedBits", "quantizer": {"name": "GPTQ"} | BEST_GPTQ, "bits": average, "choices": choices}


def prune_step(text: str, multiple_of: int) -> Step:
    """The pass for `params=0.8`, `bytes=300MB` or `flops=0.8` (one budget; `params=0.8,ffn,heads` names the axes it is
    taken from, `params=0.8,layout=deci` what the result must fit), for one axis: a share `ffn=0.75`, or a count
    `layers=20`; for `slice=512` (hidden channels by rotation) and `drop=4` (layers, one at a time)."""
    key, _, number = text.partition("=")
    if key in TARGET_KINDS:
        target, *names = text.split(",")
        BudgetTarget.parse(target, "Options.prune")
        layouts = [name.removeprefix("layout=") for name in names if name.startswith("layout=")]
        names = [name for name in names if not name.startswith("layout=")]
        if unknown := [name for name in names if name not in PRUNABLE]:
            accepted = "the axes behind the budget, such as params=0.8,ffn,heads: " + " | ".join(PRUNABLE)
            raise InputError("Options.prune", f"{text!r}: axes {unknown}", accepted)
        axes = {"axes": names} if names else {}
        layout = {"layout": layouts[-1]} if layouts else {}
        return {"name": "Prune", "target": target} | axes | {"multiple_of": multiple_of} | layout
    try:
        amount = float(number) if "." in number else int(number)
    except ValueError:
        amount = -1
    share = isinstance(amount, float)
    if key in ("slice", "drop") and amount > 0 and not share:
        return {"name": "Slice", "hidden": amount} if key == "slice" else {"name": "Drop", "count": amount}
    if key not in (*PRUNABLE, "layers", "hidden") or amount <= 0 or (share and not amount <= 1):
        budgets = "params=SHARE, bytes=SIZE or flops=SHARE"
        axes_of = "a share (at most 1.0) or count of ffn=, heads=, kv_heads=, layers= or hidden=, slice= or drop="
        raise InputError("Options.prune", repr(text), f"{budgets}, or {axes_of}, such as params=0.8")
    return {"name": "Prune", "keep": {key: amount}, "multiple_of": multiple_of}


def best_gptq(tokens: Tensor, spec: QuantSpec | Mapping[str, QuantSpec]) -> GPTQ:
    """GPTQ as `compress --quantize` runs it."""
    return GPTQ(tokens, spec, **BEST_GPTQ)


def tuned_scales(tokens: Tensor, teacher: Graph) -> Distill:
    """What `compress --tune` does: one pass over the calibration text, with scales and norms towards the float model's
    distribution."""
    return Distill(tokens, teacher, Training(**TUNED), scales=True)  # type: ignore[arg-type]


def linear_inputs(config: Config) -> dict[str, int]:
    """The input width of every linear of the layers (the head aside)."""
    sizes = shapes(config)
    return {
        name: sizes[f"{name}.weight"][1] for feed in feeds(config) if feed.layer is not None for name in feed.readers
    }
