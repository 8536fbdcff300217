"""What the graph can give for decode speed: forms of one 4-bit export in ONNX Runtime, each by turns with the plain
form.

    python benchmarks/decode_forms.py --work DIR [--shape tinyllama] [--layers 6] [--threads 2] [--rounds 9] [--only …]
        [--json benchmarks/results/decode_forms.json]

The graph has TinyLlama's layers (`--shape smollm2`: SmolLM2's), fewer of them, with random integers and scales in
groups of 32 and a small vocabulary, so that the layers are what is measured. "plain" is what the `ort` profile emits
but for joined linears: one product a linear, float32 scales, the cache as one shared buffer bound once. A form changes
one thing: the graph, the session or how a step is called. A round is a burst of plain steps and a burst of the form's,
in changing order; the ratio is the median over rounds of form / plain in tokens/s (above 1: the form is faster), with
the 10th and 90th percentile beside it. `difference` is the largest one of logits, over the largest logit, from plain's
on the same ids; forms with other weights have none.

A row that is in --json is not measured again. All forms take a few minutes on two quiet cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from decode_rewrites import (
    int8_cache,
    join_both,
    join_gate_up,
    join_qkv,
    join_swiglu,
    swiglu,
)
from tqdm import tqdm

from tinycompress.export import PROFILES, emit
from tinycompress.export.quiet import onnxruntime
from tinycompress.files import write_json
from tinycompress.graph.config import shapes
from tinycompress.graph.graph import Graph
from tinycompress.graph.presets import SMOLLM2_135M, TINYLLAMA_1_1B
from tinycompress.graph.quant_tensor import QuantSpec, QuantTensor

ort = onnxruntime()
SHAPES = {"tinyllama": TINYLLAMA_1_1B, "smollm2": SMOLLM2_135M}
VOCABULARY, BURST, WARM = 2048, 24, 2


@dataclass(frozen=True)
class Form:
    """One way to run the graph. `group` and `half` say which export, `rewrite` changes its graph, `session` its
    session."""

    about: str
    group: int = 32
    half: bool = False
    rewrite: Callable[[Any], None] | None = None
    session: Mapping[str, str] = field(default_factory=dict)
    # "shared" and bound once; "rebound" every step; "grown": past and present apart; "arrays": session.run
    cache: str = "shared"
    context: int = 64  # positions before the burst
    same_weights: bool = True


def random_graph(config: Any, group: int) -> Graph:
    generator, spec, weights = torch.Generator().manual_seed(0), QuantSpec(4, group), {}
    for name, shape in shapes(config).items():
        if len(shape) == 1:
            weights[name] = torch.ones(shape)
            continue
        integers = torch.randint(
            0, 256, (shape[0], shape[1] // group, group // 2), dtype=torch.uint8, generator=generator
        )
        weights[name] = QuantTensor(
            integers,
            torch.rand(shape[0], shape[1] // group, generator=generator) * 0.004 + 0.001,
            None,
            spec,
            tuple(shape),
        )
    return Graph(config, weights)


# Rewriting: what another emitter would draw ---------------------------------------------------------------------------


LONG = 1024
FORMS = {
    "blocks of 16": Form("groups of 16: twice the scales", group=16, same_weights=False),
    "blocks of 64": Form("groups of 64", group=64, same_weights=False),
    "blocks of 128": Form("groups of 128", group=128, same_weights=False),
    "float16 scales": Form("scales stored as float16, widened at load", half=True),
    "q, k, v joined": Form("one product, packed into GroupQueryAttention", rewrite=join_qkv),
    "gate, up joined": Form("one product behind which Split parts them", rewrite=join_gate_up),
    "gate, up joined, SwiGLU": Form("one product and one activation operator", rewrite=swiglu),
    "all joined": Form("q, k, v and gate, up", rewrite=join_both),
    "all joined, SwiGLU": Form("q, k, v and gate, up with the activation operator", rewrite=join_swiglu),
    "cache rebound": Form("the shared buffer bound anew at every step", cache="rebound"),
    "cache grown": Form("past and present apart, as a runtime without buffer sharing", cache="grown"),
    "no binding": Form("session.run on arrays, past and present apart", cache="arrays"),
    "cache grown, long": Form(f"the same behind {LONG} positions, against plain there", cache="grown", context=LONG),
    "int8 cache, long": Form(
        f"int8 keys and values behind {LONG} positions", rewrite=int8_cache, context=LONG, same_weights=False
    ),
    "no prepacking": Form("weights read in the order of the file", session={"session.disable_prepacking": "1"}),
    "table look-up": Form("MLAS's look-up products", session={"mlas.use_lut_gemm": "1"}),
    "no spinning": Form("threads sleep between operators", session={"session.intra_op.allow_spinning": "0"}),
    "no optimizer": Form("the graph as drawn", session={"optimizer": "0"}),
}


# Running --------------------------------------------------------------------------------------------------------------


class Runner:
    """A session, its cache, and a step."""

    def __init__(self, path: Path, form: Form, threads: int, context: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        for key, value in form.session.items():
            if key == "optimizer":
                options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            else:
                options.add_session_config_entry(key, value)
        self.session, self.kind, self.context = (
            ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]),
            form.cache,
            context,
        )
        self.nodes = [n for n in self.session.get_inputs() if n.name.startswith("past_key_values.")]
        self.dtype = np.int8 if self.nodes and "int8" in self.nodes[0].type else np.float32
        self.outputs = [n.name for n in self.session.get_outputs()]
        self.binding, room = self.session.io_binding(), context + WARM + BURST + 1
        self.caches = {n.name: ort.OrtValue.ortvalue_from_numpy(self._keys(n, room)) for n in self.nodes}
        self.logits: Any = None

    def _keys(self, node: Any, room: int) -> np.ndarray:
        """The same past for every form: small numbers, int8 ones in the scale of `int8_cache`."""
        past = np.random.default_rng(0).normal(size=(1, node.shape[1], room, node.shape[3]))
        return (past / 0.02).clip(-127, 127).astype(np.int8) if self.dtype == np.int8 else past.astype(np.float32)

    def burst(self, steps: int = BURST) -> float:
        """Tokens a second of `steps` steps behind the context. WARM steps go before: the other session's threads still
        spin then."""
        grown = (
            {name: cache.numpy()[:, :, : self.context].copy() for name, cache in self.caches.items()}
            if self.kind in ("grown", "arrays")
            else {}
        )
        self._bind()
        for i in range(WARM + steps):
            if i == WARM:
                start = time.perf_counter()
            ids, mask = np.full((1, 1), 1 + i, np.int64), np.ones((1, self.context + i + 1), np.int64)
            if self.kind in ("grown", "arrays"):
                feeds = {"input_ids": ids, "attention_mask": mask} | grown
                if self.kind == "arrays":
                    values = self.session.run(None, feeds)
                else:
                    for name, value in feeds.items():
                        self.binding.bind_ortvalue_input(
                            name, value if isinstance(value, ort.OrtValue) else ort.OrtValue.ortvalue_from_numpy(value)
                        )
                    for name in self.outputs:
                        self.binding.bind_output(name)
                    self.session.run_with_iobinding(self.binding)
                    values = self.binding.get_outputs()
                out = dict(zip(self.outputs, values))
                self.logits, grown = (
                    out["logits"],
                    {name: out[name.replace("past_key_values", "present")] for name in grown},
                )
                continue
            if self.kind == "rebound":
                self._bind()
            self.binding.bind_cpu_input("input_ids", ids)
            self.binding.bind_cpu_input("attention_mask", mask)
            self.session.run_with_iobinding(self.binding)
            self.logits = self.binding.get_outputs()[0]
        return steps / (time.perf_counter() - start)

    def _bind(self) -> None:
        if self.kind in ("shared", "rebound"):
            self.binding.bind_output("logits")
            for name, cache in self.caches.items():
                self.binding.bind_ortvalue_input(name, cache)
                self.binding.bind_ortvalue_output(name.replace("past_key_values", "present"), cache)

    def answer(self) -> np.ndarray:
        logits = self.logits
        return np.array(logits if isinstance(logits, np.ndarray) else logits.numpy())


def model_of(form: Form, args: argparse.Namespace) -> Path:
    """The file of a form, written when it is first asked for."""
    rewritten = f"-{form.rewrite.__name__}" if form.rewrite else ""
    path = args.work / f"{args.shape}{args.layers}-g{form.group}{'-half' if form.half else ''}{rewritten}.onnx"
    if not path.is_file():
        base = SHAPES[args.shape]
        config = dataclasses.replace(
            base, layers=base.layers[: args.layers], vocab_size=VOCABULARY, tie_embeddings=False
        )
        import onnx_ir as ir

        apart = dataclasses.replace(PROFILES["ort"], joins=False)
        emitted = emit(random_graph(config, form.group), apart, scales="float16" if form.half else "float32")
        model = ir.to_proto(emitted)
        if form.rewrite:
            form.rewrite(model)
        onnx.save(model, path)
    return path


def measure(form: Form, args: argparse.Namespace) -> dict[str, Any]:
    plain = Runner(model_of(Form("plain"), args), Form("plain"), args.threads, form.context)
    other = Runner(model_of(form, args), form, args.threads, form.context)
    pairs = []
    for i in range(args.rounds + 1):
        order = (plain, other) if i % 2 else (other, plain)
        speeds = {id(runner): runner.burst() for runner in order}
        pairs.append((speeds[id(plain)], speeds[id(other)]))
    ratios = np.array([b / a for a, b in pairs[1:]])  # the first round warms up
    row = {
        "about": form.about,
        "ratio": float(np.median(ratios)),
        "p10": float(np.quantile(ratios, 0.1)),
        "p90": float(np.quantile(ratios, 0.9)),
    }
    row |= {"plain_ms": 1e3 / float(np.median([a for a, _ in pairs[1:]])), "rounds": ratios.tolist()}
    if form.same_weights:
        expected = plain.answer()
        row["difference"] = float(np.abs(other.answer() - expected).max() / np.abs(expected).max())
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a folder for the models (2 GB)")
    parser.add_argument("--shape", choices=SHAPES, default="tinyllama")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", nargs="+", choices=FORMS, default=list(FORMS), metavar="FORM", help=" | ".join(FORMS))
    parser.add_argument("--json", type=Path, help="results; rows found there are kept")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = json.loads(args.json.read_text()) if args.json and args.json.is_file() else {}
    key = f"{args.shape}, {args.layers} layers, {args.threads} threads"
    rows = results.setdefault(key, {})
    for name in tqdm([n for n in args.only if n not in rows], desc="forms"):
        try:
            rows[name] = measure(FORMS[name], args)
        except Exception as error:  # a form the runtime refuses is a finding
            rows[name] = {"about": FORMS[name].about, "failed": str(error).strip().splitlines()[0][:200]}
        if args.json:
            from tinycompress.evaluation.perplexity import environment

            write_json(args.json, results | {"environment": environment()})
    for name, row in rows.items():
        words = (
            row.get("failed")
            or f"{row['ratio']:.3f} ({row['p10']:.3f}…{row['p90']:.3f}) difference {row.get('difference', np.nan):.1e}"
        )
        print(f"{name:26s} {words}")


if __name__ == "__main__":
    main()
