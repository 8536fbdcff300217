"""What every check does with what its runtime computed: figures against torch, one line, an exit code. Needs numpy
only.

A check gets one or more exported folders, each with a reference (reference.json and reference.f32, see
export/reference.py). It feeds the first window as a prompt and then id by id behind the cache, the other windows whole,
and hands the logits over.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

KEYS = ("error", "kl", "flips", "perplexity")
CHUNK = 64  # positions that are compared at once
UNDECIDED = 0.25  # nats: torch holds the other token for at least 78% as likely as its own first


class Reference:
    """The yardstick in `folder`: ids [W, T], logits float32 [W, T, V], the greedy continuation of the first `prompt`
    ids."""

    def __init__(self, folder: Path) -> None:
        data = json.loads((folder / "reference.json").read_text(encoding="utf-8"))
        self.folder = folder
        self.limits = data["limits"]
        self.ids = np.array(data["ids"], np.int64)
        self.windows, self.length = self.ids.shape
        self.prompt = data["prompt"]
        self.vocab = data["vocab"]
        self.context = data["context"]
        self.cache: list[list[int]] = data["cache"]
        self.greedy = data["greedy"]
        self.margins = data["margins"]
        self.ends: list[int] = data["ends"]
        self.texts: list[dict[str, Any]] = data["texts"]
        self.logits = np.memmap(folder / "reference.f32", "<f4", "r", shape=(*self.ids.shape, self.vocab))

    def spans(self, window: int = 0) -> list[tuple[int, int]]:
        """How a window is fed: the first as a prompt and then one id at a time, the others whole."""
        steps = [(0, self.prompt), *((i, i + 1) for i in range(self.prompt, self.length))]
        return [(0, self.length)] if window else steps

    @property
    def start(self) -> np.ndarray:
        """ids [prompt]: what greedy decoding continues."""
        return self.ids[0, : self.prompt]


def figures(
    reference: Reference, logits: Iterable[np.ndarray], first: int = 0, stop: int | None = None
) -> dict[str, float]:
    """What differs over windows of logits [T - first, V], in turn, from position `first` of each on: the largest
    difference, mean KL in nats, share of changed top tokens, the share of those that torch had decided, and the
    relative change of perplexity. `stop` leaves out the positions from there on, and all windows but the first.

    A top token is decided where the other one is more than UNDECIDED behind it in torch. All flips are judged; the
    decided ones are there to read them by: where two tokens are as good as level (random weights: 0.3 apart) any
    rounding turns them over. `flips_se` and `perplexity_se` are the standard errors of those means over so few
    positions."""
    rows = []
    losses = []
    windows = slice(1 if stop else None)
    for expected, ids, got in zip(
        reference.logits[windows, first:stop], reference.ids[windows, first:stop], logits, strict=True
    ):
        if got.shape != expected.shape:
            raise ValueError(f"logits of shape {got.shape}, expected {expected.shape}")
        for a in range(0, len(got), CHUNK):
            p, q = (_log_softmax(part[a : a + CHUNK].astype(np.float64)) for part in (expected, got))
            behind = p.max(-1) - np.take_along_axis(p, q.argmax(-1)[:, None], -1)[:, 0]
            error = np.abs(got[a : a + CHUNK].astype(np.float64) - expected[a : a + CHUNK]).max(-1)
            rows.append(
                np.stack([error, (np.exp(p) * (p - q)).sum(-1), p.argmax(-1) != q.argmax(-1), behind > UNDECIDED])
            )
            target = ids[a + 1 : a + 1 + CHUNK]
            losses.append((p - q)[np.arange(len(target)), target])
    error, kl, flips, decided = np.concatenate(rows, 1)
    lost = np.concatenate(losses)
    share = float(flips.mean())
    return {
        "error": float(error.max()),
        "kl": float(kl.mean()),
        "flips": share,
        "decided_flips": float(decided.mean()),
        "perplexity": float(abs(np.exp(lost.mean()) - 1)),
        "flips_se": float(np.sqrt(share * (1 - share) / len(flips))),
        "perplexity_se": float(lost.std() / np.sqrt(len(lost))),
        "positions": len(flips),
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
    """The figures beyond their limits; `exact` holds the largest difference to that of float32 arithmetic too."""
    limits = {k: reference.limits[k] for k in KEYS if k in reference.limits}
    if exact:
        limits["error"] = reference.limits["prefill"] * max(1.0, _peak(reference.logits) / 10)
    return [f"{k} {found[k]:.3g} > {limit:.3g}" for k, limit in limits.items() if not found[k] <= limit]


def main(
    runtime: str,
    versions: Callable[[], dict[str, str]],
    check: Callable[[Path, Reference], tuple[dict[str, Any], list[str]]],
) -> None:
    """Runs `check(folder, reference)` → (figures, failures) over the folders of the command line: a line each, and exit
    code 1 if any failed. --json FILE appends one JSON object a folder."""
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
    words = (
        f"passed: {shown}"
        if result["passed"]
        else f"failed: {'; '.join(result['failures'])}" + (f" ({shown})" if shown else "")
    )
    print(f"{runtime} {folder.name} {words}".replace("\n", " "), flush=True)
    return result


def _peak(logits: np.ndarray) -> float:
    return max(float(np.abs(window).max()) for window in logits)


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))
