"""llm-compressor's GPTQ on the tokens of benchmarks/quantize.py: MODEL TOKENS.safetensors OUT BITS GROUP → a folder of
the dequantized weights, and JSON of its cost.

Run by `benchmarks/quantize.py --peer llm-compressor --peer-python VENV/bin/python`. Its venv:

    python3.11 -m venv llm-compressor && llm-compressor/bin/pip install torch==2.13.0 llmcompressor==0.14.0.1

Its defaults otherwise: static activation order, 1% damping, true-sequential.
"""

import json
import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

folder, tokens, out, bits, group = sys.argv[1:]
windows = load_file(tokens)["tokens"]
data = Dataset.from_dict({"input_ids": windows.tolist(), "attention_mask": torch.ones_like(windows).tolist()})
weights = {"num_bits": int(bits), "type": "int", "symmetric": True, "strategy": "group", "group_size": int(group)}
recipe = GPTQModifier(config_groups={"group_0": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"])
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
names = list(model.state_dict())
start = time.perf_counter()
oneshot(model=model, dataset=data, recipe=recipe, num_calibration_samples=len(windows), max_seq_length=windows.shape[1])
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
state = model.state_dict()
Path(out).mkdir()
model.config.save_pretrained(out)
tied = model.config.tie_word_embeddings
save_file(
    {n: state[n].float().contiguous() for n in names if not (tied and n == "lm_head.weight")},
    Path(out) / "model.safetensors",
)
config = json.loads((Path(out) / "config.json").read_text())
config.pop("quantization_config", None)  # the weights are back in floats
(Path(out) / "config.json").write_text(json.dumps(config))
print(
    json.dumps(
        {
            "peer": f"llm-compressor {version('llmcompressor')} GPTQ",
            "seconds": round(seconds, 1),
            "peak_mb": round(peak),
        }
    )
)
