"""RoPE context scaling: positions beyond the trained length L, by a factor s = context / L. No data, no weights change.

  linear         position interpolation (arXiv:2306.15595):   f / s
  ntk            NTK-aware: theta · s^(d/(d-2)), so that the lowest frequency is divided by s and the highest kept
  dynamic        NTK-aware by the length l in use: theta · (s·l/L - (s - 1))^(d/(d-2)) once l > L, unscaled until then
  ntk-by-parts   f/s below one turn in L, f above 32 turns, a ramp between (arXiv:2309.00071, section 3.2)
  yarn           the same, and cos, sin × (0.1·ln s + 1) (section 3.3)
  llama3         f/s for wavelengths above L, f below L/4, a mixture between

The equations live in `tinycompress.graph.rope.Rope`; model and export read them there. LongRoPE's factors are searched
for (`longrope.py`); Self-Extend changes no graph (`model/self_extend.py`).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from torch import Tensor

from ..calibration.data import as_tokens
from ..errors import InputError
from ..evaluation.perplexity import perplexity
from ..graph.config import Config
from ..graph.graph import Graph
from ..graph.rope import Rope
from ..progress import tqdm

METHODS = ("linear", "ntk", "ntk-by-parts", "dynamic", "yarn", "llama3")
# one table serves every length; linear lost to these wherever it was measured (docs/context.md)
UNTRAINED = ("ntk", "ntk-by-parts", "yarn")


@dataclass(frozen=True)
class ScaleRope:
    """Stretches the context without data: only the config changes, by the equations at the head of this file.

    Fields:
        context: the new context in positions, at least the present one.
        method: "linear", "ntk", "ntk-by-parts", "dynamic", "yarn" (default) or "llama3".
        device: taken as by every pass; no tensor is read or made, so it changes nothing. Default None.

    Errors: an `InputError` for unknown methods, for a context shorter than the present one, and for a model that was
    scaled by another method.
    """

    context: int
    method: str = "yarn"
    device: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InputError("ScaleRope.method", repr(self.method), " | ".join(METHODS))
        if isinstance(self.context, bool) or not isinstance(self.context, int) or self.context < 1:
            raise InputError("ScaleRope.context", self.context, "a positive number of positions")

    def plan(self, config: Config) -> Config:
        """The config of a graph that was stretched; needs no data."""
        if self.context < config.max_position:
            accepted = (
                f"at least the model's present context, {config.max_position} (a factor below 1 stretches nothing)"
            )
            raise InputError("ScaleRope.context", self.context, accepted)
        rope = scale_rope(config.rope, self.context, config.max_position, config.head_dim, self.method)
        return dataclasses.replace(config, rope=rope, max_position=self.context)

    def __call__(self, graph: Graph) -> Graph:
        return graph.replace(config=self.plan(graph.config), by=self)


@dataclass(frozen=True)
class ChooseRope:
    """Stretches the context by whichever method has the lowest perplexity on text of the new length.

    No method is the best one for every model, head_dim and factor, and a few windows tell. The history names the method
    that was chosen, as a `ScaleRope`.

    Fields:
        tokens: windows [N, context] of ids, or an iterable of them; their length is the new context.
        methods: those that compete. By default the ones that one table serves at every length, without linear, which is
            far behind them without fine-tuning.
        device: where the perplexities are measured, such as "cuda"; the weights of the result stay where they were.
            Default None: the device of `tokens`.
        progress: show a bar.

    Errors: an `InputError` for unknown methods, for tokens that are no windows, and for a model that one of the methods
    cannot stretch.
    """

    tokens: Tensor = field(repr=False, compare=False)
    methods: tuple[str, ...] = UNTRAINED
    device: str | None = field(default=None, repr=False)
    progress: bool = field(default=True, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", as_tokens(self.tokens))
        unknown = sorted(set(self.methods) - set(METHODS))
        if unknown or not self.methods:
            raise InputError("ChooseRope.methods", unknown or "none", " | ".join(METHODS))

    def plan(self, config: Config) -> Config:
        """The config that the first of the methods gives: the context is known, which method wins is not.

        tokens may be without windows, [0, context]. An `InputError` where one of the methods cannot stretch the model.
        """
        if self.tokens.dim() != 2:
            raise InputError("ChooseRope.tokens", tuple(self.tokens.shape), "[windows, context]")
        planned = [ScaleRope(self.tokens.shape[1], method).plan(config) for method in self.methods]
        return planned[0]

    def __call__(self, graph: Graph) -> Graph:
        if self.tokens.dim() != 2 or not len(self.tokens):
            raise InputError("ChooseRope.tokens", tuple(self.tokens.shape), "[windows, context], at least one window")
        scaled = [ScaleRope(self.tokens.shape[1], method)(graph) for method in self.methods]
        dense = graph.dense()
        device = self.tokens.device if self.device is None else self.device
        losses: list[float] = []
        for choice in tqdm(scaled, desc="ChooseRope", unit="method", delay=2, disable=not self.progress):
            model = dense.replace(config=choice.config).module(device)
            losses.append(perplexity(model, self.tokens, progress=False).nll.mean().item())
        return scaled[min(range(len(scaled)), key=losses.__getitem__)]


def scale_rope(rope: Rope, context: int, trained: int, head_dim: int, method: str) -> Rope:
    """The Rope for `context` positions of a model trained on `trained`. Scaling again starts from the first length."""
    original = rope.original_max_position or round(trained / rope.factor)
    if context < original:
        raise InputError("context", context, f"at least the trained length, {original} (a factor of at least 1)")
    factor = context / original
    scaled = rope.type != "default" or original != trained
    if scaled and method != method_of(rope):
        found = f"already scaled ({rope.type}, {original} → {trained})"
        raise InputError(
            "rope",
            found,
            "an unscaled model, or the same method again (ntk excepted: its theta does not tell the first one)",
        )
    if method == "ntk":
        if head_dim < 4:
            raise InputError("head_dim for ntk", head_dim, "at least 4: the exponent is d / (d - 2)")
        theta = rope.theta * factor ** (head_dim / (head_dim - 2))
        return Rope(theta=theta, original_max_position=original)
    out = dataclasses.replace(
        rope, type="yarn" if method == "ntk-by-parts" else method, factor=factor, original_max_position=original
    )
    return dataclasses.replace(out, attention_factor=1.0) if method == "ntk-by-parts" else out


def method_of(rope: Rope) -> str | None:
    """The method that scales to this Rope and can do so again; None for others (and for none)."""
    if rope.type == "yarn":
        return {None: "yarn", 1.0: "ntk-by-parts"}.get(rope.attention_factor)
    return rope.type if rope.type in METHODS else None
