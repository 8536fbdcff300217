"""GPTQModel on the tokens of benchmarks/quantize.py: MODEL TOKENS.safetensors OUT BITS GROUP → a GPTQ folder, and JSON
of its cost.

Run by `benchmarks/quantize.py --peer gptqmodel --peer-python VENV/bin/python`; its venv is `transformers` of
tests/runtimes/README.md. Its defaults otherwise: group-aware order, no desc_act, 5% damping.
"""

import json
import os
import resource
import sys
import time
from importlib.metadata import version

os.cpu_count = lambda: 8  # gptqmodel 5.6.0 does not import where there are fewer than four
import torch  # noqa: E402
from gptqmodel import GPTQModel, QuantizeConfig  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

model, tokens, out, bits, group = sys.argv[1:]
windows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in load_file(tokens)["tokens"]]
quantizer = GPTQModel.load(
    model,
    QuantizeConfig(bits=int(bits), group_size=int(group), sym=True, device="cpu", offload_to_disk=False),
    dtype=torch.float32,
)
start = time.perf_counter()
quantizer.quantize(windows, batch_size=1)
seconds = time.perf_counter() - start
quantizer.save(out)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({"peer": f"GPTQModel {version('gptqmodel')}", "seconds": round(seconds, 1), "peak_mb": round(peak)}))
