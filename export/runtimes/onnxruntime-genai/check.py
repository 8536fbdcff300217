"""An exported folder in onnxruntime-genai: logits of its generator, step by step, and its own greedy search.

    python check.py FOLDER … [--json FILE]

genai_config.json must be right for this to run at all; the cache is the one buffer that the generator shares between
past and present.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import Reference, figures, greedy_agrees, is_exact, judge, main

MARGIN = 0.25


def generator(model: Any, max_length: int) -> Any:
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=max_length, do_sample=False)
    return og.Generator(model, params)


def check(folder: Path, reference: Reference) -> tuple[dict[str, Any], list[str]]:
    model = og.Model(str(folder))

    def stepped(ids: np.ndarray) -> np.ndarray:
        run = generator(model, min(reference.length + 1, reference.context))
        rows = []
        for start, stop in reference.spans():  # of every window: genai keeps the last position only
            run.append_tokens(ids[start:stop].astype(np.int32))
            rows.append(np.asarray(run.get_logits()).reshape(-1, reference.vocab)[-1:].copy())
        return np.concatenate(rows)

    found: dict[str, Any] = figures(reference, map(stepped, reference.ids), reference.prompt - 1)
    failures = judge(reference, found, is_exact(folder))
    search = generator(model, reference.prompt + len(reference.greedy))
    search.append_tokens(reference.start.astype(np.int32))
    while not search.is_done():
        search.generate_next_token()
    tokens = [int(t) for t in search.get_sequence(0)][reference.prompt :]
    fine, about = greedy_agrees(reference, tokens, MARGIN)
    return found | {"greedy": about.split()[1]}, failures + ([] if fine else [about])


if __name__ == "__main__":
    main("onnxruntime-genai", lambda: {"onnxruntime-genai": og.__version__}, check)
