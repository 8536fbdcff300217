"""What compare_checkouts.py compares: values by name, computed the same way in either checkout.

This runs under the interpreter of one checkout, so it uses names that both have: those of `tinycompress` itself, and
through `name_of` the few that moved. Files are written to the working directory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from tinycompress import Graph

Values = dict[str, str]
MOVED = {  # places of a name, the newest first
    "MixedBits": ("tinycompress.quantization.mixed_bits", "tinycompress.passes.mixed_bits"),
    "SmoothQuant": ("tinycompress.quantization.smoothquant", "tinycompress.passes.smoothquant"),
    "QuantizeEmbedding": ("tinycompress.quantization.embedding", "tinycompress.passes.embedding"),
    "Slice": ("tinycompress.pruning.slice", "tinycompress.passes.slice"),
    "Drop": ("tinycompress.pruning.drop", "tinycompress.passes.depth"),
}
SCRATCH = Path()  # the working directory: the driver makes one for each worker


def name_of(name: str) -> Any:
    """A class or function, wherever this checkout keeps it."""
    for module in MOVED[name]:
        with contextlib.suppress(ModuleNotFoundError):
            return getattr(importlib.import_module(module), name)
    raise ImportError(f"{name}: in none of {', '.join(MOVED[name])}")


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def tensor_hash(tensor: Tensor) -> str:
    return sha(f"{tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.detach().contiguous().numpy().tobytes())


def random_graph(seed: int = 0, **changes: Any) -> Graph:
    """Weights far from uniform, and norms that are not all ones."""
    import torch

    from tinycompress import Config, Graph, Layer, shapes

    fields: dict[str, Any] = {"vocab_size": 128, "hidden_size": 64, "head_dim": 16, "max_position": 64}
    config = Config(**({"layers": (Layer(4, 2, 96),) * 3} | fields | changes))
    generator = torch.Generator().manual_seed(seed)
    norms = {
        name: torch.rand(shape, generator=generator) + 0.5 for name, shape in shapes(config).items() if "norm" in name
    }
    return Graph.random(config, seed, std=0.1).replace(weights=norms)


@cache
def graphs() -> dict[str, Graph]:
    from tinycompress import Layer, Rope

    uneven = (Layer(4, 2, 96), Layer(2, 1, 64), Layer(0, 0, 32), Layer(4, 4, 0), Layer(3, 1, 48))
    biases = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})
    return {
        "uniform": random_graph(1),
        "uneven": random_graph(2, layers=uneven),
        "tied": random_graph(3, tie_embeddings=True),
        "biases": random_graph(4, biases=biases, layers=uneven),
        "yarn": random_graph(5, rope=Rope(type="yarn", factor=4.0, original_max_position=16)),
        "llama3": random_graph(6, rope=Rope(type="llama3", factor=4.0, original_max_position=16)),
    }


def windows(n: int = 8, length: int = 32, vocabulary: int = 128) -> Tensor:
    import torch

    return torch.randint(vocabulary, (n, length), generator=torch.Generator().manual_seed(7))


def logits() -> Values:
    """Logits of whole windows and greedy continuations, dense and packed, and one window of SmolLM2-135M."""
    import torch

    from tinycompress import RTN, QuantSpec, load, tokens

    out = {}
    cases = graphs()  # made here: tensors of inference mode cannot be trained later
    real = load("smollm2-135m")
    with torch.inference_mode():
        for name, graph in cases.items():
            packed = RTN(QuantSpec.parse("w4g16"))(graph)
            for form, model in (("dense", graph.module()), ("packed", packed.module())):
                out[f"{name} {form}"] = tensor_hash(model(windows(4)))
                out[f"{name} {form} greedy"] = str(model.generate(windows(1, 16), 16).tolist())
                out[f"{name} {form} drawn"] = str(model.generate(windows(1, 16), 16, temperature=1.0, seed=3).tolist())
        out["smollm2-135m"] = tensor_hash(real.module()(tokens("pydoc", real.tokenizer, n=1, seq_len=512)))
    return out


def passes() -> Values:
    """Graphs that passes give: all integers, scales and floats, by the fingerprint."""
    import torch

    from tinycompress import (
        AWQ,
        GPTQ,
        HQQ,
        RTN,
        AutoRound,
        BlockTuning,
        Distill,
        HiddenLoss,
        LongRope,
        LoRA,
        Loss,
        Prune,
        PruneFFN,
        QuantSpec,
        Rotate,
        ScaleRope,
        Training,
    )

    text, spec = windows(), QuantSpec.parse
    reference = graphs()["uniform"]
    training = Training(steps=4, batch=2, seed=3)
    MixedBits, SmoothQuant, QuantizeEmbedding = (
        name_of("MixedBits"),
        name_of("SmoothQuant"),
        name_of("QuantizeEmbedding"),
    )
    runs: dict[str, Callable[[Graph], Graph]] = {
        **{f"RTN {grid}": RTN(spec(grid)) for grid in ("w4g16", "w3g16-asym", "w2g16-floatzero", "w4g16-lpbq", "w8")},
        **{f"HQQ {grid}": HQQ(spec(grid)) for grid in ("w4g16", "w3g16-asym", "w2g16-floatzero")},
        **{f"GPTQ {grid}": GPTQ(text, spec(grid)) for grid in ("w4g16", "w3g16-asym", "w2g16-floatzero", "w4g16-lpbq")},
        "GPTQ stream": GPTQ(text, spec("w3g16"), propagate=0.5, stream=True, refine=2),
        "AWQ": AWQ(text, spec("w4g16-asym")),
        "AWQ clip": AWQ(text, spec("w4g16-asym"), clip=True),
        "SmoothQuant": SmoothQuant(text),
        "QuantizeEmbedding": QuantizeEmbedding(spec("w8")),
        "MixedBits": MixedBits(text, lambda specs: GPTQ(text, specs), bits=6.0, choices=("w2g16", "w4g16", "w8g16")),
        "Rotate": Rotate(),
        "Prune": Prune(text, "params=0.7", axes=("ffn", "heads"), multiple_of=8),
        "Prune bias": Prune(text, "params=0.7", multiple_of=8, refit="bias"),
        "Prune gradients": Prune(text, "params=0.7", multiple_of=8, gradients=True),
        "Prune hidden": Prune(text, keep={"hidden": 0.75}, axes=("hidden",), multiple_of=8),
        "PruneFFN": PruneFFN(text, keep=0.75, multiple_of=8),
        "Slice": name_of("Slice")(text, 48),
        "Drop": name_of("Drop")(text, 1),
        "Drop sublayers": name_of("Drop")(text, 2, "sublayers"),
        "ScaleRope": ScaleRope(128, "yarn"),
        "LongRope": LongRope(windows(2, 128), population=4, generations=1),
        "Distill": Distill(text, reference, training),
        "Distill losses": Distill(text, reference, training, losses=(Loss("kl"), Loss("ce", 0.5)), on_policy=0.5),
        "Distill hidden": Distill(text, reference, training, hidden=(HiddenLoss(),)),
        "Distill LoRA": Distill(text, reference, training, lora=LoRA(rank=2)),
        "Distill fake_quant": Distill(text, reference, training, fake_quant=spec("w4g16")),
        "Distill learned grid": Distill(text, reference, training, fake_quant=spec("w4g16"), grid="learn"),
    }
    out = {}
    for name, run in runs.items():
        for kind in ("uniform", "uneven", "tied"):
            torch.manual_seed(0)
            record(out, f"{name} of {kind}", run, graphs()[kind])
    for kind in ("uniform", "uneven"):
        tuned = AutoRound(text, graphs()[kind], BlockTuning(steps=5))
        record(out, f"AutoRound of {kind}", tuned, RTN(spec("w3g16"))(graphs()[kind]))
        scales = Distill(text, graphs()[kind], training, scales=True)
        record(out, f"Distill scales of {kind}", scales, RTN(spec("w3g16"))(graphs()[kind]))
    return out


def record(out: Values, name: str, run: Callable[[Graph], Graph], graph: Graph) -> None:
    """The result's fingerprint and history, or the field of its error (some passes refuse a tied head)."""
    from tinycompress import InputError

    try:
        result = run(graph)
    except InputError as error:
        out[name] = f"InputError: {error.field}"
        return
    out[name] = result.fingerprint()
    out[f"{name}: history"] = str(result.history)


def folder_values(folder: Path, name: str) -> Values:
    """SHA-256 of every file; of the JSON files also each field."""
    out = {}
    paths = [folder] if folder.is_file() else sorted(path for path in folder.rglob("*") if path.is_file())
    for path in paths:
        key = f"{name}/{path.relative_to(folder).as_posix()}" if path != folder else name
        out[key] = sha(path.read_bytes())
        if path.name in ("manifest.json", "tinycompress.json"):
            out |= {f"{key}:{field}": text for field, text in flat(json.loads(path.read_text()), "").items()}
    return out


def flat(value: Any, at: str) -> Values:
    if isinstance(value, dict):
        return {key: text for name, part in value.items() for key, text in flat(part, f"{at}.{name}").items()}
    return {at: json.dumps(value)}


def exports() -> Values:
    """Bytes of the files that exports write; the gate is left out, since it holds measured figures."""
    from tinycompress import RTN, QuantSpec
    from tinycompress.export import StaticChoices, export

    out = {}
    for kind in ("uniform", "uneven", "tied", "yarn"):
        for grid in ("", "w4g16", "w4g16-asym", "w4g16-lpbq"):
            graph = RTN(QuantSpec.parse(grid))(graphs()[kind]) if grid else graphs()[kind]
            for profile, options in (
                ("ort", {}),
                ("web", {}),
                ("std", {}),
                ("ort", {"kv": "int8"}),
                ("static", {}),
                ("qnn", {}),
            ):
                name = f"{profile}{'-int8' if options else ''} {kind} {grid or 'float32'}"
                if profile in ("static", "qnn"):
                    options = {"static": StaticChoices(calibration=windows(4, 64))}
                elif options:
                    options = options | {"calibration": windows(4, 64)}
                out |= export_values(graph, name, profile, options, export)
    return out


def export_values(graph: Graph, name: str, profile: str, options: dict[str, Any], export: Callable[..., Any]) -> Values:
    from tinycompress import InputError

    folder = SCRATCH / name.replace(" ", "-")
    try:
        export(graph, folder, profile, check=False, progress=False, **options)
    except InputError as error:
        return {name: f"InputError: {error.field}"}
    return folder_values(folder, name)


def folders() -> Values:
    """Bytes of the folders that `save` writes, in every format."""
    import torch

    from tinycompress import RTN, QuantSpec, save

    out = {}
    for kind, graph in graphs().items():
        save(graph, SCRATCH / f"native-{kind}")
        out |= folder_values(SCRATCH / f"native-{kind}", f"native {kind}")
    for format, grid in (
        ("native", "w3g16-asym"),
        ("gptq", "w4g32"),
        ("awq", "w4g32-asym"),
        ("compressed-tensors", "w4g32"),
        ("gguf", "w4g32"),
    ):
        packed = RTN(QuantSpec.parse(grid))(graphs()["uniform"])
        half = {
            n: dataclasses.replace(w, scales=w.scales.half().float())
            for n, w in packed.weights.items()
            if not isinstance(w, torch.Tensor)
        }
        path = SCRATCH / (f"packed-{format}" + (".gguf" if format == "gguf" else ""))
        save(packed.replace(weights=half), path, format=format)
        out |= folder_values(path, f"packed {format}")
    return out


def command_line() -> Values:
    """Output folders of `tinycompress compress` and `export` on a small model with SmolLM2's tokenizer."""
    from tinycompress import Graph, load, save

    tokenizer = load("smollm2-135m").tokenizer
    small = random_graph(8, vocab_size=tokenizer.vocab_size, tie_embeddings=True)
    save(Graph(small.config, small.weights, (), tokenizer), SCRATCH / "model")
    data = ("--samples", "4", "--seq-len", "32")
    commands = {
        "copy": (),
        "gptq": ("--quantize", "w4g32", *data),
        "everything": (
            "--prune",
            "params=0.8",
            "--context",
            "128",
            "--quantize",
            "w4g32",
            "--quantize-embedding",
            "w8g32",
            *data,
        ),
        "tune": ("--quantize", "w3g32", "--tune", *data),
    }
    out = {}
    for name, options in commands.items():
        folder = SCRATCH / f"cli-{name}"
        program = "from tinycompress.cli import main; main()"
        command = [sys.executable, "-c", program, "compress", str(SCRATCH / "model"), "-o", str(folder), *options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        out |= folder_values(folder, f"compress {name}")
    return out


CHECKS: dict[str, Callable[[], Values]] = {
    "logits": logits,
    "passes": passes,
    "exports": exports,
    "folders": folders,
    "command line": command_line,
}
