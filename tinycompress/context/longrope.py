"""LongRoPE: a factor for every frequency, searched for on this very model.

LongRoPE: Extending LLM Context Window Beyond 2 Million Tokens (arXiv:2402.13753): f_i' = f_i / λ_i beyond the trained
length L, cos and sin × √(1 + ln s / ln L), s = context / L. An evolutionary search over λ (section 3.3) minimises the
perplexity of long windows: the first generation holds position interpolation (λ = s), NTK-aware scaling, NTK-by-parts
and their mutations; each next one the best quarter, mutations of it and crossovers; always 1 ≤ λ_i ≤ 1.25·s, λ_i ≤
λ_{i+1}. So on the search windows nothing in the first generation is better than what is found; elsewhere it may be.

Within L the frequencies stay as they are (`short="original"`), which ties cached keys to the length in use; with
`short="same"` the searched factors hold at every length, and one table serves (the fast path of an export). The paper's
unscaled first n̂ tokens are not searched: no checkpoint format can express them.

Letters: d head_dim, s context / L.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from ..calibration.data import as_tokens
from ..errors import InputError
from ..evaluation.perplexity import perplexity
from ..files import read_json, write_json
from ..graph.config import Config
from ..graph.graph import Graph
from ..graph.rope import Rope
from ..model.generation import check_ids
from ..progress import tqdm

Factors = tuple[float, ...]
SHORT = ("original", "same")
BEYOND = 1.25  # factors go up to this share of s
SPREAD = 0.25  # of a mutation, in natural logarithms
RATE = 0.5  # of the factors that a mutation changes


@dataclass(frozen=True)
class LongRope:
    """Stretches the context to the length of its tokens, by factors that are searched for on them.

    It measures at most population + (generations - 1) · ¾ · population candidates, each on all windows.

    Fields:
        tokens: windows [N, context] of ids, or an iterable of them: the text that the search measures on.
        population: candidates of a generation, at least 4.
        generations: at least 1.
        short: the factors within the trained length: "original" (none), or "same" (the searched ones everywhere).
        attention_factor: what cos and sin are multiplied by; None is the paper's formula.
        seed: of the mutations and crossovers.
        journal: a JSON file that keeps every measurement: a search that was interrupted, run again, takes up there.
        device: where candidates are measured, such as "cuda"; the weights of the result stay where they were. Default
            None: the device of `tokens`.
        progress: show a bar.

    Errors: an `InputError` for a model that is scaled already, and for windows no longer than its context.
    """

    tokens: Tensor = field(repr=False, compare=False)
    population: int = 16
    generations: int = 6
    short: str = "original"
    attention_factor: float | None = None  # None = the paper's formula
    seed: int = 0
    journal: str | Path | None = field(default=None, repr=False, compare=False, metadata={"key": False})
    device: str | None = field(default=None, repr=False)
    progress: bool = field(default=True, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", as_tokens(self.tokens))
        if self.tokens.dim() != 2 or not len(self.tokens):
            raise InputError("LongRope.tokens", tuple(self.tokens.shape), "[windows, context], at least one window")
        if self.population < 4:
            raise InputError("LongRope.population", self.population, "at least 4")
        if self.generations < 1:
            raise InputError("LongRope.generations", self.generations, "at least 1")
        if self.short not in SHORT:
            raise InputError("LongRope.short", repr(self.short), " | ".join(SHORT))

    def plan(self, config: Config) -> Config:
        """The config of the search's first candidate, position interpolation: the context and the number of factors
        are known, which factors win is not."""
        rope = self._unsearched(config)
        return self._stretched(config, rope, first_factors(rope, config.head_dim)[0])

    def _unsearched(self, config: Config) -> Rope:
        """The model's own Rope with the factor context / L; an InputError where the search has nothing to do."""
        context = self.tokens.shape[1]
        if config.rope.type != "default" or config.rope.original_max_position:
            raise InputError("rope", f"already scaled ({config.rope.type})", "an unscaled model")
        if context <= config.max_position:
            raise InputError(
                "LongRope.tokens",
                f"windows of {context}",
                f"longer ones than the model's context, {config.max_position}",
            )
        return dataclasses.replace(
            config.rope, original_max_position=config.max_position, factor=context / config.max_position
        )

    def _stretched(self, config: Config, rope: Rope, long: Factors) -> Config:
        """The config with the factors `long` [d/2] beyond L; `rope` as `_unsearched` gives it."""
        short = long if self.short == "same" else (1.0,) * len(long)
        scaled = dataclasses.replace(
            rope, type="longrope", short_factor=short, long_factor=long, attention_factor=self.attention_factor
        )
        return dataclasses.replace(config, rope=scaled, max_position=self.tokens.shape[1])

    def __call__(self, graph: Graph) -> Graph:
        config = graph.config
        rope = self._unsearched(config)
        check_ids(self.tokens, config.vocab_size)
        dense = graph.dense()
        device = self.tokens.device if self.device is None else self.device
        journal = Journal(self.journal, self._task(graph))
        budget = self.population + (self.generations - 1) * (self.population - parents(self.population))

        with tqdm(total=budget, desc="LongRoPE", unit="candidate", delay=2, disable=not self.progress) as bar:

            def loss(long: Factors) -> float:
                bar.update()
                if long not in journal.losses:
                    candidate = dense.replace(config=self._stretched(config, rope, long))
                    measured = perplexity(candidate.module(device), self.tokens, progress=False)
                    journal.add(long, measured.nll.mean().item())
                return journal.losses[long]

            first = first_factors(rope, config.head_dim)
            best = search(loss, first, rope.factor, self.population, self.generations, self.seed)
        return graph.replace(config=self._stretched(config, rope, best), by=self)

    def _task(self, graph: Graph) -> str:
        """What a measurement depends on: model, text, and how factors are used."""
        digest = hashlib.sha256(graph.fingerprint().encode())
        digest.update(self.tokens.cpu().contiguous().numpy().tobytes())
        digest.update(f"{tuple(self.tokens.shape)} {self.short} {self.attention_factor}".encode())
        return digest.hexdigest()


def first_factors(rope: Rope, head_dim: int) -> list[Factors]:
    """λ = f / f' [d/2] of position interpolation, NTK-aware scaling and NTK-by-parts, for an unscaled Rope with a
    factor."""
    base = dataclasses.replace(rope, type="default", factor=1.0).inv_freq(head_dim)
    scaled = [dataclasses.replace(rope, type="linear"), dataclasses.replace(rope, type="yarn")]
    if head_dim > 2:
        scaled.append(
            dataclasses.replace(
                rope, type="default", factor=1.0, theta=rope.theta * rope.factor ** (head_dim / (head_dim - 2))
            )
        )
    return [_valid((base / candidate.inv_freq(head_dim)).tolist(), rope.factor) for candidate in scaled]


def search(
    loss: Callable[[Factors], float], first: list[Factors], s: float, population: int, generations: int, seed: int
) -> Factors:
    """The factors of the lowest `loss` that the evolution meets; deterministic by `seed`, ties to the earlier one."""
    draw = random.Random(seed)
    members = list(dict.fromkeys(first))[:population]
    _fill(members, population, lambda: _mutated(draw.choice(first), s, draw))
    scores: dict[Factors, float] = {}
    for generation in range(generations):
        if generation:
            best = sorted(scores, key=scores.__getitem__)[: parents(population)]
            members = _offspring(best, population, s, draw)
        for factors in members:
            if factors not in scores:
                scores[factors] = loss(factors)
    return min(scores, key=scores.__getitem__)


def _offspring(best: list[Factors], population: int, s: float, draw: random.Random) -> list[Factors]:
    """The best, then as many mutations of them as crossovers."""
    members = list(best)
    _fill(members, (population + len(best)) // 2, lambda: _mutated(draw.choice(best), s, draw))
    _fill(members, population, lambda: _crossed(draw.choices(best, k=2), s, draw))
    return members


def parents(population: int) -> int:
    """How many of a generation live on."""
    return max(2, population // 4)


class Journal:
    """Measurements by factors, in memory and in a file that is rewritten after each."""

    def __init__(self, path: str | Path | None, task: str) -> None:
        self.path = path
        self.task = task
        self.losses: dict[Factors, float] = {}
        if path is None or not Path(path).exists():
            return
        data = read_json(path)
        if data.get("task") != task:
            raise InputError(
                f"task in {path}", repr(data.get("task")), "the journal of this model and text, or a new file"
            )
        try:
            self.losses = {tuple(map(float, factors)): float(loss) for factors, loss in data["losses"]}
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"losses in {path}", str(error), "a journal as LongRope writes it, or a new file"
            ) from error

    def add(self, factors: Factors, loss: float) -> None:
        self.losses[factors] = loss
        if self.path is not None:
            write_json(self.path, {"task": self.task, "losses": [[list(f), value] for f, value in self.losses.items()]})


def _valid(factors: list[float], s: float) -> Factors:
    """Within 1 … 1.25·s, rising, in steps of 0.01 (the paper's)."""
    return tuple(sorted(round(min(max(f, 1.0), BEYOND * s), 2) for f in factors))


def _mutated(factors: Factors, s: float, draw: random.Random) -> Factors:
    return _valid([f * (math.exp(draw.gauss(0, SPREAD)) if draw.random() < RATE else 1.0) for f in factors], s)


def _crossed(pair: list[Factors], s: float, draw: random.Random) -> Factors:
    """Each factor from one of two parents."""
    return _valid([draw.choice(values) for values in zip(*pair)], s)


def _fill(members: list[Factors], size: int, make: Callable[[], Factors]) -> None:
    """New members until there are `size`; gives up where chance only repeats itself."""
    for _ in range(20 * size):
        if len(members) >= size:
            return
        member = make()
        if member not in members:
            members.append(member)
