"""`tinycompress report`: one page that says what was lost, what was gained, and whether to ship."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError
from .arguments import is_export, open_model
from .divergence import measure_against
from .options import Overwrite, count_option, folder_option, text_option, window_option

if TYPE_CHECKING:
    from ..evaluation.verdict import Judged


def report(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="The models, as they came out.")],
    reference: Annotated[str, typer.Option(metavar="MODEL", help="The model as it was before.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The page to write, as HTML.")],
    data: Annotated[str, text_option("The text to compare on")] = "pydoc",
    windows: Annotated[int, count_option("How many windows of the text are read.", 2)] = 8,
    seq_len: Annotated[int | None, window_option(2048)] = None,
    results: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="What `eval MODEL --json` printed: its figures are shown, and with `--reference` not measured again. "
            "May be given several times.",
        ),
    ] = None,
    reference_cache: Annotated[
        Path | None, folder_option("Keep what the reference says there, for further models on the same text.")
    ] = None,
    engine: Annotated[
        str | None, typer.Option(metavar="llama.cpp", help="Run .gguf files in llama.cpp (needs llama-cpp-python).")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write one HTML page about compressed models: sizes, perplexity, divergence, tasks, widths, bits, the gate, how
    they were made, and whether to ship them. It holds its pictures and needs no network.

    \b
    Examples:
      tinycompress report small-onnx --reference smollm2-135m -o report.html
      tinycompress report small smaller --reference smollm2-135m --data wikitext2 --windows 16 -o report.html
      tinycompress report small-onnx --reference smollm2-135m --results tasks.json -o report.html
    """
    from .. import files
    from ..evaluation.page import page

    place = files.claim_file(output, overwrite)
    known = [_results(path, [*models, reference]) for path in results or ()]
    judged = []
    for model in models:
        measured = _measured(known, model, reference)
        if measured is None:
            measured = measure_against(model, reference, data, windows, seq_len, reference_cache, engine)
        judged.append((measured, _judged(model, reference, measured, known)))
    protocols = {f"{measured['protocol']}, of {measured['data']}" for measured, _ in judged}
    if len(protocols) > 1:
        raise InputError("--results", " | ".join(sorted(protocols)), "results on one text, by one protocol")
    with files.new_file(place) as path:
        text = page(_judged(reference, reference, None, known), [model for _, model in judged], protocols.pop())
        path.write_text(text, encoding="utf-8")
    print(f"written: {output}")


def _results(path: Path, models: Sequence[str]) -> dict[str, Any]:
    from .. import files

    found: dict[str, Any] = files.read_json(path)
    if found.get("model") not in models:
        raise InputError(f"model in {path}", repr(found.get("model")), " | ".join(models))
    return found


def _measured(known: Sequence[Mapping[str, Any]], model: str, reference: str) -> Mapping[str, Any] | None:
    """What `eval --reference --json` found earlier."""
    for result in known:
        beside = result.get("reference") or {}
        if result["model"] == model and beside.get("model") == reference and "figures" in beside:
            return result
    return None


def _judged(
    name: str, reference: str, measured: Mapping[str, Any] | None, known: Sequence[Mapping[str, Any]]
) -> Judged:
    """All that is known of a model: from itself, from its folder, from what was measured."""
    from .. import files
    from ..evaluation.report import folder_bytes
    from ..evaluation.statistics import Interval
    from ..evaluation.verdict import Judged, layers_of
    from ..provenance import read_provenance

    graph = open_model(name)
    place = Path(name)
    figures = measured["reference"]["figures"] if measured else {}
    metrics: dict[str, dict[str, Any]] = {}
    for result in (result for result in known if result["model"] == name):
        beside = result.get("reference") or {}
        of_reference = beside.get("metrics", {}) if beside.get("model") == reference else {}
        for metric, value in (result.get("metrics") or {}).items():
            metrics[metric] = {**value, "reference": of_reference.get(metric, {}).get("value")}
    return Judged(
        name=name,
        nbytes=folder_bytes(place) if place.exists() else graph.nbytes,
        parameters=graph.config.n_params,
        context=graph.config.max_position,
        layers=layers_of(graph),
        figures={figure: Interval(**edges) for figure, edges in figures.items()},
        gate=files.read_json(place / "manifest.json").get("checks") if is_export(name) else None,
        metrics=metrics,
        provenance=read_provenance(place) if place.is_dir() else None,
        history=graph.history,
    )
