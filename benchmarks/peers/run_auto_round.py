"""auto-round on the tokens of benchmarks/quantize.py: MODEL TOKENS.safetensors OUT BITS GROUP RECIPE → a folder of the
dequantized weights, and JSON of its cost.

Run by `benchmarks/quantize.py --peer auto-round|auto-round-light --peer-python VENV/bin/python`. Its venv:

    python3.11 -m venv auto-round && auto-round/bin/pip install torch==2.13.0 auto-round==0.16.1

RECIPE: `default` (200 steps a block of 8 windows) or `light` (50), with the rates of its own command line; `quick` is a
smoke test.
"""

import json
import resource
import shutil
import sys
import time
from importlib.metadata import version
from pathlib import Path

from auto_round import AutoRound
from safetensors.torch import load_file, save_file

RECIPES = {
    "default": {"iters": 200},
    "light": {"iters": 50, "lr": 5e-3},
    "quick": {"iters": 2, "lr": 5e-3},
}  # RECIPES of its cli/main.py

model, tokens, out, bits, group, recipe = sys.argv[1:]
windows = load_file(tokens)["tokens"]
settings = {"bits": int(bits), "group_size": int(group), "sym": True, **RECIPES[recipe]}
quantizer = AutoRound(
    model, dataset=list(windows.split(1)), nsamples=len(windows), seqlen=windows.shape[1], device_map="cpu", **settings
)
start = time.perf_counter()
quantized, _ = quantizer.quantize()
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
name = f"auto-round {version('auto-round')}, {recipe} recipe"
# not by its format="fake": 0.16.1 works in bfloat16 and "restores" every float32 tensor of the source on saving, the
# quantized too
weights, changed = load_file(Path(model) / "model.safetensors"), 0
for layer, module in quantized.named_modules():
    if layer.startswith("model.layers.") and layer.endswith("_proj"):
        weights[f"{layer}.weight"] = module.weight.detach().float().contiguous()
        changed += 1
assert changed == sum(weight.endswith("_proj.weight") for weight in weights), changed
Path(out).mkdir()
shutil.copy(Path(model) / "config.json", out)
save_file(weights, Path(out) / "model.safetensors")
print(json.dumps({"peer": name, "seconds": round(seconds, 1), "peak_mb": round(peak), **settings}))
