"""Run in the venv of README.md: FOLDER IDS.json OUT.safetensors → the logits that the format's own library computes.

compressed-tensors and GPTQ folders are opened by transformers (the latter with GPTQModel's plain torch kernel: its
fused one for CPUs ignores zero points). GPTQModel itself opens AWQ folders, because AutoAWQ's last version does not
import beside transformers 4.57, and gptq_v2 folders, because transformers 4.57 hands `checkpoint_format` to optimum
2.1, which calls it `format` and takes them for version 1. Prints which module stands in the place of a linear.
"""

import json
import os
import sys
from pathlib import Path

os.cpu_count = lambda: 8  # gptqmodel 5.6.0 does not import where there are fewer than four
import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import AutoModelForCausalLM, GPTQConfig  # noqa: E402

folder, ids, out = sys.argv[1:]
about = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]
if about["quant_method"] == "awq" or about.get("checkpoint_format") == "gptq_v2":
    from gptqmodel import BACKEND, GPTQModel

    awq = about["quant_method"] == "awq"
    how = (
        {"backend": BACKEND.TORCH_AWQ, "dtype": torch.float16}
        if awq
        else {"backend": BACKEND.TORCH, "dtype": torch.float32}
    )
    model = GPTQModel.load(folder, device="cpu", **how).model
else:
    gptq = about["quant_method"] == "gptq"
    backend = {"quantization_config": GPTQConfig(bits=about["bits"], backend="torch")} if gptq else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu", **backend)
print(type(model.model.layers[0].mlp.up_proj).__name__)
with torch.no_grad():
    logits = model.eval()(torch.tensor(json.loads(Path(ids).read_text()))).logits
save_file({"logits": logits.float().contiguous()}, out)
