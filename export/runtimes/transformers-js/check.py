"""An exported folder of the `web` profile in transformers.js under Node: logits with its cache, and its generate.

    python check.py FOLDER … [--json FILE]

run.mjs does the work in JavaScript; this feeds it and compares.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from common import Reference, figures, greedy_agrees, is_exact, judge, main  # noqa: E402

MARGIN = 0.25
VERSIONS: dict[str, str] = {}


def check(folder: Path, reference: Reference) -> tuple[dict[str, Any], list[str]]:
    with tempfile.TemporaryDirectory() as work:
        out = Path(work) / "logits.f32"
        request = {"folder": str(folder.resolve()), "windows": reference.ids.tolist(), "prompt": reference.prompt}
        request |= {"steps": len(reference.greedy), "out": str(out)}
        done = subprocess.run(
            ["node", str(HERE / "run.mjs")],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            timeout=1800,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(done.stderr.strip()[-400:])
        answer = json.loads(done.stdout.strip().splitlines()[-1])
        VERSIONS.update(answer["versions"])
        found: dict[str, Any] = figures(reference, np.memmap(out, "<f4", "r", shape=reference.logits.shape))
    fine, about = greedy_agrees(reference, answer["greedy"], MARGIN)
    failures = judge(reference, found, is_exact(folder)) + ([] if fine else [about])
    return found | {"greedy": about.split()[1], "tok_s": answer["tok_s"]}, failures


if __name__ == "__main__":
    main("transformers-js", lambda: VERSIONS, check)
