"""Saved checkpoints opened by the formats' own libraries, each in a venv of its own: see the README.md of runtimes/."""

import json

import pytest
import torch
from conftest import random_graph
from other_libraries import folder_of, run
from safetensors.torch import load_file, save_file

from tinycompress.checkpoints.checkpoint import load, save
from tinycompress.export import export
from tinycompress.graph.config import Config, Layer
from tinycompress.graph.edit import cut
from tinycompress.graph.quant_tensor import QuantSpec, QuantTensor
from tinycompress.quantization import gptq as column_loop
from tinycompress.quantization.embedding import QuantizeEmbedding
from tinycompress.quantization.rtn import RTN

pytestmark = pytest.mark.runtime
CONFIG = Config(vocab_size=512, hidden_size=128, head_dim=32, layers=(Layer(4, 2, 256),) * 2, max_position=64)
IDS = [list(range(1, 25))]
# What stands in the place of a linear, and how far logits (up to 5) may be from ours: float16 arithmetic is AWQ's.
AUTOAWQ = ("awq", "WQLinear_GEMM", 2e-2)
GPTQ = ("gptq", "TorchQuantLinear", 1e-4)
AWQ = ("awq", "AwqTorchQuantLinear", 2e-2)
CT = ("compressed-tensors", "CompressedLinear", 1e-4)
CASES = [(GPTQ, g) for g in ("w4g32", "w4g32-asym", "w3g32", "w2g32", "w8g32")] + [
    (AWQ, g) for g in ("w4g32", "w4g32-asym")
]
CASES += [((*AUTOAWQ, "autoawq"), g) for g in ("w4g32", "w4g32-asym", "w4g64-asym")]
CASES += [(CT, g) for g in ("w4g32", "w4g32-asym", "w3g32", "w8")]


def case_name(value) -> str:
    """Of a grid its text; of a format its name, or that of the venv where it has one of its own."""
    if isinstance(value, str):
        return value
    return value[-1] if len(value) > 3 else value[0]


@pytest.mark.parametrize(
    "format, grid",
    CASES,
    ids=case_name,
)
def test_logits_are_ours(format, grid, shared, tmp_path):
    agrees(RTN(QuantSpec.parse(grid))(random_graph(CONFIG)), format, shared, tmp_path)


@pytest.mark.parametrize("grid", ["w4g32", "w4g32-asym"])
@pytest.mark.parametrize("format", [GPTQ, AWQ], ids=case_name)
def test_logits_behind_the_column_loop_are_ours(format, grid, shared, tmp_path):
    """Columns rounded in the order of their size, in groups that stay where they are: nothing in the file says so."""
    tokens = torch.randint(3, 512, (8, 64), generator=torch.Generator().manual_seed(0))
    agrees(column_loop.GPTQ(tokens, grid, progress=False)(random_graph(CONFIG)), format, shared, tmp_path)


def agrees(graph, format, shared, tmp_path) -> None:
    """Saves a graph, has the format's own library compute its logits, and compares."""
    name, kind, limit, *own = format
    venv, script = ("autoawq", "autoawq_logits.py") if own else ("transformers", "transformers_logits.py")
    folder_of(venv)
    tokenizer = load(shared / "models" / "stories260K").tokenizer  # GPTQModel opens no folder without one
    save(graph.replace(tokenizer=tokenizer), tmp_path / "m", format=name)
    (tmp_path / "ids.json").write_text(json.dumps(IDS))
    printed = run(venv, script, tmp_path / "m", tmp_path / "ids.json", tmp_path / "out", cwd=tmp_path)
    assert kind in printed
    reference = load_file(tmp_path / "out")["logits"]
    ours = load(tmp_path / "m", dtype=torch.float32).module()(torch.tensor(IDS))
    assert (reference - ours).abs().max() <= limit and ours.abs().max() > 1


THIRD = {
    "gptqmodel": ("transformers", "../../../benchmarks/peers/run_gptqmodel.py", "transformers_logits.py", 1e-4),
    "autoawq": ("autoawq", "autoawq_quantize.py", "autoawq_logits.py", 2e-2),
}


@pytest.mark.parametrize("library", THIRD)
def test_what_another_library_quantized_opens_packed_and_exports(library, shared, tmp_path):
    """From its own quantizer to its own logits, ours, and an export that passes its gate."""
    venv, quantize, logits, limit = THIRD[library]
    folder_of(venv)
    tokenizer = load(shared / "models" / "stories260K").tokenizer
    dense = random_graph(CONFIG)
    save(dense.replace(tokenizer=tokenizer), tmp_path / "dense")
    ids = torch.randint(3, 512, (16, 64), generator=torch.Generator().manual_seed(0))
    save_file({"tokens": ids}, tmp_path / "tokens")
    run(venv, quantize, tmp_path / "dense", tmp_path / "tokens", tmp_path / "out", 4, 32, cwd=tmp_path)
    (tmp_path / "ids.json").write_text(json.dumps(ids[:1, :24].tolist()))
    folder = next((tmp_path / "out").rglob("config.json")).parent
    run(venv, logits, folder, tmp_path / "ids.json", tmp_path / "logits", cwd=tmp_path)
    graph = load(folder, dtype=torch.float32)
    packed = [w for w in graph.weights.entries.values() if isinstance(w, QuantTensor)]
    assert len(packed) == 14 and all(w.grid.bits == 4 and w.grid.group_size == 32 for w in packed)
    ours = graph.module()(ids[:1, :24])
    assert (ours - load_file(tmp_path / "logits")["logits"]).abs().max() <= limit
    assert 1e-3 < (ours - dense.module()(ids[:1, :24])).abs().max() < 2
    export(graph, tmp_path / "ort", tokens=ids, progress=False)


@pytest.mark.parametrize("grid, least", [("dense", 40), ("w8g32", 40), ("w4g32", 4), ("w4g32-asym", 4)])
def test_llama_cpp_says_the_same(grid, least, shared, tmp_path):
    """stories260K, its FFNs cut to whole blocks: the prompt's ids and 40 greedy tokens. llama.cpp rounds activations to
    8 bits where weights are quantized, so a tie at 4 bits may fall otherwise some tokens on."""
    folder_of("llama-cpp")
    graph = load(shared / "models" / "stories260K")
    for i in range(graph.config.n_layers):
        graph = cut(graph, f"layers.{i}.ffn", range(160))
    if grid != "dense":
        graph = QuantizeEmbedding(QuantSpec(8, 32))(RTN(QuantSpec.parse(grid))(graph))
    path = save(graph, tmp_path / "m.gguf", format="gguf")
    prompt = "Once upon a time"
    reference = json.loads(run("llama-cpp", "llama_cpp_greedy.py", path, prompt, 40, cwd=tmp_path))
    ids = graph.tokenizer.encode(prompt, add_special_tokens=True)
    ours = load(path).module().generate(torch.tensor(ids), 40).tolist()
    alike = next(
        (i for i, (a, b) in enumerate(zip(ours, reference["ids"])) if a != b), min(len(ours), len(reference["ids"]))
    )
    assert reference["prompt"] == ids and alike >= least, (alike, ours, reference)
