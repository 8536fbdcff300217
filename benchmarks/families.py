"""What is checked of every model family, as a table: the one in docs/models.md.

    python benchmarks/families.py [--llama-python PYTHON] [--page docs/models.md]

Small random models of each family, made by transformers, their norms and biases no ones and zeros. Figures are the
largest differences of logits in float32.

  reads            ours to transformers', and how many of 64 greedy tokens are the same
  writes           what `save` wrote, opened by transformers
  packed           4-bit weights written as GPTQ, AWQ and compressed-tensors, read back to the same logits
  GGUF             written, and opened by llama.cpp (with --llama-python; else by our own reader)
  pruned, 4 bits   `Prune` to 80% and `GPTQ` behind it, exported as `ort`: what the gate measured

Results go to results/families.json, the table between the marks of the page.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import tinycompress
from tinycompress.checkpoints.layouts import FOLDERS
from tinycompress.errors import InputError
from tinycompress.evaluation.perplexity import environment
from tinycompress.export import export
from tinycompress.files import write_json, write_text
from tinycompress.graph.graph import Graph

RESULTS = Path(__file__).parent / "results" / "families.json"
BEGIN, END = "<!-- families: made by benchmarks/families.py -->", "<!-- end of families -->"
SIZES = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 16},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "smollm3": {"tie_word_embeddings": True},
}
IDS = torch.randint(3, 512, (2, 60), generator=torch.Generator().manual_seed(0))
EXACT = 1e-4  # the gate's limit for logits in float32
TOKENS = torch.randint(3, 512, (16, 64), generator=torch.Generator().manual_seed(1))

LLAMA = """
import json, sys
import numpy as np
from llama_cpp import Llama
model = Llama(sys.argv[1], n_ctx=64, logits_all=True, verbose=False, type_k=0, type_v=0)
model.eval(json.loads(sys.argv[2]))
np.save(sys.argv[3], model.scores[: len(json.loads(sys.argv[2]))])
"""


def model_of(family: str) -> Any:
    """A random model of transformers."""
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family]})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data = torch.randn_like(parameter) * 0.1 + ("norm" in name)
    return model


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out = model(IDS)
    return getattr(out, "logits", out)


def check(family: str, folder: Path, llama_python: str | None) -> dict[str, Any]:
    """The figures of one family; files go to `folder`."""
    theirs = model_of(family)
    theirs.save_pretrained(folder / "theirs")
    graph = tinycompress.load(folder / "theirs")
    expected = logits_of(theirs)
    ours = logits_of(graph.module())
    row: dict[str, Any] = {"reads": float((ours - expected).abs().max())}
    endless = graph.replace(config=dataclasses.replace(graph.config, eos_token_id=None))
    text = endless.module().generate(IDS[:1, :10], 64)
    greedy = theirs.generate(IDS[:1, :10], max_new_tokens=64, do_sample=False, eos_token_id=None)[0, 10:]
    row["greedy"] = int((text == greedy).sum())
    tinycompress.save(graph, folder / "own")
    back = type(theirs).from_pretrained(folder / "own").eval()
    row["writes"] = float((logits_of(back) - expected).abs().max())
    row["packed"] = [name for name in FOLDERS if _survives(graph, name, folder)]
    row["gguf"] = _gguf(graph, ours, folder, llama_python)
    small = tinycompress.GPTQ(TOKENS, "w4g32")(tinycompress.Prune(TOKENS, "params=0.8", multiple_of=32)(graph))
    manifest = export(small, folder / "onnx", progress=False)
    exact = [one["figure"] for one in manifest["checks"]["checks"] if one["limit"] == EXACT]
    row["exported"] = max(exact)
    return row


def _survives(graph: Graph, format: str, folder: Path) -> bool:
    """Whether packed weights come back from another tool's layout with the same logits, its float16 scales aside."""
    packed = tinycompress.RTN("w4g32-asym" if format == "awq" else "w4g32")(graph)
    halves = tinycompress.load(tinycompress.save(packed, folder / format, format=format))
    return bool(torch.allclose(logits_of(halves.module()), logits_of(packed.module()), atol=0.05))


def _gguf(graph: Graph, ours: torch.Tensor, folder: Path, llama_python: str | None) -> dict[str, Any]:
    path = folder / "model.gguf"
    try:
        tinycompress.save(graph, path, format="gguf")
    except InputError as error:
        return {"refused": str(error)}
    back = tinycompress.load(path)
    row: dict[str, Any] = {"read back": float((logits_of(back.module()) - ours).abs().max())}
    if llama_python:
        import numpy as np

        ids = IDS[0, : min(16, graph.config.window or 16)].tolist()
        command = [llama_python, "-c", LLAMA, str(path), json.dumps(ids), str(folder / "logits.npy")]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        theirs = torch.from_numpy(np.load(folder / "logits.npy"))
        row["llama.cpp"] = float((theirs - ours[0, : len(ids)]).abs().max())
    return row


def table(rows: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| family | reads: logits, greedy tokens | writes | packed formats | GGUF in llama.cpp | cut, 4 bits, `ort` |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        gguf = row["gguf"].get("llama.cpp", row["gguf"].get("read back"))
        said = "refused" if gguf is None else f"{gguf:.0e}"
        cells = [f"{row['reads']:.0e}, {row['greedy']} of 64", f"{row['writes']:.0e}", ", ".join(row["packed"]), said]
        lines.append(f"| `{name}` | " + " | ".join(cells) + f" | {row['exported']:.0e} |")
    lines += [
        "",
        "Largest differences of logits in float32, between small random models (`python benchmarks/families.py`).",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-python", help="an interpreter with llama-cpp-python")
    parser.add_argument("--page", type=Path, help="the page whose table is made anew")
    args = parser.parse_args()
    rows: dict[str, dict[str, Any]] = {}
    for family in tqdm(FAMILIES, desc="families"):
        with tempfile.TemporaryDirectory(prefix="tinycompress-") as folder:
            rows[family] = check(family, Path(folder), args.llama_python)
    write_json(RESULTS, {"rows": rows, "environment": environment()})
    text = table(rows)
    print(text)
    if args.page:
        before, _, rest = args.page.read_text(encoding="utf-8").partition(BEGIN)
        write_text(args.page, f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
