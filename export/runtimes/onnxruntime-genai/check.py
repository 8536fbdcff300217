"""An exported folder in onnxruntime-genai: logits of its generator, step by step, and its own greedy search; then what
its own files say: ids of its tokenizer with and without a beginning of text, where a text ends, and a padded batch.

    python check.py FOLDER … [--json FILE]

genai_config.json must be right for this to run at all; the cache is the one buffer that the generator shares between
past and present. A batch is padded on the right, as genai's `encode_batch` pads: genai 0.18 takes tokens that pad on
the left for text.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import Reference, figures, greedy_agrees, is_exact, judge, main

MARGIN = 0.25
BATCH_STEPS = 8  # tokens that each row of a padded batch writes


def generator(model: Any, max_length: int, rows: int = 1) -> Any:
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=max_length, batch_size=rows, do_sample=False)
    return og.Generator(model, params)


def written(model: Any, prompts: np.ndarray, steps: int) -> list[list[int]]:
    """What greedy search writes behind prompts [rows, T], at most so many tokens."""
    rows, length = prompts.shape
    search = generator(model, length + steps, rows)
    search.append_tokens(prompts.astype(np.int32))
    while not search.is_done():
        search.generate_next_token()
    return [[int(token) for token in search.get_sequence(row)][length:] for row in range(rows)]


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
    tokens = written(model, reference.start[None], len(reference.greedy))[0]
    fine, about = greedy_agrees(reference, tokens, MARGIN)
    failures += [] if fine else [about]
    failures += wrong_ids(model, reference)
    failures += wrong_ends(folder, reference, tokens)
    failures += wrong_rows(folder, model, reference)
    return found | {"greedy": about.split()[1]}, failures


def wrong_ids(model: Any, reference: Reference) -> list[str]:
    """Texts whose ids are others than the graph's tokenizer gives, with special tokens around them or not."""
    if not reference.texts:
        return []
    tokenizer = og.Tokenizer(model)
    out = []
    for kind in ("plain", "special"):
        if kind == "special":
            tokenizer.update_options(add_special_tokens="true")
        for entry in reference.texts:
            got = [int(token) for token in tokenizer.encode(entry["text"])]
            if got != entry[kind]:
                out.append(f"{kind} ids of {entry['text']!r} are {got}, expected {entry[kind]}")
    return out


def wrong_ends(folder: Path, reference: Reference, tokens: list[int]) -> list[str]:
    """Whether genai_config.json names the ids that end a text, and whether a text ends at any of them. `tokens` is
    what the search wrote; one of them takes the place of an end, behind one that never comes."""
    stated = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"].get("eos_token_id")
    ends = stated if isinstance(stated, list) else [stated]
    out = []
    if [end for end in ends if end is not None] != reference.ends:
        out.append(f"eos_token_id of genai_config.json is {stated}, expected {reference.ends}")
    if set(tokens[:-1]) & set(reference.ends):
        out.append("the text goes on behind an end")
    end = tokens[len(tokens) // 2]
    never = min(set(range(reference.vocab)) - set(tokens))
    config = og.Config(str(folder))
    config.overlay(json.dumps({"model": {"eos_token_id": [never, end]}}))
    expected = tokens[: tokens.index(end)]
    got = written(og.Model(config), reference.start[None], len(tokens))[0]
    if got not in (expected, [*expected, end]):  # genai 0.18 leaves out the end itself
        out.append(f"with {end} as an end the text is {got}, expected {expected}")
    return out


def wrong_rows(folder: Path, model: Any, reference: Reference) -> list[str]:
    """Rows that write otherwise in a batch, the shorter padded on the right, than alone."""
    pad = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]["pad_token_id"]
    long = reference.start
    short = long[: max(1, len(long) // 2)]
    padded = np.concatenate([short, np.full(len(long) - len(short), pad, short.dtype)])
    batch = written(model, np.stack([long, padded]), BATCH_STEPS)
    out = []
    for name, prompt, got in zip(("long", "short"), (long, short), batch, strict=True):
        alone = written(model, prompt[None], BATCH_STEPS)[0]
        if got[: len(alone)] != alone:  # a row that has ended is padded up to the others
            out.append(f"the {name} row of a padded batch writes {got}, alone {alone}")
    return out


if __name__ == "__main__":
    main("onnxruntime-genai", lambda: {"onnxruntime-genai": og.__version__}, check)
