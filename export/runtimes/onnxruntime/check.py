"""An exported folder in ONNX Runtime by its plain Python interface: logits step by step, a padded batch, greedy tokens.

    python check.py FOLDER … [--json FILE]

The model runs as shipped (int8 activations where it says so), on past and present as separate arrays, as any program
that only reads names and shapes from the model would run it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import Reference, figures, greedy_agrees, is_exact, judge, main

MARGIN = 0.25  # of the two best logits: closer ones may change places under int8 activations


class Stepper:
    """A session with its cache as arrays."""

    def __init__(self, path: Path, batch: int = 1, level: int = 4) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry(
            "session.qdq_matmulnbits_accuracy_level", str(level)
        )  # of the `std` profile's products
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.names = [node.name for node in self.session.get_inputs()]
        self.outputs = [node.name for node in self.session.get_outputs()]
        pasts = [n for n in self.session.get_inputs() if n.name.startswith("past_key_values.")]
        self.shapes = {n.name: (n.shape[1], n.shape[3]) for n in pasts}
        self.type = np.int8 if pasts and pasts[0].type == "tensor(int8)" else np.float32
        self.reset(batch)

    def reset(self, batch: int = 1) -> None:
        self.past = {
            name: np.zeros((batch, heads, 0, width), self.type) for name, (heads, width) in self.shapes.items()
        }
        self.length = 0

    def step(self, ids: np.ndarray) -> np.ndarray:
        """Logits [B, T, V] of the next ids [B, T]."""
        batch, count = ids.shape
        feeds = {"input_ids": ids, "attention_mask": np.ones((batch, self.length + count), np.int64)}
        feeds["position_ids"] = np.tile(np.arange(self.length, self.length + count), (batch, 1))
        outputs = dict(
            zip(self.outputs, self.session.run(None, {n: v for n, v in (feeds | self.past).items() if n in self.names}))
        )
        self.past = {name: outputs[name.replace("past_key_values", "present")] for name in self.past}
        self.length += count
        return outputs["logits"]

    def logits(self, reference: Reference, batch: int = 1) -> Iterator[np.ndarray]:
        """Of each window [T, V], fed as the reference says: the last row of a batch of equal ones."""
        for window, ids in enumerate(reference.ids):
            self.reset(batch)
            yield np.concatenate([self.step(np.tile(ids[a:b], (batch, 1)))[-1] for a, b in reference.spans(window)])


def check(folder: Path, reference: Reference) -> tuple[dict[str, Any], list[str]]:
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    model = Stepper(folder / manifest["model"], level=manifest["accuracy_level"])
    found: dict[str, Any] = figures(reference, model.logits(reference))
    failures = judge(reference, found, is_exact(folder))
    model.reset()
    tokens = []
    new = reference.start[None]
    start = time.perf_counter()
    for _ in reference.greedy:
        tokens.append(int(model.step(new)[0, -1].argmax()))
        new = np.array([[tokens[-1]]])
    speed = len(tokens) / (time.perf_counter() - start)
    fine, about = greedy_agrees(reference, tokens, MARGIN)
    batched = figures(reference, model.logits(reference, 2))
    failures += [] if fine else [about]
    failures += [f"batch {words}" for words in judge(reference, batched, is_exact(folder))]
    return found | {"greedy": about.split()[1], "batch_kl": batched["kl"], "tok_s": speed}, failures


if __name__ == "__main__":
    main("onnxruntime", lambda: {"onnxruntime": ort.__version__}, check)
