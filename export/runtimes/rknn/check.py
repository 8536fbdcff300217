"""An export of the `static` profile in Rockchip's RKNN: built for one chip and run in the toolkit's simulator, in
float16.

    python check.py FOLDER … [--reference DIR] [--json FILE]

The chip is RKNN_TARGET (default rk3588). Prefill in chunks, then single steps behind the cache, against torch's logits.
The simulator is Linux on x86-64 only; on a board the same calls run through rknn-toolkit-lite2.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from rknn.api import RKNN

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "static"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import Reference, figures, judge, main
from host import StaticSession

STEPS = 4  # last ids of a window that are fed one by one
TARGET = os.environ.get("RKNN_TARGET", "rk3588")
# ends in an IndexError where a layer has one KV head (toolkit 2.5.0)
SDPA_RULE = "fuse_exmatmul_add_mul_exsoftmax13_exmatmul_to_sdpa"


class Simulated:
    """One graph in the simulator, with the `run` of an onnxruntime session."""

    def __init__(self, path: Path) -> None:
        graph = onnx.load(path, load_external_data=False).graph
        self.inputs = [i.name for i in graph.input]
        self.outputs = [o.name for o in graph.output]
        heads = {i.type.tensor_type.shape.dim[1].dim_value for i in graph.input if i.name.startswith("past_key")}
        with redirect_stdout(sys.stderr):
            self.rknn = RKNN(verbose=False)
            self.rknn.config(target_platform=TARGET, disable_rules=[SDPA_RULE] if 1 in heads else [])
            for what, call in (
                ("load_onnx", lambda: self.rknn.load_onnx(model=str(path))),
                ("build", lambda: self.rknn.build(do_quantization=False)),
                ("init_runtime", lambda: self.rknn.init_runtime()),
            ):
                if code := call():
                    raise RuntimeError(f"RKNN.{what} of {path.name} returned {code}")

    def run(self, names: Sequence[str], feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        with redirect_stdout(sys.stderr):
            out = self.rknn.inference(
                inputs=[feeds[name] for name in self.inputs], data_format=["nchw"] * len(self.inputs)
            )
        if out is None:
            raise RuntimeError("RKNN.inference returned nothing")
        by_name = dict(zip(self.outputs, out))
        return [by_name[name] for name in names]


def check(folder: Path, reference: Reference) -> tuple[dict[str, Any], list[str]]:
    """Figures against torch, and the failures among them: those of float16, so without the limits of float32."""
    model = StaticSession.from_folder(folder, Simulated)
    found = figures(reference, (model.logits(ids, STEPS) for ids in reference.ids))
    return found, judge(reference, found)


if __name__ == "__main__":
    line = os.fdopen(os.dup(1), "w")  # the one line; what the toolkit says goes to standard error
    os.dup2(2, 1)
    sys.stdout = line
    main("rknn", lambda: {"rknn-toolkit2": version("rknn-toolkit2"), "rknn target": TARGET}, check)
