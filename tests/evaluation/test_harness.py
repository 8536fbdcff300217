"""Our models in lm-evaluation-harness, item by item against its own class for transformers models."""

from __future__ import annotations

import json
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_cases import UNIFORM, made, refused, run, tokenizer

from tinycompress.checkpoints.checkpoint import save
from tinycompress.checkpoints.tokenizer import Tokenizer
from tinycompress.errors import InputError
from tinycompress.evaluation.questions import answer, read_questions
from tinycompress.graph.graph import Graph

__all__ = ["made", "tokenizer"]  # fixtures, for this file too

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("ignore")  # the harness's and its packages' own

TEXTS = ("The module", "A class is an object of", "Question: What?\nAnswer:", "x " * 90, "for i in ")
CHOICES = (" statement", " of the language", " a", " it is")
UNTIL = {"until": ["\n", "the"], "max_gen_toks": 12, "do_sample": False}


def requests(kind: str) -> list[Any]:
    from lm_eval.api.instance import Instance

    arguments: dict[str, list[tuple[Any, ...]]] = {
        "loglikelihood": [(text, choice) for text in (*TEXTS, "") for choice in CHOICES],
        "loglikelihood_rolling": [(text * 3,) for text in TEXTS],
        "generate_until": [(text, UNTIL) for text in TEXTS],
    }
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments[kind])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A model that transformers opens too, with names of its special tokens."""
    path = tmp_path_factory.mktemp("hf") / "model"
    named = Tokenizer(tokenizer.backend, {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"})
    save(Graph(UNIFORM, Graph.random(UNIFORM, seed=1, std=0.1).weights, (), named), path)
    return path


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    pytest.importorskip("accelerate")
    from lm_eval.models.huggingface import HFLM

    return HFLM(str(folder), device="cpu", dtype="float32", batch_size=1)


def ours(model: Path, **options: Any) -> Any:
    from tinycompress.cli.harness import HarnessModel

    return HarnessModel(str(model), **options)


def test_the_harness_finds_the_class(made):
    from lm_eval.api.registry import get_model

    from tinycompress.cli.harness import HarnessModel

    assert get_model("tinycompress") is HarnessModel
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = EntryPoint("tinycompress", project["entry-points"]["lm_eval.models"]["tinycompress"], "lm_eval.models")
    assert declared.load() is HarnessModel
    model = get_model("tinycompress").create_from_arg_string(f"pretrained={made / 'small'}", {"device": "cuda:0"})
    assert model.device.type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_every_likelihood_is_that_of_the_harness(folder, theirs):
    expected = theirs.loglikelihood(requests("loglikelihood"), disable_tqdm=True)
    found = ours(folder).loglikelihood(requests("loglikelihood"), disable_tqdm=True)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_texts_longer_than_the_context_have_the_same_likelihood(folder, theirs):
    expected = theirs.loglikelihood_rolling(requests("loglikelihood_rolling"), disable_tqdm=True)
    found = ours(folder).loglikelihood_rolling(requests("loglikelihood_rolling"), disable_tqdm=True)
    assert found == pytest.approx(expected, rel=1e-5)


def test_every_generated_text_is_that_of_the_harness(folder, theirs):
    expected = theirs.generate_until(requests("generate_until"), disable_tqdm=True)
    assert ours(folder, batch_size="auto").generate_until(requests("generate_until"), disable_tqdm=True) == expected
    assert any(expected)


@pytest.mark.parametrize("profile", ["ort", "std", "static"])
def test_exports_score_as_their_graph(profile: str, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    run("export", folder, "--profile", profile, "-o", tmp_path / "out")
    graph, export = ours(folder), ours(tmp_path / "out")
    for kind in ("loglikelihood", "generate_until"):
        expected, found = (getattr(model, kind)(requests(kind), disable_tqdm=True) for model in (graph, export))
        if kind == "loglikelihood":
            expected, found = ([value for value, _ in scores] for scores in (expected, found))
            assert found == pytest.approx(expected, abs=1e-3)
        else:
            assert found == expected


def test_questions_of_a_file_score_as_a_task_of_the_harness(folder, theirs, shared):
    from lm_eval.api.instance import Instance

    model = ours(folder)
    questions = [
        question
        for question in read_questions(shared / "data" / "piqa.jsonl", limit=60)
        if all(len(model.tok_encode(" " + choice)) <= UNIFORM.max_position for choice in question.choices)
    ]
    assert len(questions) > 10
    scores = answer(model.engine, model.encoder.tokenizer, questions, progress=False)
    texts = [(q.query.rstrip() + "\nAnswer:", " " + choice) for q in questions for choice in q.choices]
    asked = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(texts)]
    values = iter(theirs.loglikelihood(asked, disable_tqdm=True))
    for row in scores.likelihoods:
        assert list(row) == pytest.approx([next(values)[0] for _ in row], abs=1e-3)


def test_options_that_would_change_the_text_are_refused(folder):
    from lm_eval.api.instance import Instance

    model = ours(folder)
    for options, message in (({"num_beams": 4}, "num_beams"), ({"max_gen_toks": 64}, "context, 64")):
        request = Instance("generate_until", {}, ("The", UNTIL | options), 0)
        with pytest.raises(InputError, match=message):
            model.generate_until([request], disable_tqdm=True)
    request = Instance("generate_until", {}, ("The", UNTIL | {"num_beams": 1}), 0)
    assert model.generate_until([request], disable_tqdm=True)


def a_task(folder: Path) -> str:
    """A task of multiple choice over a local file; its folder is what the harness includes."""
    rows = [
        {"text": text, "choices": [choice.strip() for choice in CHOICES], "gold": i % 4}
        for i, text in enumerate(TEXTS[:3])
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "local.yaml").write_text(f"""task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {json.dumps(str(folder / "rows.jsonl"))}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{text}}}}"
doc_to_target: gold
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
""")
    return "local_choice"


def test_tasks_run_beside_a_reference(made, folder, tmp_path, monkeypatch):
    from functools import partial

    import lm_eval.tasks

    name = a_task(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(lm_eval.tasks.TaskManager, include_path=str(tmp_path)))
    out = json.loads(run("eval", folder, "--tasks", name, "--reference", made / "mixed", "--limit", "2", "--json"))
    assert set(out["metrics"]) == {f"{name} acc", f"{name} acc_norm"} and out["metrics"][f"{name} acc"]["items"] == 2
    assert out["harness"][name]["acc,none"] == out["metrics"][f"{name} acc"]["value"]
    assert "p" in out["reference"]["differences"][f"{name} acc"]
    assert "--tasks" in refused("eval", folder, "--tasks", "no_such_task")


def test_a_hub_that_cannot_be_reached_is_said(folder, monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("no route")))
    assert "--data questions.jsonl" in refused("eval", folder, "--tasks", "piqa")


def test_values_of_items_by_kind():
    from tinycompress.cli.tasks import item_values

    rows = [
        {"doc_id": i, "filter": "none", "metrics": ["acc", "bleu", "word_perplexity", "f1"], "acc": float(i > 0)}
        | {"bleu": 0.5 + i, "word_perplexity": (-4.0, 2), "f1": (0, 1)}
        for i in (2, 0, 1)
    ]
    values = item_values({"t": rows})
    assert values["t acc"].tolist() == [False, True, True] and values["t bleu"].tolist() == [0.5, 1.5, 2.5]
    assert values["t word_nll"].tolist() == [[4.0, 2.0]] * 3 and "t f1" not in values
