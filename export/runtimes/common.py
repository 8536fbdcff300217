"""What every check does with what its runtime computed: figures against torch, one line, an exit code. Needs numpy only.

A check gets one or more exported folders, each with a reference (reference.json and reference.f32, see
export/reference.py). It feeds the prompt, then the other ids one by one behind the cache, and hands the logits over.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

KEYS = ("error", "kl", "flips", "perplexity")
UNDECIDED = 0.25  # nats: torch holds the other token for at least 78% as likely as its own first


class Reference:
    """The yardstick in `folder`: ids [T], logits float32 [T, V], the greedy continuation of the first `prompt` ids."""

    def __init__(self, folder: Path) -> None:
        data = json.loads((folder / "reference.json").read_text(encoding="utf-8"))
        self.folder, self.limits = folder, data["limits"]
        self.ids = np.array(data["ids"], np.int64)
        self.prompt, self.vocab, self.context = data["prompt"], data["vocab"], data["context"]
        self.cache: list[list[int]] = data["cache"]
        self.greedy, self.margins = data["greedy"], data["margins"]
        self.logits = np.fromfile(folder / "reference.f32", "<f4").reshape(len(self.ids), self.vocab)

    def spans(self) -> list[tuple[int, int]]:
        """The prompt, then one id at a time."""
        return [(0, self.prompt), *((i, i + 1) for i in range(self.prompt, len(self.ids)))]


def figures(reference: Reference, logits: np.ndarray, first: int = 0) -> dict[str, float]:
    """Logits [T - first, V] of positions `first` and later: largest difference, mean KL in nats, share of changed top tokens, the
    share of those that torch had decided, and the relative change of perplexity.

    A top token is decided where the other one is more than UNDECIDED behind it in torch. All flips are judged; the decided ones are
    there to read them by: where two tokens are as good as level (random weights: 0.3 apart) any rounding turns them over.
    `flips_se` and `perplexity_se` are the standard errors of those means over so few positions."""
    expected, got = reference.logits[first:].astype(np.float64), np.asarray(logits, np.float64)
    if got.shape != expected.shape:
        raise ValueError(f"logits of shape {got.shape}, expected {expected.shape}")
    p, q = _log_softmax(expected), _log_softmax(got)
    target = reference.ids[first + 1 :]
    lost = (p - q)[np.arange(len(target)), target]
    flips = float((p.argmax(-1) != q.argmax(-1)).mean())
    return {
        "error": float(np.abs(got - expected).max()),
        "kl": float((np.exp(p) * (p - q)).sum(-1).mean()),
        "flips": flips,
        "decided_flips": float((p.max(-1) - np.take_along_axis(p, q.argmax(-1)[:, None], -1)[:, 0] > UNDECIDED).mean()),
        "perplexity": float(abs(np.exp(lost.mean()) - 1)),
        "flips_se": float(np.sqrt(flips * (1 - flips) / len(expected))),
        "perplexity_se": float(lost.std() / np.sqrt(len(lost))),
    }


def greedy_agrees(reference: Reference, tokens: list[int], largest_margin: float) -> tuple[bool, str]:
    """Whether a greedy continuation is the reference's, or parts from it where torch itself was undecided."""
    expected = reference.greedy[: len(tokens)]
    same = next((i for i, (a, b) in enumerate(zip(expected, tokens)) if a != b), len(expected))
    fine = len(tokens) > 0 and (same == len(expected) or reference.margins[same] <= largest_margin)
    return fine, f"greedy {same}/{len(expected)}"


def is_exact(folder: Path) -> bool:
    """Whether an export computes in float32: nothing packed, or at accuracy level 0, and a float cache."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return not manifest.get("kv") and (manifest["accuracy_level"] == 0 or not manifest["quantized"])


def judge(reference: Reference, found: dict[str, float], exact: bool = False) -> list[str]:
    """The figures beyond their limits; `exact` holds the largest difference to that of float32 arithmetic too.

    Over 64 positions a perplexity has a standard error of its own (`perplexity_se`), about 1% with int8 activations."""
    limits = {k: reference.limits[k] for k in KEYS if k in reference.limits}
    if exact:
        limits["error"] = reference.limits["prefill"] * max(1.0, float(np.abs(reference.logits).max()) / 10)
    return [f"{k} {found[k]:.3g} > {limit:.3g}" for k, limit in limits.items() if not found[k] <= limit]


def main(runtime: str, versions: Callable[[], dict[str, str]], check: Callable[[Path, Reference], tuple[dict[str, Any], list[str]]]) -> None:
    """Runs `check(folder, reference)` → (figures, failures) over the folders of the command line: a line each, and exit code
    1 if any failed. --json FILE appends one JSON object a folder."""
    parser = argparse.ArgumentParser(description=f"Checks exported folders in {runtime} against torch's logits.")
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--reference", type=Path, help="where reference.json is (default: inside each folder)")
    parser.add_argument("--json", type=Path, help="append the results to this file, one JSON object a line")
    args = parser.parse_args()
    results = [_run(runtime, versions, check, folder, args.reference or folder) for folder in args.folders]
    if args.json:
        with args.json.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(result) + "\n" for result in results)
    sys.exit(not all(result["passed"] for result in results))


def _run(runtime: str, versions: Callable, check: Callable, folder: Path, where: Path) -> dict[str, Any]:
    start = time.perf_counter()
    result: dict[str, Any] = {"runtime": runtime, "folder": folder.name}
    try:
        found, failures = check(folder, Reference(where))
        result |= {"passed": not failures, "figures": found, "failures": failures, "versions": versions()}
    except Exception as error:  # whatever a runtime throws is the check's answer, not its end
        traceback.print_exc(file=sys.stderr)
        result |= {"passed": False, "figures": {}, "failures": [f"{type(error).__name__}: {str(error).strip()[:300]}"]}
    result["seconds"] = round(time.perf_counter() - start, 2)
    shown = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in result["figures"].items())
    words = f"passed: {shown}" if result["passed"] else f"failed: {'; '.join(result['failures'])}" + (f" ({shown})" if shown else "")
    print(f"{runtime} {folder.name} {words}".replace("\n", " "), flush=True)
    return result


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))
