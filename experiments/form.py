"""The form of an experiment: a claim of a paper, a measurement with intervals, a verdict, a committed result.

An experiment file states paper, claim and protocol in its docstring and hands `run` a function that yields findings.
It gets a `Bench`: the model, calibration tokens by seed, evaluation windows, and `nll` (per-window, so that every
comparison is paired). `run` adds the command line, writes `results/<file>.json` with versions, seeds and machine, and
regenerates the table in `README.md`.

A run that was killed takes up where it ended: an experiment asks `bench.kept(claim)` before it measures, and yields
what the result file already has under the same protocol.
"""

from __future__ import annotations

import argparse
import inspect
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from tinycompress.calibration import data
from tinycompress.checkpoints.checkpoint import load
from tinycompress.evaluation.perplexity import environment, perplexity
from tinycompress.evaluation.statistics import Interval
from tinycompress.files import read_json, write_json, write_text
from tinycompress.graph.graph import Graph
from tinycompress.model.cpu_memory import keep_memory

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Finding:
    """One row of the table: `holds` is the experiment's own criterion applied to `ours`."""

    claim: str
    paper: str
    ours: Interval
    criterion: str
    holds: bool
    machine: str = ""  # where it was measured: a resumed run keeps findings of another


@dataclass(frozen=True)
class Bench:
    """What an experiment measures with. `quick` shrinks everything to a smoke test whose verdicts mean nothing."""

    graph: Graph
    calibration_source: str
    evaluation: Tensor
    seeds: tuple[int, ...]
    samples: int
    quick: bool
    earlier: tuple[Finding, ...] = ()
    work: Path | None = None  # where long steps may keep what they made

    def kept(self, claim: str) -> Finding | None:
        """The finding of an earlier run for this claim, up to what the claim says in brackets."""
        return next((f for f in self.earlier if f.claim == claim or f.claim.startswith(f"{claim} (")), None)

    def calibration(self, seed: int) -> Tensor:
        """Windows [samples, 512] drawn by `seed` from the calibration text, disjoint from the evaluation text."""
        return data.tokens(self.calibration_source, self.graph.tokenizer, self.samples, 512, seed=seed, split="train")

    def nll(self, graph: Graph) -> Tensor:
        """Mean NLL of each evaluation window, float64 [windows]; packed weights are unpacked once, not per window."""
        return perplexity(graph.dense().module(), self.evaluation).nll

    def seeds_nll(self, make: Callable[[Tensor], Graph]) -> Tensor:
        """The NLL of `make(calibration)`, averaged over the calibration seeds, float64 [windows]."""
        return torch.stack([self.nll(make(self.calibration(seed))) for seed in self.seeds]).mean(0)


Experiment = Callable[[Bench], Iterator[Finding]]


def run(experiment: Experiment, doc: str | None, argv: list[str] | None = None) -> None:
    """The command line of an experiment file."""
    with keep_memory():  # as the command line does
        _run(experiment, doc, argv)


def _run(experiment: Experiment, doc: str | None, argv: list[str] | None) -> None:
    path = Path(inspect.getfile(experiment))
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="smollm2-135m", help="a folder, a GGUF file, a hub name, or smollm2-135m (default)"
    )
    parser.add_argument(
        "--calibration", default="pydoc", help="calibration text: a path or a data set's name (default: pydoc)"
    )
    parser.add_argument("--evaluation", default="pydoc", help="evaluation text, its test split (default: pydoc)")
    parser.add_argument(
        "--windows",
        type=int,
        default=36,
        help="evaluation windows of 1024 tokens (default: 36, about all that pydoc has; 50 or more for a verdict)",
    )
    parser.add_argument("--samples", type=int, default=32, help="calibration windows of 512 tokens (default: 32)")
    parser.add_argument("--seeds", type=int, default=3, help="calibration draws (default: 3)")
    parser.add_argument(
        "--work",
        type=Path,
        help="keep trained models here (those of SmolLM2 take 0.5 GB each), so that a killed run goes on",
    )
    parser.add_argument("--quick", action="store_true", help="a smoke test: one seed, little data, nothing written")
    parser.add_argument(
        "--again",
        action="store_true",
        help="measure everything again, also what the result file has under this protocol",
    )
    args = parser.parse_args(argv)
    if args.quick:
        args.windows, args.samples, args.seeds = 2, 4, 1
    started = time.perf_counter()
    graph = load(args.model, dtype=torch.float32)
    evaluation = data.tokens(
        args.evaluation, graph.tokenizer, args.windows, min(1024, graph.config.max_position), split="test"
    )
    # Only names are recorded of data given by path: where a text lies on somebody's disk says nothing about it.
    options = {
        k: Path(v).name if isinstance(v, str) else v for k, v in vars(args).items() if k not in ("again", "work")
    }
    protocol = options | {"seq_len": evaluation.shape[1]}
    file = HERE / "results" / f"{path.stem}.json"
    earlier, minutes = ((), 0.0) if args.quick or args.again else read_findings(file, protocol)
    bench = Bench(
        graph, args.calibration, evaluation, tuple(range(args.seeds)), args.samples, args.quick, earlier, args.work
    )
    findings: list[Finding] = []

    def write(rows: list[Finding]) -> None:
        result = {"title": (doc or "").splitlines()[0], "protocol": protocol, "findings": [asdict(f) for f in rows]}
        spent = round(minutes + (time.perf_counter() - started) / 60, 1)
        write_json(file, result | {"minutes": spent, "environment": environment()})
        write_readme()

    for finding in experiment(bench):
        if finding not in earlier:
            finding = replace(finding, machine=environment()["machine"])
        findings.append(finding)
        note = ", from an earlier run" if finding in earlier else ""
        print(
            f"{finding.claim}: {finding.ours} ({finding.criterion}; paper: {finding.paper}) "
            f"{_verdict(finding.holds)}{note}",
            flush=True,
        )
        if not args.quick and not note:  # after every finding, so that a killed run keeps what it found
            write(findings + [f for f in earlier if f not in findings])
    if not set(earlier) <= set(findings):  # what the experiment no longer asks
        write(findings)


def read_findings(file: Path, protocol: dict[str, object]) -> tuple[tuple[Finding, ...], float]:
    """The findings of an earlier run under the same protocol, and the minutes they took."""
    result = read_json(file) if file.exists() else {}
    if result.get("protocol") != protocol:
        return (), 0.0
    return tuple(Finding(**(f | {"ours": Interval(**f["ours"])})) for f in result["findings"]), result["minutes"]


def write_readme() -> None:
    """The index: one row a finding, made from the committed results."""
    lines = [
        "# Experiments",
        "",
        "Each script states a paper's claim and protocol and measures it; this table is made from `results/` by",
        "the scripts themselves.",
        "",
    ]
    lines += [
        "| experiment | claim | paper | ours, with 95% interval | criterion | verdict |",
        "|---|---|---|---|---|---|",
    ]
    notes = []
    for file in sorted((HERE / "results").glob("*.json")):
        result = json.loads(file.read_text())
        for f in result["findings"]:
            name = f"[`{file.stem}`]({result.get('script', file.stem)}.py)"
            lines.append(
                f"| {name} | {f['claim']} | {f['paper']} | {Interval(**f['ours'])} | {f['criterion']} | "
                f"*{_verdict(f['holds'])}* |"
            )
        p = result["protocol"]
        machine = " and ".join(
            dict.fromkeys(f.get("machine") or result["environment"]["machine"] for f in result["findings"])
        )
        if "how" in result:
            notes.append(f"{result['how']} {machine}, {result['minutes']} minutes.")
            continue
        notes.append(
            f"- `{file.stem}`: {p['model']}, calibration {p['samples']} × 512 tokens of {p['calibration']} for each "
            f"of {p['seeds']} seeds, "
            f"evaluation {p['windows']} × {p['seq_len']} tokens of {p['evaluation']}; {machine}; `python "
            f"experiments/{file.stem}.py "
            f"--calibration {p['calibration']} --evaluation {p['evaluation']} --windows {p['windows']} --samples "
            f"{p['samples']} "
            f"--seeds {p['seeds']}`, {result['minutes']} minutes."
        )
    write_text(HERE / "README.md", "\n".join([*lines, "", *notes, "", "A new claim is a copy of one file.", ""]))


def _verdict(holds: bool) -> str:
    return "holds" if holds else "does not hold"
