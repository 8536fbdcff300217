"""How a model was made, for the folder it is saved in.

  recipe.toml       the recipe: running it again gives the same bytes of weights
  provenance.json   versions, command, fingerprints of the texts, seconds, memory, kind of machine, measured quality
  README.md         a model card in Hugging Face's form, made from both

What depends on the clock and the machine stands in provenance.json alone, so that two equal runs differ there only. No
host and no path is named but those that were typed.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .checkpoints.checkpoint import SMOLLM2
from .errors import InputError
from .files import read_json
from .graph.graph import Graph

PROVENANCE = "provenance.json"
RECIPE = "recipe.toml"
CARD = "README.md"
MANIFEST = "manifest.json"  # of an export: it holds all of the above
FORMAT = 1
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
KNOWN_NAMES = {SMOLLM2: "HuggingFaceTB/SmolLM2-135M-Instruct"}


def provenance(
    recipe: str,
    model: str | None,
    data: Sequence[Mapping[str, Any]],
    history: Sequence[str],
    measured: Mapping[str, Any] | None,
    command: str | None,
    seconds: float,
    peak: int | None,
) -> dict[str, Any]:
    """The facts about a run, ready for JSON.

    Args:
        recipe: as TOML. model: the name of the model it started from. data: of each text, its name, windows and
            fingerprint. history: of the result. measured: its quality. command: what was typed, if anything.
        seconds: of the run, less where a work folder had steps. peak: bytes of memory at most, where it is known.
    """
    return {
        "format": FORMAT,
        "model": model,
        "base_model": None if model is None else base_model(model),
        "command": command,
        "recipe": recipe,
        "history": list(history),
        "data": [dict(text) for text in data],
        "measured": None if measured is None else dict(measured),
        "seconds": round(seconds, 3),
        "peak_memory": peak,
        "versions": versions(),
        "machine": machine(),
    }


def versions() -> dict[str, str]:
    """Of what the result depends on."""
    found = {name: metadata.version(name) for name in ("tinycompress", "torch")}
    return found | {"python": platform.python_version()}


def machine() -> dict[str, Any]:
    """The kind of machine: never its name."""
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def peak_memory() -> int | None:
    """Bytes that the process had resident at most, since it began; None where the system does not say (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def base_model(name: str) -> str | None:
    """The hub name of the model that `name` is or was made from; None where nothing says."""
    if Path(name).exists():
        known = read_provenance(name) or {}
        base = known.get("base_model")
        return base if isinstance(base, str) else None
    return KNOWN_NAMES.get(name, name if HUB_NAME.fullmatch(name) else None)


def read_provenance(folder: str | Path) -> dict[str, Any] | None:
    """The provenance of a saved or exported model, its recipe included; None where it has none."""
    folder = Path(folder)
    if (folder / PROVENANCE).is_file():
        facts: dict[str, Any] = read_json(folder / PROVENANCE)
        if (folder / RECIPE).is_file():
            facts["recipe"] = (folder / RECIPE).read_text(encoding="utf-8")
        return facts
    if (folder / MANIFEST).is_file():
        found = read_json(folder / MANIFEST).get("provenance")
        return found if isinstance(found, dict) else None
    return None


def recipe_of(folder: str | Path) -> str:
    """The recipe that a saved or exported model was made by, as TOML; an `InputError` where none is kept."""
    facts = read_provenance(folder) if Path(folder).is_dir() else None
    recipe = (facts or {}).get("recipe")
    if not isinstance(recipe, str):
        accepted = "a folder that `tinycompress compress` or `distill` wrote (not as gguf, which is one file)"
        raise InputError(str(folder), "no recipe", accepted)
    return recipe


def beside(facts: Mapping[str, Any], graph: Graph) -> dict[str, str]:
    """The texts that go into a saved folder, by file name."""
    about = {key: value for key, value in facts.items() if key != "recipe"}
    return {
        RECIPE: facts["recipe"],
        PROVENANCE: json.dumps(about, indent=2, ensure_ascii=False) + "\n",
        CARD: card(facts, graph),
    }


def card(facts: Mapping[str, Any], graph: Graph, checks: Mapping[str, Any] | None = None) -> str:
    """A model card. `checks`: figures of an export against the graph, by name."""
    config = graph.config
    base = facts.get("base_model")
    name = base or "a model"
    parts = [
        _header(base, facts["history"]),
        f"# {name}, compressed\n",
        f"Made from `{facts.get('model') or name}` by [tinycompress]"
        f"(https://github.com/tinycompress/tinycompress) {facts['versions']['tinycompress']}: "
        f"{config.n_layers} layers, {config.n_params:,} parameters in {graph.nbytes:,} bytes of weights, "
        f"a context of {config.max_position:,} positions.\n",
        "## How it was made\n",
        "".join(f"{number}. `{step}`\n" for number, step in enumerate(facts["history"], 1)) or "Nothing was changed.\n",
        f"With `tinycompress compress --recipe {RECIPE} -o OUT`, the same weights come out again:\n",
        f"```toml\n{facts['recipe']}```\n",
        "## Measured\n",
        _measured(facts.get("measured"), checks),
        "## Limits\n",
        _limits(facts),
    ]
    return "\n".join(parts)


def _header(base: str | None, history: Sequence[str]) -> str:
    lines = ["---", f"base_model: {base}" if base else "# base_model: ORGANIZATION/NAME"]
    kinds = {"GPTQ": "gptq", "AWQ": "awq", "Prune": "pruned", "Distill": "distilled", "RTN": "quantized"}
    done = [step.partition("(")[0] for step in history]
    tags = ["tinycompress", *dict.fromkeys(kinds[step] for step in done if step in kinds)]
    lines += ["library_name: tinycompress", "tags:", *(f"- {tag}" for tag in tags)]
    lines += ["# license: that of the base model, for you to fill in", "---\n"]
    return "\n".join(lines)


def _measured(measured: Mapping[str, Any] | None, checks: Mapping[str, Any] | None) -> str:
    rows = []
    if measured:
        text = f"perplexity, {measured['text']} ({measured['windows']} windows of {measured['seq_len']} tokens)"
        values = measured["perplexity"]
        rows.append((text, f"{values['before']:.4f}", f"{values['after']:.4f}"))
    rows += [(f"export against the graph: {name}", "", str(value)) for name, value in (checks or {}).items()]
    if not rows:
        return "Nothing was measured. `tinycompress eval` measures perplexity.\n"
    table = ["| | before | after |", "| --- | --- | --- |", *(f"| {' | '.join(map(_cell, row))} |" for row in rows)]
    return "\n".join([*table, ""])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _limits(facts: Mapping[str, Any]) -> str:
    texts = [text for text in facts["data"] if text["split"] == "train"]
    read = [f"{text['windows']} windows of {text['seq_len']} tokens of {_cell(text['text'])}" for text in texts]
    lines = ["- What the base model cannot do or must not be used for holds for this one too."]
    if read:
        lines.append(
            f"- It was fitted to {', and '.join(read)}: on other text, and in other languages, it may be worse."
        )
    if facts.get("measured"):
        lines.append("- Perplexity on one text was measured, and no task, no safety behaviour and no other language.")
    else:
        lines.append("- Its quality was not measured when it was made.")
    return "\n".join([*lines, ""])
