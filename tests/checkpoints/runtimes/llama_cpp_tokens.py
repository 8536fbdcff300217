"""Run in the venv of README.md: TEXTS.json FILE.gguf … → JSON, for every file, of each text's ids without and with the
tokens around it."""

import json
import sys
from pathlib import Path

import llama_cpp
from llama_cpp._internals import LlamaModel

texts, *paths = sys.argv[1:]
texts = [text.encode() for text in json.loads(Path(texts).read_text())]
params = llama_cpp.llama_model_default_params()
params.vocab_only = True
llama_cpp.llama_backend_init()
out = []
for path in paths:
    model = LlamaModel(path_model=path, params=params, verbose=False)
    out.append([[model.tokenize(text, around, True) for around in (False, True)] for text in texts])
print(json.dumps(out))
