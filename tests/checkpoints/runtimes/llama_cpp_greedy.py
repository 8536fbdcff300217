"""Run in the venv of README.md: FILE.gguf PROMPT N → JSON of the prompt's ids, N greedy ids and the text."""

import json
import sys

from llama_cpp import Llama

path, prompt, n = sys.argv[1:]
model = Llama(model_path=path, n_ctx=256, n_threads=1, verbose=False, logits_all=False)
ids = model.tokenize(prompt.encode(), add_bos=True, special=False)
out = []
for token in model.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0):
    if token == model.token_eos() or len(out) == int(n):
        break
    out.append(token)
print(json.dumps({"prompt": ids, "ids": out, "text": model.detokenize(out).decode()}))
