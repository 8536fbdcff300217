"""Log-likelihoods and texts of many inputs at once, against one input at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F

from tinycompress.errors import InputError
from tinycompress.evaluation.completions import completions
from tinycompress.evaluation.likelihood import Likelihood, Pair, _batches, _families, _rows, log_likelihoods
from tinycompress.graph.rope import Rope

CONTEXT = 64  # of the graphs


class Drawn:
    """Random ids below 128."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def ids(self, n: int) -> list[int]:
        return torch.randint(128, (n,), generator=self.generator).tolist()

    def between(self, low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=self.generator))


def questions() -> list[Pair]:
    """Pairs with shared contexts of many lengths, choices of one token, a text split at two places, and long ones."""
    drawn = Drawn()
    pairs: list[Pair] = []
    for number in range(12):
        context = drawn.ids(drawn.between(2, 60))
        pairs += [(context, drawn.ids(drawn.between(1, 12))) for _ in range(3)]
        if number % 3 == 0:
            pairs += [(context, [token]) for token in drawn.ids(3)]
            pairs.append((context[:-1], [context[-1], 5]))
    return [*pairs, (drawn.ids(3), drawn.ids(CONTEXT)), (drawn.ids(70), drawn.ids(10))]


def one_by_one(model: torch.nn.Module, pairs: Sequence[Pair]) -> list[Likelihood]:
    out = []
    for context, continuation in pairs:
        ids = torch.tensor([[*context, *continuation][-(CONTEXT + 1) :]])
        with torch.no_grad():
            logits = model(ids[:, :-1])[0, -len(continuation) :].double()
        targets = torch.tensor(continuation)
        greedy = torch.equal(logits.argmax(-1), targets)
        out.append(Likelihood(-F.cross_entropy(logits, targets, reduction="sum").item(), greedy))
    return out


@pytest.mark.parametrize("name", ["tiny", "nonuniform", "peculiar"])
def test_likelihoods_are_those_of_one_input_at_a_time(name: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name).module()
    pairs = questions()
    likeliest = int(model(torch.tensor([pairs[0][0]]))[0, -1].argmax())
    pairs.append((pairs[0][0], [likeliest]))
    found = log_likelihoods(model, pairs, progress=False)
    expected = one_by_one(model, pairs)
    assert [f.value for f in found] == pytest.approx([e.value for e in expected], abs=1e-4)
    assert [f.greedy for f in found] == [e.greedy for e in expected]
    assert found[-1].greedy


def test_frequencies_that_vary_with_length_share_nothing(tiny):
    rope = Rope(type="dynamic", factor=2.0, original_max_position=32)
    model = tiny.replace(config=dataclasses.replace(tiny.config, rope=rope)).module()
    found = log_likelihoods(model, questions(), progress=False)
    expected = one_by_one(model, questions())
    assert [f.value for f in found] == pytest.approx([e.value for e in expected], abs=1e-4)


def test_what_inputs_share_is_read_once(tiny):
    pairs = questions()
    families = _families(_rows(pairs, CONTEXT, 128))
    batches = list(_batches(families))
    read = sum(f.shared + sum(len(row.ids) - f.shared for row in f.rows) for f in families)
    assert read < 0.6 * sum(min(len(c) + len(t) - 1, CONTEXT) for c, t in pairs)
    assert sum(len(batch) for batch in batches) == len(families) and len(batches) < len(families)
    assert sorted(n for f in families for row in f.rows for n in row.pairs) == list(range(len(pairs)))


def test_pairs_that_cannot_be_scored_are_refused(tiny):
    model = tiny.module()
    for pair, message in ((([], [1]), "0 and 1 tokens"), (([1], []), "1 and 0"), (([1], [2] * 65), "context, 64")):
        with pytest.raises(InputError, match=message):
            log_likelihoods(model, [pair], progress=False)
    with pytest.raises(InputError, match="vocabulary"):
        log_likelihoods(model, [([1], [128])], progress=False)


@pytest.mark.parametrize("name", ["nonuniform", "peculiar"])
@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.3}, {"stop": tuple(range(0, 128, 9))}], ids=str)
def test_completions_are_what_generate_writes(name: str, options, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name).module()
    drawn = Drawn()
    prompts = [drawn.ids(n) for n in (3, 3, 10, 40, 60, 64, 1)]
    found = completions(model, prompts, 6, options, together=3, progress=False)
    assert found == [model.generate(torch.tensor(prompt), 6, **options).tolist() for prompt in prompts]


def test_completions_end_where_they_are_finished(tiny):
    model = tiny.module()
    prompts = [[1, 2, 3], [4, 5]]
    whole = completions(model, prompts, 6, {}, progress=False)
    cut = completions(model, prompts, 6, {}, finished=lambda new: len(new) == 2, progress=False)
    assert cut == [new[:2] for new in whole] and len(whole[0]) == 6
