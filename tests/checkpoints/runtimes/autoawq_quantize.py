"""Run in the venv `autoawq` of README.md: MODEL TOKENS.safetensors OUT BITS GROUP → the AWQ folder that AutoAWQ itself
makes on a CPU."""

import sys

from awq import AutoAWQForCausalLM
from safetensors.torch import load_file

model, tokens, out, bits, group = sys.argv[1:]
windows = load_file(tokens)["tokens"]
quantizer = AutoAWQForCausalLM.from_pretrained(model, device_map="cpu", safetensors=True)
settings = {"w_bit": int(bits), "q_group_size": int(group), "zero_point": True, "version": "GEMM"}
quantizer.quantize(
    None, settings, calib_data=windows.tolist(), max_calib_samples=len(windows), max_calib_seq_len=windows.shape[1]
)
quantizer.save_quantized(out)
