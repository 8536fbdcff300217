"""Passkey retrieval: can the model read a number back from anywhere in a long prompt?

Landmark Attention (arXiv:2305.16300), appendix: an instruction, filler, "The pass key is 12345. Remember it. …",
filler, and the question; the key stands at a chosen share (depth) of the filler. An answer counts when every token of
the key is the likeliest one, which is what greedy decoding would write. A model that cannot do it at its trained length
says nothing about a longer one: measure there first.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.tokenizer import Tokenizer
from ..errors import InputError, need
from ..model.transformer import Transformer
from ..progress import tqdm
from .long_context import check_length


@dataclass(frozen=True)
class Passkey:
    """The texts of the task; `{key}` stands for the number.

    Fields:
        intro: what the model is told first.
        filler: repeated to the length that is asked for.
        statement: holds the key.
        question: what the key is the answer to.
        digits: of the number. Default 5.
    """

    intro: str = (
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
        "I will quiz you about it."
    )
    filler: str = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
    statement: str = "The pass key is {key}. Remember it. {key} is the pass key."
    question: str = "What is the pass key? The pass key is"
    digits: int = 5

    def prompt(
        self, tokenizer: Tokenizer, length: int, depth: float, key: str, bos: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Prompt and answer ids, together exactly `length`: filler is cut to fit, and a share `depth` (0 … 1) of it
        stands before the statement."""
        intro, filler, statement, question = (tokenizer.encode(t.replace("{key}", key)) for t in self.texts)
        whole = tokenizer.encode(f"{self.question} {key}")
        answer = whole[_common(question, whole) :]  # as the tokenizer writes it behind the question
        room = length - len(intro) - len(statement) - len(whole) - (bos is not None)
        if room < 0:
            raise InputError("passkey length", length, f"at least {length - room} tokens: the task without filler")
        if not 0 <= depth <= 1:
            raise InputError("passkey depth", depth, "0 … 1")
        repeated = (filler * (room // len(filler) + 1))[:room]
        before = round(depth * room)
        start = [] if bos is None else [bos]
        ids = [*start, *intro, *repeated[:before], *statement, *repeated[before:], *whole[: len(whole) - len(answer)]]
        return torch.tensor(ids), torch.tensor(answer)

    @property
    def texts(self) -> tuple[str, str, str, str]:
        return self.intro, self.filler, self.statement, self.question

    def key(self, generator: random.Random) -> str:
        return "".join(generator.choices("0123456789", k=self.digits))


@dataclass(frozen=True)
class Retrieval:
    """How many keys were read back.

    Fields:
        lengths: of the prompts, in tokens.
        depths: where the statement stood, as shares of the filler.
        right: keys read back, by length and then by depth.
        trials: keys that were asked for, at each length and depth.
    """

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    right: tuple[tuple[int, ...], ...]
    trials: int

    @property
    def share(self) -> float:
        return sum(map(sum, self.right)) / (self.trials * len(self.lengths) * len(self.depths))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.inference_mode()
def retrieves(model: Transformer, prompt: Tensor, answer: Tensor) -> bool:
    """Whether greedy decoding behind prompt [T] would write answer [n]: one forward, by the argmax at each of its
    tokens."""
    ids = torch.cat((prompt, answer))[None].to(model.device)
    hidden = model.hidden(ids)[0, len(prompt) - 1 : -1]
    return torch.equal(model.lm_head(hidden).argmax(-1).cpu(), answer)


def passkey(
    model: Transformer,
    tokenizer: Tokenizer | None,
    lengths: Sequence[int],
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    trials: int = 10,
    task: Passkey | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Retrieval:
    """Keys read back at every length and depth; keys are drawn by `seed`, the same for every model."""
    if tokenizer is None:
        raise InputError("tokenizer", "none", "a model folder with a tokenizer.json")
    if trials < 1 or not lengths or not depths:
        raise InputError("passkey grid", f"{list(lengths)} × {list(depths)} × {trials} trials", "at least one of each")
    check_length(model, max(lengths))
    task, bar = (
        task or Passkey(),
        tqdm(total=len(lengths) * len(depths) * trials, desc="passkey", unit="prompt", delay=2, disable=not progress),
    )
    rows = []
    with bar:
        for length in lengths:
            row = []
            for depth in depths:
                generator, right = random.Random(f"{seed} {length} {depth}"), 0
                for _ in range(trials):
                    right += retrieves(
                        model, *task.prompt(tokenizer, length, depth, task.key(generator), model.config.bos_token_id)
                    )
                    bar.update()
                row.append(right)
            rows.append(tuple(row))
    return Retrieval(tuple(lengths), tuple(depths), tuple(rows), trials)


def heat_map(results: dict[str, Retrieval], path: str | Path) -> None:
    """A PNG with one panel a name: depth down, length across, the share of keys read back as colour and number."""
    need("matplotlib", "plot")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * len(results) + 0.6, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for ax, (name, result) in zip(figure.subplots(1, len(results), squeeze=False)[0], results.items()):
        shares = torch.tensor(result.right, dtype=torch.float64).T / result.trials  # (depths, lengths)
        ax.imshow(shares.numpy(), vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        ax.set(title=name, xlabel="tokens", ylabel="depth of the key")
        ax.set_xticks(range(len(result.lengths)), [f"{length:,}" for length in result.lengths])
        ax.set_yticks(range(len(result.depths)), [f"{depth:.0%}" for depth in result.depths])
        for y, line in enumerate(shares.tolist()):
            for x, share in enumerate(line):
                ax.text(x, y, f"{share:.0%}", ha="center", va="center", fontsize=8)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.with_name(f".{path.stem}.tmp.png")
    figure.savefig(work, dpi=120)
    os.replace(work, path)


def _common(a: list[int], b: list[int]) -> int:
    """How many ids two lists share at their start."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
