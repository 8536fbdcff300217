"""A real model through all six profiles, from the command line: what each export loses against torch with the same
weights.

    tinycompress compress smollm2-135m --quantize w4g64 --quantize-embedding w8g32 --calibration wiki_passages.txt -o w4
    tinycompress compress smollm2-135m --quantize w4g64 --quantize-embedding w8g64 --calibration wiki_passages.txt -o
        npu
    tinycompress compress smollm2-135m --quantize w4g64-lpbq --rotate --calibration wiki_passages.txt -o lpbq
    python benchmarks/export_quality.py --w4 w4 --npu npu --lpbq lpbq --work DIR [--only ROW …] [--quick]

Each row is `tinycompress export MODEL --profile … --verify` (its gate: 8 windows of 512 tokens of "pydoc"; `qnn` and
`static` on their own host, ONNX Runtime's CPU provider) and then `tinycompress verify OUT --runtime …` for every
installed runtime that the profile is proved in (the same text, or its first 512 tokens where steps are slow, and greedy
steps). A row that failed says so. Exports stay in DIR and are not made again; results go to results/export_quality.json
and .md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tinycompress.evaluation.perplexity import environment
from tinycompress.export import PROFILES
from tinycompress.export.gate.runtime import installed
from tinycompress.files import write_json, write_text

RESULTS = Path(__file__).parent / "results" / "export_quality.json"
COMMAND = Path(sys.executable).parent / "tinycompress"


@dataclass(frozen=True)
class Row:
    """An export: `model` is "w4", "npu", "lpbq" or "dense" (--model)."""

    model: str
    profile: str
    runtimes: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


GENAI = ("onnxruntime-genai", "optimum")
ROWS = {
    "ort": Row("w4", "ort", GENAI),
    "ort, float16 scales": Row("w4", "ort", GENAI, ("--scales", "float16")),
    "ort, int8 cache": Row("w4", "ort", GENAI[:1], ("--kv", "int8")),
    "ort, dense": Row("dense", "ort", GENAI),
    "web": Row("w4", "web", ("transformers-js", "chromium")),
    "std": Row("w4", "std", ("openvino",)),
    "openvino-npu": Row("npu", "openvino-npu"),  # groups are multiples of 64 there; its gate runs OpenVINO itself
    "qnn, w4g64-lpbq": Row("lpbq", "qnn", (), ("--context", "512")),  # on HTP's emulator
    "qnn, int8": Row("dense", "qnn", (), ("--context", "512")),
    "static": Row("dense", "static", (), ("--context", "512")),  # the same in RKNN's simulator
}


def measure(row: Row, model: str, out: Path, report: Any) -> dict[str, Any]:
    if not out.is_dir():
        command = [str(COMMAND), "export", model, "--profile", row.profile, "--verify", *row.options, "-o", str(out)]
        with tempfile.TemporaryFile("w+") as errors:
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True, check=False)
            errors.seek(0)
            if done.returncode:
                return {"failed": errors.read().strip().splitlines()[-1][-600:]}
    manifest = json.loads((out / "manifest.json").read_text())
    checks = manifest["checks"]
    found: dict[str, Any] = {
        "scheme": manifest["scheme"],
        "bytes": sum(file["bytes"] for file in manifest["files"].values()),
    }
    found |= {
        "gate": {
            c["check"]: {"figure": c["figure"], "limit": c["limit"], "passed": c["passed"]} for c in checks["checks"]
        }
    }
    found |= {"perplexity": checks["perplexity"], "text": checks["text"]}
    runtime = PROFILES[row.profile].runtime  # which the gate ran itself
    found["runtimes"] = (
        {runtime: {"passed": True, "figures": checks[runtime], "failures": []}} if runtime in checks else {}
    )
    for name in row.runtimes:
        if not installed(name):
            found["runtimes"][name] = {"not_run": "not installed"}
            continue
        report(f"{out.name} in {name}")
        done = subprocess.run(
            [str(COMMAND), "verify", str(out), "--runtime", name, "--json"],
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        try:
            found["runtimes"][name] = json.loads(done.stdout)
        except json.JSONDecodeError:
            found["runtimes"][name] = {
                "passed": False,
                "failures": [f"exit code {done.returncode}: {done.stdout.strip()[-400:]}"],
            }
    return found


def table(rows: dict[str, Any], model: str, machine: str) -> str:
    about = f"{model}; {machine}; made by `benchmarks/export_quality.py`, which says what the rows are."
    lines = ["# A real model through every profile", "", about, ""]
    lines += [
        "| | weights | MB | KL, nats | other top token | perplexity in torch → exported | in runtimes |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        if "failed" in row:
            lines.append(f"| {name} | | | | | **failed**: {' '.join(row['failed'].split())} | |".replace("\n", " "))
            continue
        gate, ppl = row["gate"], row["perplexity"]
        words = "; ".join(f"{runtime} {_words(one)}" for runtime, one in row["runtimes"].items())
        change = f"{ppl['torch']:.3f} → {ppl['exported']:.3f} ({ppl['exported'] / ppl['torch'] - 1:+.2%})"
        figures = f"{gate['kl']['figure']:.2g} | {gate['flips']['figure']:.1%} | {change}"
        lines.append(f"| {name} | {row['scheme']} | {row['bytes'] / 1e6:.0f} | {figures} | {words} |")
    texts = {row["text"] for row in rows.values() if "text" in row}
    return "\n".join([*lines, "", f"KL, top tokens and perplexity: the gate, {', '.join(sorted(texts))}.", ""])


def _words(one: dict[str, Any]) -> str:
    if "not_run" in one:
        return "not run"
    figures = one.get("figures", {})
    shown = [
        f"{word} {figures[key]:.2g}" for key, word in (("kl", "KL"), ("flips", "other top token")) if key in figures
    ]
    shown += [f"greedy {figures['greedy']}"] if "greedy" in figures else []
    return ("passed" if one["passed"] else "**failed** " + "; ".join(one.get("failures", ()))) + (
        f" ({', '.join(shown)})" if shown else ""
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a folder for the exports (4 GB)")
    parser.add_argument("--model", default="smollm2-135m", help="the dense model")
    parser.add_argument("--w4", required=True, help="the same, compressed: see above")
    parser.add_argument("--npu", required=True)
    parser.add_argument("--lpbq", required=True)
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=" | ".join(ROWS))
    parser.add_argument("--quick", action="store_true", help="a smoke test: nothing written")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)

    def known() -> dict[str, Any]:
        """What was measured so far, by whichever process."""
        return json.loads(RESULTS.read_text()) if RESULTS.is_file() and not args.quick else {"rows": {}}

    results = known()
    models = {"w4": args.w4, "npu": args.npu, "lpbq": args.lpbq, "dense": args.model}
    with tqdm(args.only, desc="profiles") as bar:
        for name in bar:
            bar.set_postfix_str(name)
            row = ROWS[name]
            found = measure(row, models[row.model], args.work / name.replace(", ", "-"), bar.set_postfix_str)
            results = known() if not args.quick else results
            results["rows"][name] = found
            results |= {"model": Path(args.model).name, "environment": environment()}
            if not args.quick:
                write_json(RESULTS, results)
    rows = {name: results["rows"][name] for name in ROWS if name in results["rows"]}
    text = table(rows, results["model"], results["environment"]["machine"])
    if not args.quick:
        write_text(RESULTS.with_suffix(".md"), text)
    print(text)


if __name__ == "__main__":
    main()
