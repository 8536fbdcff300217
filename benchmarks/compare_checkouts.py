"""Two checkouts of this library, compared: the same bits, integers and bytes, and how long the same work takes.

    python benchmarks/compare_checkouts.py OLD NEW [--rounds 5] [--only passes exports] [--no-timing]
    python benchmarks/compare_checkouts.py ../before . --rounds 7

OLD and NEW are folders with a checkout each, installed (editable) in a .venv of its own. A worker process
(checkout_worker.py) lives in each of them and computes values by name: hashes of logits, weights and files
(checkout_checks.py). They must be equal, but for the differences in `EXPECTED`, which are reported by name. Then both
workers take turns at every task: old, new, old, new …, one turn of each that does not count, then `--rounds` that do.
Reported are medians of seconds and the median of the rounds' ratios new / old; above `--limit` (1.05) the script fails.

Results: benchmarks/results/compare_checkouts.json and, as a table, compare_checkouts.md beside it.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

from checkout_checks import CHECKS
from checkout_worker import TIMES
from tqdm import tqdm

RESULTS = Path(__file__).parent / "results"
WORKER = Path(__file__).parent / "checkout_worker.py"
EXPECTED = {  # values that may differ, and why
    "*history*": "history strings are the passes' reprs, whose fields have new names",
    "*:.quantized.*.scale": "a stored grid no longer says how its scales were searched",
    "*-lpbq/manifest.json:.scheme": "a stored grid no longer says how its scales were searched",
    "*tinycompress.json": "holds the history and the grids, compared field by field beside it",
    "*manifest.json": "holds the history and the grids, compared field by field beside it",
}


class Worker:
    """A process in a checkout, asked by lines of standard input, one answer a line."""

    def __init__(self, checkout: Path, threads: int, scratch: Path, memory: str) -> None:
        python = checkout / ".venv" / "bin" / "python"
        if not python.exists():
            sys.exit(f"{checkout}: no .venv/bin/python; make it, and in it: pip install -e '{checkout}[export]'")
        scratch.mkdir()
        environment = os.environ | {"TQDM_DISABLE": "1", "OMP_NUM_THREADS": str(threads)}
        environment.pop("PYTHONPATH", None)
        command = [str(python), str(WORKER), str(checkout), str(threads), memory]
        self.process = subprocess.Popen(
            command, cwd=scratch, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.about = self.answer()

    def ask(self, kind: str, name: str) -> Any:
        assert self.process.stdin
        self.process.stdin.write(f"{kind} {name}\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> Any:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"the worker ended with {self.process.wait()}: see its messages above")
        return json.loads(line)

    def close(self) -> None:
        self.process.communicate()


def reason(key: str) -> str | None:
    """Why a value may differ; None if it must not."""
    return next((why for pattern, why in EXPECTED.items() if fnmatch.fnmatch(key, pattern)), None)


def compare(old: dict[str, str], new: dict[str, str]) -> dict[str, dict[str, Any]]:
    """The values that differ, by name."""
    out: dict[str, dict[str, Any]] = {}
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            out[key] = {"old": old.get(key), "new": new.get(key), "expected": reason(key)}
    return out


def check_all(workers: dict[str, Worker], groups: list[str]) -> dict[str, dict[str, Any]]:
    out = {}
    for group in tqdm(groups, desc="checks"):
        old, new = (workers[name].ask("check", group) for name in ("old", "new"))
        out[group] = {"values": len(old), "differences": compare(old, new)}
    return out


def time_all(workers: dict[str, Worker], rounds: int) -> dict[str, dict[str, Any]]:
    """Seconds by task: the two workers by turns, and the first turn of each does not count."""
    out = {}
    for task in tqdm(list(TIMES), desc="timing"):
        taken: dict[str, list[float]] = {name: [] for name in workers}
        for _ in range(rounds + 1):
            for name, worker in workers.items():
                taken[name].append(worker.ask("time", task))
        seconds = {name: values[1:] for name, values in taken.items()}
        ratios = [new / old for old, new in zip(seconds["old"], seconds["new"], strict=True)]
        medians = {name: median(values) for name, values in seconds.items()}
        out[task] = {"median": medians, "ratio": median(ratios), "seconds": seconds}
    return out


def table(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    about = result["about"]
    lines = [
        "# Two checkouts compared",
        "",
        "    python benchmarks/compare_checkouts.py OLD NEW",
        "",
        *(f"- {name}: commit {about[name]['commit'][:12]}, torch {about[name]['torch']}" for name in ("old", "new")),
        f"- {about['new']['machine']}, {about['new']['threads']} threads",
        f"- {result['rounds']} rounds by turns, memory {result['memory']}",
        "",
        "| check | values | different | of these expected |",
        "|---|---|---|---|",
    ]
    for name, check in result["checks"].items():
        different = check["differences"].values()
        named = [d for d in different if d["expected"]]
        lines.append(f"| {name} | {check['values']} | {len(different)} | {len(named)} |")
    if reasons := sorted({d["expected"] or "" for c in result["checks"].values() for d in c["differences"].values()}):
        lines += ["", "Expected differences:", "", *(f"- {text}" for text in reasons if text)]
    unexpected = unexplained(result["checks"])
    lines += ["", "Other differences: " + (", ".join(f"`{key}`" for key in unexpected) or "none") + "."]
    if result["times"]:
        lines += ["", "| task | old, s | new, s | new / old |", "|---|---|---|---|"]
    for task, times in result["times"].items():
        medians = times["median"]
        lines.append(f"| {task} | {medians['old']:.3f} | {medians['new']:.3f} | {times['ratio']:.3f} |")
    return "\n".join(lines) + "\n"


def unexplained(checks: dict[str, dict[str, Any]]) -> list[str]:
    return [key for check in checks.values() for key, d in check["differences"].items() if not d["expected"]]


def shortened(result: dict[str, Any]) -> dict[str, Any]:
    """The result with expected differences counted by their reason: one by one they are thousands."""
    checks = {}
    for name, check in result["checks"].items():
        differences = check["differences"]
        reasons = Counter(difference["expected"] for difference in differences.values() if difference["expected"])
        others = {key: difference for key, difference in differences.items() if not difference["expected"]}
        checks[name] = check | {"expected": dict(reasons), "differences": others}
    return result | {"checks": checks}


def start(args: argparse.Namespace, scratch: Path) -> dict[str, Worker]:
    """A worker in each of the two checkouts."""
    scratch.mkdir()
    return {
        name: Worker(checkout.resolve(), args.threads, scratch / name, args.memory)
        for name, checkout in (("old", args.old), ("new", args.new))
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, help="checkout to compare with")
    parser.add_argument("new", type=Path, help="checkout to judge")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each timing that count (default: 5)")
    parser.add_argument("--limit", type=float, default=1.05, help="largest ratio new / old that passes (default: 1.05)")
    parser.add_argument("--threads", type=int, default=2, help="threads of each worker (default: 2)")
    parser.add_argument("--only", nargs="*", choices=list(CHECKS), help="checks to run (default: all)")
    parser.add_argument(
        "--memory",
        choices=("kept", "plain"),
        default="kept",
        help="kept: the new checkout's process enters keep_memory(), as its command line does; plain: it does not",
    )
    parser.add_argument("--no-timing", action="store_true", help="compare values only")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        workers = start(args, Path(scratch) / "checks")
        result: dict[str, Any] = {
            "about": {name: worker.about for name, worker in workers.items()},
            "rounds": 0 if args.no_timing else args.rounds,
            "limit": args.limit,
            "memory": args.memory,
            "checks": check_all(workers, list(CHECKS) if args.only is None else args.only),
            "times": {},
        }
        for worker in workers.values():
            worker.close()
        if not args.no_timing:  # in processes that have done nothing else
            workers = start(args, Path(scratch) / "times")
            result["times"] = time_all(workers, args.rounds)
            for worker in workers.values():
                worker.close()
    RESULTS.mkdir(exist_ok=True)
    text = table(result)
    (RESULTS / "compare_checkouts.md").write_text(text)
    (RESULTS / "compare_checkouts.json").write_text(json.dumps(shortened(result), indent=1) + "\n")
    print(text)
    slow = [task for task, times in result["times"].items() if times["ratio"] > args.limit]
    if slow:
        print(f"slower than {args.limit}: {', '.join(slow)}", file=sys.stderr)
    sys.exit(1 if slow or unexplained(result["checks"]) else 0)


if __name__ == "__main__":
    main()
