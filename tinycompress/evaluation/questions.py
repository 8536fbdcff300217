"""Questions with choices from a file of JSON lines, scored as lm-evaluation-harness scores multiple choice.

A line is an object with "query", "choices" (a list of texts) and "gold" (the index of the right one). Each choice is
scored as the continuation of its query, behind a space. The answer is the choice with the largest log-likelihood
(`acc`), or with the largest log-likelihood divided by its length in characters (`acc_norm`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.tokenizer import Tokenizer
from ..errors import InputError
from ..model.generation import Stepwise
from ..model.transformer import Transformer
from .likelihood import PairEncoder, log_likelihoods

KEYS = ("query", "choices", "gold")
ANSWER = "\nAnswer:"


@dataclass(frozen=True)
class Question:
    """A query and its choices.

    Fields:
        query: what stands before every choice.
        choices: the answers to choose from, at least two.
        gold: the index of the right one.
    """

    query: str
    choices: tuple[str, ...]
    gold: int


def are_questions(source: str | Path) -> bool:
    """Whether `source` is a file of JSON lines whose first row has a query, choices and a gold answer."""
    path = Path(source).expanduser()
    if path.suffix not in (".jsonl", ".json") or not path.is_file():
        return False
    with path.open(encoding="utf-8") as file:
        first = next((line for line in file if line.strip()), "")
    try:
        row = json.loads(first)
    except json.JSONDecodeError:
        return False
    return isinstance(row, dict) and set(KEYS) <= set(row)


def read_questions(source: str | Path, limit: int | None = None) -> list[Question]:
    """The first `limit` questions of a file of JSON lines, or all. A row of another form is an `InputError`."""
    path = Path(source).expanduser()
    questions: list[Question] = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    questions.append(_question(json.loads(line), f"row {number} of {path}"))
                if limit is not None and len(questions) >= limit:
                    break
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(str(path), f"row {len(questions) + 1}: {error}", "JSON lines in UTF-8") from error
    if not questions:
        raise InputError(str(path), "no rows", f"rows with {', '.join(KEYS)}")
    return questions


def _question(row: Any, where: str) -> Question:
    if not isinstance(row, Mapping) or not set(KEYS) <= set(row):
        found = ", ".join(row) if isinstance(row, Mapping) else f"a {type(row).__name__}"
        raise InputError(where, found, f"an object with {', '.join(KEYS)}")
    query, choices, gold = (row[key] for key in KEYS)
    if not isinstance(query, str):
        raise InputError(f"query in {where}", repr(query), "a string")
    texts = isinstance(choices, list) and all(isinstance(choice, str) and choice for choice in choices)
    if not texts or len(choices) < 2:
        raise InputError(f"choices in {where}", repr(choices), "a list of at least two texts")
    if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(choices):
        raise InputError(f"gold in {where}", repr(gold), f"an index of the choices, 0 … {len(choices) - 1}")
    return Question(query, tuple(choices), gold)


def cue_of(questions: Sequence[Question]) -> str:
    """What is put between query and choice: "\\nAnswer:" where all queries begin with "Question:" and none has that
    already, as the harness's own tasks ask; else nothing."""
    plain = all(q.query.startswith("Question:") and not q.query.rstrip().endswith("Answer:") for q in questions)
    return ANSWER if plain else ""


def prompt_of(question: Question, cue: str) -> str:
    """The text that every choice is scored behind, a space between."""
    return question.query.rstrip() + cue if cue else question.query


@dataclass(frozen=True)
class Scores:
    """How a model scored the choices of questions.

    Fields:
        questions: that were asked.
        likelihoods: the log-likelihood of every choice of every question, in nats.
        cue: what stood between query and choices.
    """

    questions: tuple[Question, ...]
    likelihoods: tuple[tuple[float, ...], ...]
    cue: str = ""

    @property
    def acc(self) -> Tensor:
        """Bool [n]: whether the likeliest choice is the right one."""
        return torch.tensor([_best(row) == q.gold for q, row in zip(self.questions, self.likelihoods)])

    @property
    def acc_norm(self) -> Tensor:
        """Bool [n]: the same, each log-likelihood divided by the characters of its choice."""
        per_character = (
            [value / len(choice) for value, choice in zip(row, q.choices)]
            for q, row in zip(self.questions, self.likelihoods)
        )
        return torch.tensor([_best(row) == q.gold for q, row in zip(self.questions, per_character)])

    @property
    def gold_nll(self) -> Tensor:
        """Float64 [n]: -log p(right choice | one of the choices), in nats."""
        rows = (torch.tensor(row, dtype=torch.float64).log_softmax(0) for row in self.likelihoods)
        return torch.stack([-row[q.gold] for q, row in zip(self.questions, rows)])

    @property
    def metrics(self) -> dict[str, Tensor]:
        """A value for every question, by metric."""
        return {"acc": self.acc, "acc_norm": self.acc_norm, "gold_nll": self.gold_nll}


def _best(values: Sequence[float]) -> int:
    """The index of the largest; the first of equal ones."""
    return max(range(len(values)), key=values.__getitem__)


def answer(
    model: Transformer | Stepwise,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    cue: str | None = None,
    progress: bool = True,
) -> Scores:
    """Scores every choice of every question.

    Args:
        model: in torch, or an exported one.
        tokenizer: of the model.
        questions: to ask.
        cue: what is put between query and choice; None is as `cue_of` says.
        progress: whether a bar is shown after two seconds.
    """
    encoder = PairEncoder(tokenizer, model.config)
    cue = cue_of(questions) if cue is None else cue
    texts = [(prompt_of(q, cue), f" {choice}") for q in questions for choice in q.choices]
    scores = iter(log_likelihoods(model, [encoder.pair(*text) for text in texts], progress=progress))
    rows = tuple(tuple(next(scores).value for _ in q.choices) for q in questions)
    return Scores(tuple(questions), rows, cue)
