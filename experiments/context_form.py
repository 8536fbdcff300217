"""What the context experiments share: texts for a model of any context, and results kept row by row.

`Rows` is the result file while it grows: a row that is there is not measured again, so a run that was killed takes up
where it ended (the same options; others are refused). Rows hold the NLL of each window, so that comparisons are paired.

Texts: `self` is sampled from the model itself, at temperature 1, by a seed, in pieces of its trained length that each
begin with the token that begins a text, and are packed one behind the other. For a model whose training text is not at
hand it is the only text of its own kind; nothing in a piece depends on the one before. Any other name is a real text.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from form import HERE, Finding, write_readme
from torch import Tensor

from tinycompress.calibration import data
from tinycompress.errors import InputError
from tinycompress.evaluation.perplexity import environment
from tinycompress.files import read_json, write_json, write_text
from tinycompress.graph.graph import Graph


@torch.inference_mode()
def sampled(graph: Graph, pieces: int, seed: int, batch: int = 64) -> Tensor:
    """Text of the model's own, int64 [pieces · trained length]."""
    model, length = graph.module(), graph.config.rope.original_max_position or graph.config.max_position
    if graph.config.bos_token_id is None:
        raise InputError("bos_token_id", None, "a model that has one: sampling must begin somewhere")
    generator, out = torch.Generator().manual_seed(seed), []
    for first in range(0, pieces, batch):
        n = min(batch, pieces - first)
        cache, ids = model.new_cache(n, length), torch.full((n, 1), graph.config.bos_token_id)
        rows = [ids]
        for _ in range(length - 1):
            ids = torch.multinomial(model(ids, cache)[:, -1].softmax(-1), 1, generator=generator)
            rows.append(ids)
        out.append(torch.cat(rows, 1).flatten())
    return torch.cat(out)


def stream(graph: Graph, text: str, tokens: int, seed: int, split: str = "test") -> Tensor:
    """At least `tokens` ids of `text`, a real one from its beginning."""
    if text == "self":
        trained = graph.config.rope.original_max_position or graph.config.max_position
        return sampled(graph, -(-tokens // trained), seed)
    return data.tokens(text, graph.tokenizer, 1, tokens, split=split)[0]


class Rows:
    """results/<name>.json: `rows` by key, then `findings`."""

    def __init__(self, name: str, title: str, protocol: dict[str, Any], how: str, write: bool) -> None:
        self.path, self.write, self.started = HERE / "results" / f"{name}.json", write, time.perf_counter()
        self.result: dict[str, Any] = {
            "title": title,
            "protocol": protocol,
            "how": how,
            "rows": {},
            "findings": [],
            "minutes": 0.0,
        }
        if write and self.path.exists():
            known = read_json(self.path)
            if known.get("protocol") != protocol:
                raise InputError(
                    f"protocol in {self.path.name}", known.get("protocol"), f"{protocol}; or move the file away"
                )
            self.result = known
        self.result["script"] = Path(sys.argv[0]).stem
        self.before = self.result["minutes"]

    def get(self, key: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The row of that key, measured now if it is not there."""
        if key not in self.result["rows"]:
            self.result["rows"][key] = measure()
            shown = {k: v for k, v in self.result["rows"][key].items() if k != "nll"}
            print(f"{key}: {shown}", flush=True)
            self.save()
        return self.result["rows"][key]

    def finish(self, findings: list[Finding]) -> None:
        self.result["findings"] = [asdict(finding) for finding in findings]
        for f in findings:
            print(
                f"{f.claim}: {f.ours} ({f.criterion}; paper: {f.paper}) {'holds' if f.holds else 'does not hold'}",
                flush=True,
            )
        self.save()
        if self.write:
            write_text(self.path.with_suffix(".md"), self.table())
            write_readme()

    def table(self) -> str:
        """Every row with a perplexity, in the order of measuring."""
        lines = [
            f"# {self.path.stem}",
            "",
            self.result["title"],
            "",
            "| measured | perplexity | 95% interval |",
            "|---|---|---|",
        ]
        for key, row in self.result["rows"].items():
            if "perplexity" in row:
                value, low, high = row["perplexity"]
                lines.append(f"| {key} | {value:.4g} | {low:.4g} … {high:.4g} |")
        return "\n".join(lines) + "\n"

    def save(self) -> None:
        self.result["minutes"] = round(self.before + (time.perf_counter() - self.started) / 60, 1)
        self.result["environment"] = environment()
        if self.write:
            write_json(self.path, self.result)


def named(text: str) -> str:
    """A text's name without the folder it lies in."""
    return Path(text).name


def nll_of(row: dict[str, Any]) -> Tensor:
    return torch.tensor(row["nll"], dtype=torch.float64)
