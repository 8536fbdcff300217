"""One page that says what was lost, what was gained, and whether to ship: HTML with its pictures inside. It asks
nothing of a network, runs no script, and follows light and dark."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import PurePath

from .pictures import bars_by_layer, dots_on_a_log_axis, size_against_perplexity
from .report import human
from .statistics import Interval
from .verdict import DO_NOT, LOOK, SHIP, Judged, Limits, verdict

CLASSES = {SHIP: "good", LOOK: "fair", DO_NOT: "bad"}
STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --soft: #5b6676; --paper: #ffffff; --card: #f5f7f9; --rule: #d9dfe5;
  --good: #0b7a53; --fair: #9a6500; --bad: #b3261e;
  --s0: #6b7686; --s1: #0f7f8c; --s2: #c2571a; --s3: #6a4bbc; --s4: #2f7d32; --s5: #b0306a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7ebf0; --soft: #9aa6b5; --paper: #12161c; --card: #1b2129;
  --rule: #323b47; --good: #4cc38a; --fair: #e0a93b; --bad: #ff8a80;
  --s0: #97a3b3; --s1: #45c0cc; --s2: #f09a63; --s3: #b39df0; --s4: #81c784; --s5: #f08ab5; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 24px 16px 64px; max-width: 1120px; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 4px; }
h2 { font-size: 1.15rem; margin: 36px 0 10px; }
p { margin: 4px 0 12px; }
.soft, figcaption, th { color: var(--soft); }
.verdict { background: var(--card); border-left: 6px solid; border-radius: 6px; padding: 14px 18px; margin: 16px 0; }
.verdict strong { display: block; font-size: 1.25rem; }
.verdict ul { margin: 6px 0 0; padding-left: 20px; }
.good { border-color: var(--good); } .good strong { color: var(--good); }
.fair { border-color: var(--fair); } .fair strong { color: var(--fair); }
.bad { border-color: var(--bad); } .bad strong { color: var(--bad); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; width: 100%; font-variant-numeric: tabular-nums;
  overflow-wrap: normal; }
th, td { text-align: right; padding: 6px 10px; border-bottom: 1px solid var(--rule); vertical-align: top; }
th { font-weight: 500; overflow-wrap: anywhere; } th:first-child, td:first-child { text-align: left; }
td small { display: block; color: var(--soft); white-space: nowrap; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); gap: 16px; }
figure { margin: 0; background: var(--card); border-radius: 6px; padding: 12px; }
figcaption { font-size: 0.85rem; margin-bottom: 6px; }
svg { width: 100%; height: auto; display: block; font-size: 11px; }
svg text { fill: var(--soft); }
.axis { stroke: var(--soft); } .faint { stroke: var(--rule); } .was { fill: none; stroke: var(--s0); }
.s0 { fill: var(--s0); stroke: var(--s0); } .s1 { fill: var(--s1); stroke: var(--s1); }
.s2 { fill: var(--s2); stroke: var(--s2); } .s3 { fill: var(--s3); stroke: var(--s3); }
.s4 { fill: var(--s4); stroke: var(--s4); } .s5 { fill: var(--s5); stroke: var(--s5); }
i.key { display: inline-block; width: 10px; height: 10px; border-radius: 5px; margin-right: 6px; }
pre { background: var(--card); border-radius: 6px; padding: 12px; overflow-x: auto; font-size: 0.8rem; }
summary { cursor: pointer; }
"""
KL_ROWS = {
    "kl_median": "median",
    "kl": "mean",
    "kl_99": "99%",
    "kl_99_9": "99.9%",
    "kl_largest": "largest",
}


def page(reference: Judged, models: Sequence[Judged], protocol: str, limits: Limits | None = None) -> str:
    """The page about `models` beside `reference`. `protocol` says on what text they were compared, and how."""
    limits = limits or Limits()
    reference, *models = _shortly_named([reference, *models])
    names = ", ".join(model.name for model in models)
    parts = [f"<h1>{escape(names)}</h1>", f'<p class="soft">compared with {escape(reference.name)}</p>']
    parts += [_verdict(model, reference, limits) for model in models]
    parts += ["<h2>Before and after</h2>", _table(reference, models), f'<p class="soft">{escape(protocol)}. ']
    parts.append("In brackets: 95% intervals, by resampling windows. KL and agreement are beside the reference.</p>")
    parts += ["<h2>Pictures</h2>", _keys([reference, *models]), '<div class="pictures">']
    parts += [*_pictures(reference, models), "</div>"]
    parts += [part for model in models for part in _details(model)]
    title = f"<title>{escape(names)}: what was lost and gained</title>"
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    body = "\n".join(parts)
    whole = f"<head>{head}{title}<style>{STYLE}</style></head>\n<body>{body}</body>"
    return f'<!doctype html>\n<html lang="en">{whole}</html>\n'


def _shortly_named(models: Sequence[Judged]) -> list[Judged]:
    """The models under the last parts of their names, where these differ."""
    short = [PurePath(model.name).name for model in models]
    unlike = len(set(short)) == len(short)
    return [replace(model, name=name) for model, name in zip(models, short)] if unlike else list(models)


def _verdict(model: Judged, reference: Judged, limits: Limits) -> str:
    found = verdict(model, reference, limits)
    reasons = "".join(f"<li>{escape(reason)}</li>" for reason in found.reasons)
    head = f"<strong>{escape(found.decision)}: {escape(model.name)}</strong>"
    return f'<section class="verdict {CLASSES[found.decision]}">{head}<ul>{reasons}</ul></section>'


def _table(reference: Judged, models: Sequence[Judged]) -> str:
    """Before against after: a row for each figure, a column for each model."""
    everyone = [reference, *models]
    rows = [
        ("on disk", [human(model.nbytes) for model in everyone]),
        ("parameters", [f"{model.parameters:,}" for model in everyone]),
        ("context", [f"{model.context:,}" for model in everyone]),
    ]
    before = models[0].figures["reference_perplexity"]
    perplexities = [before, *(model.figures["perplexity"] for model in models)]
    rows.append(("perplexity", [_cell(interval, "{:.4g}") for interval in perplexities]))
    rows.append(_row("perplexity ratio", "perplexity_ratio", "{:.4g}", models))
    rows += [_row(f"KL, {words}, nats", name, "{:.3g}", models) for name, words in KL_ROWS.items()]
    rows.append(_row("same likeliest token", "top_1", "{:.1%}", models))
    rows.append(_row("same five likeliest", "top_5", "{:.1%}", models))
    rows += [_task_row(name, models) for name in _names(model.metrics for model in models)]
    head = "".join(f"<th>{escape(model.name)}</th>" for model in everyone)
    return _html_table(f"<th></th>{head}", rows)


def _row(words: str, name: str, form: str, models: Sequence[Judged]) -> tuple[str, list[str]]:
    return words, ["", *(_cell(model.figures[name], form) for model in models)]


def _task_row(name: str, models: Sequence[Judged]) -> tuple[str, list[str]]:
    """A task's metric: of the reference, where a model's results have it beside their own."""
    before = [model.metrics[name].get("reference") for model in models if name in model.metrics]
    known = next((value for value in before if value is not None), None)
    cells = ["" if known is None else f"{known:.4g}"]
    for model in models:
        metric = model.metrics.get(name)
        cells.append(
            "" if metric is None else _cell(Interval(metric["value"], metric["low"], metric["high"]), "{:.4g}")
        )
    return name, cells


def _names(mappings: Iterable[Mapping[str, object]]) -> list[str]:
    return list(dict.fromkeys(name for mapping in mappings for name in mapping))


def _cell(interval: Interval, form: str) -> str:
    value, low, high = (form.format(edge) for edge in (interval.value, interval.low, interval.high))
    return f"{value}<small>[{low}, {high}]</small>"


def _html_table(head: str, rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    """`head` and the cells are HTML; the first of a row is text."""
    lines = ["".join(f"<td>{cell}</td>" for cell in (escape(words), *cells)) for words, cells in rows]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _keys(models: Sequence[Judged]) -> str:
    keys = (
        f'<i class="key" style="background: var(--s{number % 6})"></i>{escape(model.name)}'
        for number, model in enumerate(models)
    )
    return f'<p class="soft">{" &nbsp; ".join(keys)}</p>'


def _pictures(reference: Judged, models: Sequence[Judged]) -> Iterable[str]:
    before = models[0].figures["reference_perplexity"]
    points = [(reference.name, reference.nbytes, before)]
    points += [(model.name, model.nbytes, model.figures["perplexity"]) for model in models]
    yield _figure("Size against perplexity: lower left is better", size_against_perplexity(points))
    rows = [(words, [model.figures[name] for model in models]) for name, words in KL_ROWS.items()]
    shown = dots_on_a_log_axis(rows, [model.name for model in models])
    yield _figure("KL from the reference, position by position: the middle and the tail", shown)
    kinds = ((0, "heads", "Attention heads by layer"), (1, "channels", "FFN channels by layer"))
    for number, model in enumerate(models, 1):
        for place, unit, title in (*kinds, (2, "bits", "Bits of a weight by layer")):
            old, new = ([layer[place] for layer in judged.layers] for judged in (reference, model))
            if old != new:
                shown = bars_by_layer(old, new, unit, title, number)
                yield _figure(f"{title}: {model.name}, before in outline", shown)


def _figure(caption: str, svg: str) -> str:
    return f"<figure><figcaption>{escape(caption)}</figcaption>{svg}</figure>"


def _details(model: Judged) -> Iterable[str]:
    """The gate's checks and how the model was made, as far as they are known."""
    yield f"<h2>How {escape(model.name)} was made</h2>"
    steps = "".join(f"<li><code>{escape(step)}</code></li>" for step in model.history)
    yield f"<ol>{steps}</ol>" if steps else "<p>Nothing says.</p>"
    facts = model.provenance or {}
    if facts.get("command"):
        yield f"<p>Typed: <code>{escape(str(facts['command']))}</code></p>"
    texts = [f"{text['windows']} × {text['seq_len']} tokens of {text['text']}" for text in facts.get("data") or ()]
    if texts:
        yield f"<p>Fitted to {escape(', '.join(texts))}.</p>"
    versions = ", ".join(f"{name} {version}" for name, version in (facts.get("versions") or {}).items())
    if versions:
        yield f'<p class="soft">{escape(versions)}</p>'
    if facts.get("recipe"):
        yield f"<details><summary>Recipe</summary><pre>{escape(str(facts['recipe']))}</pre></details>"
    if model.gate is not None:
        words = "passed" if model.gate.get("passed") else "failed"
        yield f"<h2>The gate of {escape(model.name)}: {words}</h2>"
        rows = [
            (check["check"], [_number(check["figure"]), _number(check["limit"]), escape(check["about"])])
            for check in model.gate.get("checks", ())
        ]
        yield _html_table("<th>check</th><th>figure</th><th>limit</th><th>about</th>", rows)


def _number(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float | int) else escape(str(value))
