"""An exported folder in ONNX Runtime: logits, steps with a cache, text, speed.

The cache is shared: past and present of a layer are one buffer [B, K, max_length, d] that GroupQueryAttention writes in
place, as onnxruntime-genai does, so a step costs the new positions only. Buffers are torch tensors, bound by address.
Where attention is drawn in standard operators (dynamic/attention.py), past and present are two: a step copies the past.
Buffers are int8 where the file's cache is (dynamic/kv_cache.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor

from tinycompress.checkpoints.generation_config import read_generation
from tinycompress.checkpoints.tokenizer import Tokenizer
from tinycompress.errors import InputError
from tinycompress.graph.config import Config
from tinycompress.model.generation import check_ids, generate_by_steps
from tinycompress.model.sampling import Sampling

from ..in_memory import in_memory
from ..profiles import profile_of
from ..quiet import onnxruntime
from ..read import check_sizes, load_proto, model_path, read_manifest
from .attention import fused
from .emit import ACCURACY_LEVELS, attention_layers

NUMPY = {torch.float32: np.float32, torch.int64: np.int64, torch.int8: np.int8}
FLOAT = 1  # onnx.TensorProto's numbers of element types
INT8 = 3


class OrtCache:
    """Keys and values of every attention layer, [B, K, max_length, d] each; `length` positions are filled."""

    key_scales: tuple[Tensor, ...] = ()  # keys are cached as they are

    def __init__(self, config: Config, batch: int, max_length: int, dtype: torch.dtype = torch.float32) -> None:
        if max_length > config.max_position:
            raise InputError(
                "positions", max_length, f"at most {config.max_position}: the rotary tables in the file end there"
            )
        self.length = 0
        self.batch = batch
        self.max_length = max_length
        shapes = [(batch, config.layers[i].n_kv_heads, max_length, config.head_dim) for i in attention_layers(config)]
        self.layers = [tuple(torch.zeros(shape, dtype=dtype) for _ in "kv") for shape in shapes]

    def rows(self, index: Tensor) -> OrtCache:
        """A cache of its own that holds the rows `index` [n] of this one, in that order."""
        chosen = copy(self)
        chosen.batch = len(index)
        chosen.layers = [tuple(part[index] for part in pair) for pair in self.layers]
        return chosen

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, filled or not."""
        return sum(part.nbytes for pair in self.layers for part in pair)


class OrtModel:
    """A folder written by `export`. `accuracy_level` overrides the file's; `float_cache` keeps keys and values in
    float32 where the file's cache is int8; `threads` None leaves the choice to the runtime; `spin` False lets its
    threads sleep between runs, for runs that alternate with torch's."""

    def __init__(
        self,
        folder: str | Path,
        accuracy_level: int | None = None,
        threads: int | None = None,
        spin: bool = True,
        *,
        float_cache: bool = False,
    ) -> None:
        ort = onnxruntime()
        self.folder = Path(folder)
        manifest = read_manifest(folder)
        check_sizes(folder, manifest)  # the runtime's own words for a truncated file do not name it
        self.config = Config.from_dict(manifest["config"])
        profile = profile_of(manifest["profile"])
        self.shared = fused(self.config, profile)
        int8 = bool(manifest.get("kv")) and not float_cache
        self.cache_dtype = torch.int8 if int8 else torch.float32
        self.tokenizer = Tokenizer.from_folder(folder)
        self.generation = read_generation(folder)
        options = ort.SessionOptions()
        if threads:
            options.intra_op_num_threads = threads
        if not spin:
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        path = model_path(folder)
        source: str | bytes = str(path)
        level: Any = manifest.get("accuracy_level") if accuracy_level is None else accuracy_level
        if profile.form == "standard":  # the runtime fuses DequantizeLinear and MatMul and asks here for the level
            options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(level))
        elif accuracy_level is not None or (float_cache and manifest.get("kv")):
            source = in_memory(_changed(folder, level, float_cache), path.parent, options)
        self.session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        self.inputs = [node.name for node in self.session.get_inputs()]

    def __call__(self, ids: Tensor) -> Tensor:
        """ids [B, T] to logits float32 [B, T, V]."""
        ids = torch.as_tensor(ids)
        return self.step(ids, self.new_cache(*ids.shape))

    def new_cache(self, batch: int, max_length: int) -> OrtCache:
        return OrtCache(self.config, batch, max_length, self.cache_dtype)

    def step(self, ids: Tensor, cache: OrtCache, mask: Tensor | None = None) -> Tensor:
        """The next ids [B, T] behind the cache, which grows by T: logits float32 [B, T, V]. `mask` [B, all positions]
        is 0 where a row was padded, on either side of its prompt."""
        check_ids(ids, self.config.vocab_size)
        B, T = ids.shape
        total = cache.length + T
        if total > cache.max_length or cache.batch != B:
            raise InputError(
                "KV cache",
                f"batch {B}, {total} positions",
                f"batch {cache.batch}, at most {cache.max_length} (its max_length)",
            )
        if self.shared and B > 1 and T > 1 and cache.length:
            raise InputError(
                "new ids behind a cache",
                f"{T} in each of {B} rows",
                "one at a time, or one row: GroupQueryAttention takes no others (the std profile does)",
            )
        logits = torch.empty(B, T, self.config.vocab_size)
        mask = torch.ones(B, total, dtype=torch.long) if mask is None else mask.long().contiguous()
        places = (mask.cumsum(1) - 1).clamp_min(0)[:, -T:].contiguous()
        tensors = {"input_ids": ids.long().contiguous(), "attention_mask": mask, "position_ids": places}
        binding = self.session.io_binding()
        presents: list[tuple[Tensor, Tensor]] = []  # apart from the cache's buffers, and those
        for slot, pair in enumerate(cache.layers):
            for kind, buffer in zip(("key", "value"), pair):
                past = present = buffer
                if not self.shared:
                    past = buffer[:, :, : cache.length].contiguous()
                    present = buffer.new_empty(B, buffer.shape[1], total, buffer.shape[3])
                    presents.append((buffer, present))
                tensors[f"past_key_values.{slot}.{kind}"] = past
                _bind(binding.bind_output, f"present.{slot}.{kind}", present)
        for name in self.inputs:
            _bind(binding.bind_input, name, tensors[name])
        _bind(binding.bind_output, "logits", logits)
        self.session.run_with_iobinding(binding)
        for buffer, present in presents:
            buffer[:, :, cache.length : total] = present[:, :, cache.length :]
        cache.length = total
        return logits

    @torch.inference_mode()
    def generate(self, ids: Tensor, max_new_tokens: int = 64, **options: Unpack[Sampling]) -> Tensor:
        """Continues ids [1, T] (or [T]) by at most `max_new_tokens`: the new ids [n]. Options as in `Sampling`."""
        return generate_by_steps(self, ids, max_new_tokens, options)

    def tokens_per_second(self, prompt_len: int = 32, n: int = 64) -> float:
        """Decode speed: n tokens one by one behind a prompt of random ids; two steps warm up, prefill does not
        count."""
        prompt = torch.randint(self.config.vocab_size, (1, prompt_len), generator=torch.Generator().manual_seed(0))
        cache = self.new_cache(1, prompt_len + n + 2)
        token = self.step(prompt, cache)[:, -1:].argmax(-1)
        for i in range(n + 2):
            if i == 2:
                start = time.perf_counter()
            token = self.step(token, cache)[:, -1:].argmax(-1)
        return n / (time.perf_counter() - start)


def _bind(bind: Callable[..., None], name: str, tensor: Tensor) -> None:
    bind(name, "cpu", 0, NUMPY[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())


def _changed(folder: str | Path, accuracy_level: int, float_cache: bool) -> Any:
    """model.onnx with another accuracy_level and, if asked for, a float cache; the weights stay in their file."""
    if accuracy_level not in ACCURACY_LEVELS:
        raise InputError("accuracy_level", accuracy_level, ACCURACY_LEVELS)
    proto: Any = load_proto(folder)
    for node in proto.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = accuracy_level
        if float_cache and node.op_type == "GroupQueryAttention":
            del node.input[9:]  # the scales and what is left out before them
            kept = [
                attribute
                for attribute in node.attribute
                if attribute.name not in ("k_quant_type", "v_quant_type", "kv_cache_bit_width")
            ]
            del node.attribute[:]
            node.attribute.extend(kept)
    if float_cache:
        for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
            if value.type.tensor_type.elem_type == INT8:
                value.type.tensor_type.elem_type = FLOAT
    return proto
