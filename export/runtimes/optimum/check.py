"""An exported folder in Optimum's ORTModelForCausalLM: logits with its cache, and transformers' generate.

    python check.py FOLDER … [--json FILE]

Optimum takes the cache's shape from config.json: layers must agree in KV heads, and head_dim must be hidden / heads.
"""

from __future__ import annotations

import sys
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

warnings.filterwarnings("ignore")
from optimum.onnxruntime import ORTModelForCausalLM  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import Reference, figures, greedy_agrees, is_exact, judge, main  # noqa: E402

MARGIN = 0.25


@torch.inference_mode()
def check(folder: Path, reference: Reference) -> tuple[dict[str, Any], list[str]]:
    model = ORTModelForCausalLM.from_pretrained(folder)

    def logits(window: int) -> np.ndarray:
        ids = torch.from_numpy(reference.ids[window])[None]
        past = None
        rows = []
        for start, stop in reference.spans(window):
            out = model(
                input_ids=ids[:, start:stop],
                attention_mask=torch.ones(1, stop, dtype=torch.long),
                past_key_values=past,
                use_cache=True,
            )
            past = out.past_key_values
            rows.append(out.logits[0].numpy())
        return np.concatenate(rows)

    found: dict[str, Any] = figures(reference, map(logits, range(reference.windows)))
    failures = judge(reference, found, is_exact(folder))
    prompt = torch.from_numpy(reference.start)[None]
    made = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=len(reference.greedy),
        do_sample=False,
        eos_token_id=None,
    )
    fine, about = greedy_agrees(reference, made[0, reference.prompt :].tolist(), MARGIN)
    failures += [] if fine else [about]
    if not padded_on_the_left(model, reference):
        failures.append("a prompt padded on the left goes on otherwise than alone")
    return found | {"greedy": about.split()[1]}, failures


def padded_on_the_left(model: ORTModelForCausalLM, reference: Reference) -> bool:
    """Whether a short prompt beside a long one writes what it writes alone: transformers pads batches on the left."""
    whole = torch.from_numpy(reference.start)
    short = whole[: len(whole) // 2]
    pads = len(whole) - len(short)
    ids = torch.stack([whole, torch.cat([whole[:1].repeat(pads), short])])
    mask = torch.ones_like(ids)
    mask[1, :pads] = 0
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    alone = model.generate(short[None], attention_mask=torch.ones_like(short)[None], **options)
    batch = model.generate(ids, attention_mask=mask, **options)
    return torch.equal(batch[1, len(whole) :], alone[0, len(short) :])


if __name__ == "__main__":
    names = ("optimum", "optimum-onnx", "transformers", "onnxruntime")
    main("optimum", lambda: {name: metadata.version(name) for name in names}, check)
