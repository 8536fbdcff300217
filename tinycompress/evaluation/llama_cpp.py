"""A GGUF file in llama.cpp, through llama-cpp-python: the logits of that runtime's own kernels, cache and arithmetic.

Only its C interface is used, whose logits can be read for a batch at a time: a window of a large vocabulary never lies
in memory whole. Letters: T positions, n of them in a batch, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, MissingExtra, need
from ..graph.config import Config
from ..model.generation import check_ids

TOGETHER = 256  # positions of a batch


@dataclass
class LlamaCppCache:
    """What llama.cpp has read; one at a time is valid, that of the last `new_cache`.

    Fields:
        max_length: positions that it has room for.
        length: positions that it holds.
    """

    max_length: int
    length: int = 0


class LlamaCppModel:
    """A GGUF file that gives logits. `config` is that of the graph in it; `context` the longest window that will be
    asked for; `threads` None leaves the choice to llama.cpp. A `MissingExtra` without llama-cpp-python."""

    def __init__(self, path: str | Path, config: Config, context: int, threads: int | None = None) -> None:
        try:
            self.api: Any = need("llama_cpp", None)
        except MissingExtra:
            raise MissingExtra("llama-cpp-python", None) from None
        if not Path(path).is_file():
            raise InputError("model for llama.cpp", str(path), "a .gguf file")
        self.config = config
        self.context = context
        room = {"n_ctx": context, "n_batch": TOGETHER, "n_ubatch": TOGETHER}
        self.model = self.api.Llama(str(path), n_threads=threads, n_threads_batch=threads, verbose=False, **room)
        if self.model.n_vocab() != config.vocab_size:
            raise InputError(f"vocabulary of {path}", f"{self.model.n_vocab()} tokens", f"{config.vocab_size}")

    @property
    def version(self) -> str:
        """Of llama-cpp-python, which carries one llama.cpp."""
        return str(self.api.__version__)

    def __call__(self, ids: Tensor) -> Tensor:
        """ids [1, T] to logits float32 [1, T, V]."""
        return self.step(ids, self.new_cache(*ids.shape))

    def new_cache(self, batch: int, max_length: int) -> LlamaCppCache:
        """An empty cache; what was there before is forgotten."""
        if batch != 1 or max_length > self.context:
            raise InputError("batch, positions", f"{batch}, {max_length}", f"1, at most {self.context}")
        self.api.llama_memory_clear(self.api.llama_get_memory(self.model.ctx), True)
        return LlamaCppCache(max_length)

    def step(self, ids: Tensor, cache: LlamaCppCache) -> Tensor:
        """The next ids [1, T] behind the cache, which grows by T: logits float32 [1, T, V]."""
        check_ids(ids, self.config.vocab_size)
        if cache.length + ids.shape[1] > cache.max_length:
            raise InputError("KV cache", f"{cache.length + ids.shape[1]} positions", f"at most {cache.max_length}")
        parts = []
        for some in ids[0].split(TOGETHER):
            parts.append(self._decode(some.tolist(), cache.length))
            cache.length += len(some)
        return torch.from_numpy(np.concatenate(parts))[None]

    def _decode(self, ids: list[int], start: int) -> np.ndarray:
        """Logits [n, V] of n ids from position `start` on."""
        batch = self.api.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for i, token in enumerate(ids):
                batch.token[i] = token
                batch.pos[i] = start + i
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = 0
                batch.logits[i] = True
            code = self.api.llama_decode(self.model.ctx, batch)
            if code:
                raise RuntimeError(f"llama_decode gave {code} for {len(ids)} tokens from position {start}")
            logits = self.api.llama_get_logits(self.model.ctx)
            return np.ctypeslib.as_array(logits, shape=(len(ids), self.config.vocab_size)).copy()
        finally:
            self.api.llama_batch_free(batch)
