"""Run in the venv of README.md: FILE.gguf TEXTS.json → JSON of each text's ids, without and with BOS and EOS."""

import json
import sys
from pathlib import Path

from llama_cpp import Llama

path, texts = sys.argv[1:]
model = Llama(path, vocab_only=True, verbose=False)
tokenize = model._model.tokenize
ids = [[tokenize(text.encode(), add, True) for add in (False, True)] for text in json.loads(Path(texts).read_text())]
print(json.dumps(ids))
