"""Questions from files, their scores, and the command that asks them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from cli_cases import made, refused, run, tokenizer

from tinycompress.checkpoints.tokenizer import Tokenizer
from tinycompress.errors import InputError
from tinycompress.evaluation.likelihood import PairEncoder
from tinycompress.evaluation.questions import Question, Scores, answer, are_questions, cue_of, prompt_of, read_questions
from tinycompress.evaluation.statistics import estimate, mcnemar, paired, proportion
from tinycompress.graph.graph import Graph

__all__ = ["made", "tokenizer"]  # fixtures, for this file too

ROWS = [
    {"query": "Question: What is a module?\n", "choices": ["a file", "a statement", "x"], "gold": 0},
    {"query": "Question: What does a loop do?", "choices": ["it ends", "it repeats a block of statements"], "gold": 1},
    {"query": "Question: And a class?", "choices": ["an object", "nothing at all"], "gold": 0},
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")
    return path


def test_files_of_questions_are_told_from_texts(file, tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "a query with choices"}\n')
    assert are_questions(file) and not are_questions(text) and not are_questions("pydoc")
    assert [q.gold for q in read_questions(file)] == [0, 1, 0]
    assert len(read_questions(file, limit=2)) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gold": 3}, r"gold in row 2 .*0 … 1"),
        ({"gold": "it ends"}, r"gold in row 2"),
        ({"gold": True}, r"gold in row 2"),
        ({"choices": ["one"]}, r"choices in row 2 .*at least two"),
        ({"choices": ["", "two"]}, r"choices in row 2"),
        ({"query": None}, r"query in row 2"),
    ],
)
def test_rows_of_another_form_are_refused(change, message, file):
    rows = [ROWS[0], ROWS[1] | change]
    file.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(InputError, match=message):
        read_questions(file)


def test_a_row_that_lacks_a_key_or_is_no_json_is_named(file):
    file.write_text(json.dumps(ROWS[0]) + '\n{"query": "a"}\n')
    with pytest.raises(InputError, match=r"row 2 of .*query, choices, gold"):
        read_questions(file)
    file.write_text(json.dumps(ROWS[0]) + "\n{\n")
    with pytest.raises(InputError, match="row 2"):
        read_questions(file)


def test_questions_get_a_cue_and_sentences_none():
    questions = [Question(row["query"], tuple(row["choices"]), row["gold"]) for row in ROWS]
    assert cue_of(questions) == "\nAnswer:"
    assert prompt_of(questions[0], "\nAnswer:") == "Question: What is a module?\nAnswer:"
    sentence = Question("The cat sat on ", ("a", "b"), 0)
    assert cue_of([sentence]) == "" and prompt_of(sentence, "") == "The cat sat on "
    assert cue_of([Question("Question: a\nAnswer:", ("a", "b"), 0)]) == ""


def test_the_answer_is_the_likeliest_choice_or_the_likeliest_a_character():
    questions = (Question("q", ("ab", "abcdef"), 1), Question("q", ("a", "b"), 0))
    scores = Scores(questions, ((-2.0, -3.0), (-1.0, -1.0)))
    assert scores.acc.tolist() == [False, True]  # the first of equal ones, as NumPy's argmax
    assert scores.acc_norm.tolist() == [True, True]
    assert scores.gold_nll.tolist() == pytest.approx([math.log(1 + math.e), math.log(2)])


def test_answers_are_likelihoods_of_choices_behind_the_prompt(tokenizer: Tokenizer, file: Path) -> None:
    from cli_cases import MIXED

    model = Graph.random(MIXED, 0, std=0.1).module()
    questions = read_questions(file)
    scores = answer(model, tokenizer, questions, cue="", progress=False)
    for question, row in zip(questions, scores.likelihoods):
        for choice, value in zip(question.choices, row):
            prompt = question.query.rstrip()
            before = tokenizer.encode(prompt)
            ids = tokenizer.encode(prompt + question.query[len(prompt) :] + " " + choice)[-65:]
            with torch.no_grad():
                logs = model(torch.tensor([ids[:-1]]))[0].log_softmax(-1)
            n = len(tokenizer.encode(prompt + question.query[len(prompt) :] + " " + choice)) - len(before)
            total = sum(logs[len(ids) - 1 - n + i, ids[len(ids) - n + i]].item() for i in range(n))
            assert value == pytest.approx(total, abs=1e-3)


def test_spaces_go_to_the_continuation_and_nothing_stands_behind_the_prefix(tokenizer):
    from cli_cases import UNIFORM

    encoder = PairEncoder(tokenizer, UNIFORM)  # eos is token 0, <end>
    assert encoder.pair("The module ", "name") == encoder.pair("The module", " name")
    assert encoder.pair("", "name") == ([0], tokenizer.encode("name"))
    assert encoder.pair("", "<end>name") == ([0], tokenizer.encode("name"))


def test_mcnemar_is_the_exact_binomial_test():
    model = torch.tensor([True] * 9 + [False] * 2 + [True] * 5 + [False] * 4)
    reference = torch.tensor([False] * 9 + [True] * 2 + [True] * 5 + [False] * 4)
    found = mcnemar(model, reference)
    tail = sum(math.comb(11, k) for k in range(3)) / 2**11
    assert (found.gained, found.lost) == (9, 2) and found.p == pytest.approx(2 * tail)
    assert found.difference.value == pytest.approx(7 / 20)
    assert found.difference.low < 7 / 20 < found.difference.high
    same = mcnemar(model, model)
    assert same.p == 1 and same.difference.value == 0 and same.difference.low < 0 < same.difference.high


def test_intervals_of_shares_cover_as_often_as_they_say():
    generator = torch.Generator().manual_seed(0)
    single = double = 0
    for _ in range(400):
        hard = torch.rand(80, generator=generator)
        model, reference = (hard + 0.5 * torch.rand(80, generator=generator) < limit for limit in (0.9, 1.0))
        interval = mcnemar(model, reference).difference
        double += interval.low <= -0.1 <= interval.high  # P(hard + 0.5 u < x) = x - 1/4 between 1/2 and 1
        share = proportion(model)
        single += share.low <= 0.65 <= share.high
    assert 0.92 <= single / 400 <= 0.98 and 0.92 <= double / 400 <= 0.99


def test_other_metrics_are_bootstrapped_over_items():
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(50, 2, generator=generator, dtype=torch.float64) + 1
    ratio = estimate(values)
    assert ratio.value == pytest.approx((values[:, 0].sum() / values[:, 1].sum()).item())
    assert ratio.low < ratio.value < ratio.high
    higher = values + torch.tensor([0.1, 0.0])
    difference = paired(higher, values)
    assert difference.value == pytest.approx(0.1 * 50 / values[:, 1].sum().item()) and difference.low > 0


def test_eval_says_that_these_are_questions(made: Path, file: Path) -> None:
    out = run("eval", made / "small", "--data", file)
    assert "3 questions (query, choices, gold)" in out and "acc_norm" in out and "Answer:" in out
    figures = json.loads(
        run("eval", made / "onnx", "--data", file, "--limit", "2", "--reference", made / "small", "--json")
    )
    assert figures["questions"] == 2 and set(figures["metrics"]) == {"acc", "acc_norm", "gold_nll"}
    differences = figures["reference"]["differences"]
    assert {"value", "low", "high", "gained", "lost", "p"} == set(differences["acc"])
    assert abs(differences["gold_nll"]["value"]) < 0.05  # the export against its graph
    beside = run("eval", made / "mixed", "--data", file, "--reference", made / "small")
    assert "reference" in beside and "(McNemar)" in beside


def test_options_of_questions_are_refused_for_texts(made: Path) -> None:
    assert "--limit" in refused("eval", made / "mixed", "--limit", "3")
    assert "--tasks" in refused("eval", made / "mixed", "--fewshot", "3")


def test_tasks_name_their_extra(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "pip install 'tinycompress[tasks]'" in refused("eval", made / "mixed", "--tasks", "piqa")
