"""`tinycompress eval` for questions of a file, and for tasks of lm-evaluation-harness, beside a reference if there is
one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import InputError, need
from .arguments import need_tokenizer, open_model, runnable

if TYPE_CHECKING:
    from torch import Tensor

    from ..evaluation.questions import Question, Scores

Metrics = dict[str, "Tensor"]  # a value for every item, by metric
WIDTH = 24


def evaluate_questions(model: str, data: str, limit: int | None, reference: str | None, as_json: bool) -> None:
    """Scores questions of JSON lines, and prints how many are answered right."""
    from ..evaluation.questions import cue_of, read_questions

    questions = read_questions(data, limit)
    cue = cue_of(questions)
    protocol = f"each choice scored behind its query{f' and {cue!r}' if cue else ''}, a space between"
    if not as_json:
        print(f"{data}: {len(questions)} questions (query, choices, gold), {protocol}", flush=True)
    metrics = _scores(model, questions).metrics
    of_reference = _scores(reference, questions).metrics if reference else None
    figures = {"model": model, "data": data, "questions": len(questions), "protocol": protocol}
    _report(figures, metrics, reference, of_reference, as_json)


def _scores(model: str, questions: Sequence[Question]) -> Scores:
    from ..evaluation.questions import answer

    graph = open_model(model)
    return answer(runnable(model, graph), need_tokenizer(graph), questions)


def evaluate_tasks(
    model: str, tasks: str, limit: int | None, fewshot: int | None, reference: str | None, as_json: bool
) -> None:
    """Runs tasks of lm-evaluation-harness, names separated by commas, and prints their metrics."""
    need("lm_eval", "tasks")
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise InputError("--tasks", repr(tasks), "names of the harness's tasks: arc_easy,piqa")
    _check_names(names)
    values, own = _run(model, names, limit, fewshot)
    of_reference = _run(reference, names, limit, fewshot)[0] if reference else None
    _report({"model": model, "tasks": names, "harness": own}, values, reference, of_reference, as_json)


def _check_names(names: Sequence[str]) -> None:
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        raise InputError("--tasks", ", ".join(unknown), "names of the harness's tasks (`lm_eval ls tasks` lists them)")


def _run(model: str, names: Sequence[str], limit: int | None, fewshot: int | None) -> tuple[Metrics, dict[str, Any]]:
    """A value for every item by "task metric", and the harness's own figures."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from .harness import HarnessModel

    try:
        loaded = list(TaskManager().load(list(names))["tasks"].values())
    except (OSError, ValueError, RuntimeError) as error:  # those of the hub's libraries are subclasses
        found = f"{type(error).__name__}: {error}"
        accepted = "tasks whose data can be fetched from the hub or lies in its cache; or --data questions.jsonl"
        raise InputError("--tasks", f"{', '.join(names)}, whose data cannot be opened ({found})", accepted) from error
    lm = HarnessModel(model)
    results = simple_evaluate(lm, tasks=loaded, limit=limit, num_fewshot=fewshot, bootstrap_iters=0)
    return item_values(results["samples"]), results["results"]


def item_values(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> Metrics:
    """The harness's samples by task as tensors: bool [n] where all values of a metric are 0 or 1, float64 [n] of
    numbers, and float64 [n, 2] of sums that are divided (a text's negative log-likelihood and its words or bytes). A
    metric of another kind (F1 over all items) has no value for an item, and is left out."""
    import torch

    collected: dict[str, list[tuple[int, Any]]] = {}
    for task, rows in samples.items():
        for row in rows:
            filtered = "" if row["filter"] == "none" else f" ({row['filter']})"
            for metric in row["metrics"]:
                collected.setdefault(f"{task} {metric}{filtered}", []).append((row["doc_id"], row[metric]))
    out: Metrics = {}
    for name, entries in collected.items():
        values = [value for _, value in sorted(entries, key=lambda entry: entry[0])]
        if all(_is_number(value) for value in values):
            tensor = torch.tensor(values, dtype=torch.float64)
            out[name] = tensor.bool() if ((tensor == 0) | (tensor == 1)).all() else tensor
        elif name.partition(" ")[2] in ("word_perplexity", "byte_perplexity"):
            out[name.replace("perplexity", "nll")] = torch.tensor([(-ll, n) for ll, n in values]).double()
    return out


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or getattr(value, "shape", None) == ()


def _report(
    figures: dict[str, Any], metrics: Metrics, reference: str | None, of_reference: Metrics | None, as_json: bool
) -> None:
    """Every metric with its interval; beside a reference, what lies between the two."""
    from ..evaluation.statistics import McNemar, estimate, paired

    of_reference = of_reference or {}
    figures["metrics"] = {name: {"items": len(v), **_fields(estimate(v))} for name, v in metrics.items()}
    differences = {name: paired(v, of_reference[name]) for name, v in metrics.items() if name in of_reference}
    if reference:
        figures["reference"] = {
            "model": reference,
            "metrics": {name: _fields(estimate(v)) for name, v in of_reference.items()},
            "differences": {name: _fields(difference) for name, difference in differences.items()},
        }
    if as_json:
        print(json.dumps(figures, indent=2))
        return
    name_width = max(map(len, metrics), default=0) + 2
    headings = ["", "items", "value [95%]", *(["reference", "difference [95%]", "p"] if reference else [])]
    print(_line(headings, name_width))
    for name, values in metrics.items():
        cells = [name, f"{len(values)}", str(estimate(values))]
        if name in differences:
            difference = differences[name]
            cells.append(f"{estimate(of_reference[name]).value:.4g}")
            if isinstance(difference, McNemar):
                cells += [str(difference.difference), f"{difference.p:.3g} (McNemar)"]
            else:
                cells.append(str(difference))
        print(_line(cells, name_width))


def _line(cells: Sequence[str], name_width: int) -> str:
    widths = (name_width, 7, WIDTH, 11, WIDTH + 4, 0)
    return "".join(cell.ljust(width) for cell, width in zip(cells, widths)).rstrip()


def _fields(value: Any) -> dict[str, Any]:
    """An interval, or a test with its interval, as JSON: value, low, high and what else there is."""
    fields = dataclasses.asdict(value)
    return fields.pop("difference", {}) | fields
