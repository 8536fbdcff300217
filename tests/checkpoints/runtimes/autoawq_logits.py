"""Run in the venv of README.md: FOLDER IDS.json OUT.safetensors → the logits of a transformers Llama whose linears are
AutoAWQ's own.

Neither library loads such a folder on a CPU by itself: both put modules of intel_extension_for_pytorch in the place of
the linears there, whose last release wants a torch older than this project's. So the modules are put in by hand, as
AutoAWQ's loader does; without triton or its CUDA kernels WQLinear_GEMM unpacks with AutoAWQ's own dequantize_gemm.
Prints the module's name.
"""

import json
import sys
from pathlib import Path

import torch
from awq.modules.linear.gemm import WQLinear_GEMM
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

folder, ids, out = sys.argv[1:]
config = AutoConfig.from_pretrained(folder)
about = config.quantization_config
del config.quantization_config
model = AutoModelForCausalLM.from_config(config, torch_dtype=torch.float16).eval()
stored = {
    name: tensor for file in sorted(Path(folder).glob("*.safetensors")) for name, tensor in load_file(file).items()
}
for name, linear in list(model.named_modules()):
    if isinstance(linear, nn.Linear) and f"{name}.qweight" in stored:
        own = WQLinear_GEMM(
            about["bits"], about["group_size"], linear.in_features, linear.out_features, linear.bias is not None, "cpu"
        )
        model.set_submodule(name, own)
missing, unexpected = model.load_state_dict(stored, strict=False)
assert not unexpected and all("rotary" in name for name in missing), (missing, unexpected)
print(type(model.model.layers[0].mlp.up_proj).__name__)
with torch.no_grad():
    logits = model.half()(torch.tensor(json.loads(Path(ids).read_text()))).logits
save_file({"logits": logits.float().contiguous()}, out)
