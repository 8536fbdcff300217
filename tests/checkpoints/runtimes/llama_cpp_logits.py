"""Run in the venv of README.md: FILE.gguf IDS.json OUT.npy → float32 logits [tokens, vocabulary] of llama.cpp."""

import json
import sys
from pathlib import Path

import numpy as np
from llama_cpp import Llama

CACHE = {"type_k": 0, "type_v": 0, "verbose": False}  # float32 keys and values
path, ids, out = sys.argv[1:]
tokens = json.loads(Path(ids).read_text())
model = Llama(path, n_ctx=len(tokens), n_batch=len(tokens), n_ubatch=len(tokens), logits_all=True, **CACHE)
model.eval(tokens)
np.save(out, np.array(model.scores[: len(tokens)], np.float32))
