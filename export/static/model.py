"""A static export as a model: torch token ids to logits, steps with a cache, text. The host's part is host.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor

from tinycompress.checkpoints.generation_config import read_generation
from tinycompress.checkpoints.tokenizer import Tokenizer
from tinycompress.errors import InputError, need
from tinycompress.graph.config import Config
from tinycompress.model.generation import check_ids, generate_by_steps
from tinycompress.model.sampling import Sampling

from ..in_memory import in_memory
from ..quiet import onnxruntime
from ..read import check_sizes, read_manifest
from .host import FLOAT_PRODUCTS, KEY_SCALE, Cache, Runnable, StaticSession


class StaticCache:
    """The host's cache seen from torch: `layers` holds tensors [1, K, C, d] over its very memory. Its keys are divided
    by `key_scales` [K, d], one for each of `layers`, if there are any."""

    def __init__(self, config: Config, cache: Cache, max_length: int, key_scales: tuple[Tensor, ...] = ()) -> None:
        if max_length > config.max_position:
            raise InputError("positions", max_length, f"at most {config.max_position}: the slots of the graphs")
        self.cache = cache
        self.max_length = max_length
        self.key_scales = key_scales
        self.layers = [tuple(torch.from_numpy(a) for a in pair) for pair in cache.layers]

    @property
    def length(self) -> int:
        return self.cache.length

    @length.setter
    def length(self, value: int) -> None:
        self.cache.length = value


class StaticModel:
    """A folder of the `qnn` or `static` profile in ONNX Runtime on the CPU, or in whatever `open` makes of a graph's
    path. `exact`: activations in float, where the graph rounds them. `threads` None leaves the choice to the runtime;
    `spin` False lets its threads sleep between runs."""

    def __init__(
        self,
        folder: str | Path,
        *,
        exact: bool = False,
        threads: int | None = None,
        spin: bool = True,
        open: Callable[[Path], Runnable] | None = None,
    ) -> None:
        manifest = read_manifest(folder)
        check_sizes(folder, manifest)
        self.config = Config.from_dict(manifest["config"])
        self.tokenizer = Tokenizer.from_folder(folder)
        self.generation = read_generation(folder)
        self.session = StaticSession.from_folder(folder, open or (lambda path: _session(path, exact, threads, spin)))

    def __call__(self, ids: Tensor) -> Tensor:
        """ids [1, T] to logits float32 [1, T, V]."""
        ids = torch.as_tensor(ids)
        return self.step(ids, self.new_cache(*ids.shape))

    def new_cache(self, batch: int, max_length: int) -> StaticCache:
        if batch != 1:
            raise InputError("batch", batch, "1: the graphs have fixed shapes")
        cache = self.session.new_cache()
        names = [KEY_SCALE.format(slot) for slot in range(len(cache.layers))]
        scales = tuple(torch.from_numpy(self.session.host[name]) for name in names if name in self.session.host)
        return StaticCache(self.config, cache, max_length, scales)

    def step(self, ids: Tensor, cache: StaticCache) -> Tensor:
        """The next ids [1, T] behind the cache, which grows by T: logits float32 [1, T, V]."""
        check_ids(ids, self.config.vocab_size)
        B, T = ids.shape
        if B != 1 or cache.length + T > cache.max_length:
            raise InputError(
                "KV cache",
                f"batch {B}, {cache.length + T} positions",
                f"batch 1, at most {cache.max_length} (its max_length)",
            )
        return torch.from_numpy(self.session.step(ids[0].numpy(), cache.cache))[None]

    @torch.inference_mode()
    def generate(self, ids: Tensor, max_new_tokens: int = 64, **options: Unpack[Sampling]) -> Tensor:
        """Continues ids [1, T] (or [T]) by at most `max_new_tokens`: the new ids [n]. Options as in `Sampling`."""
        return generate_by_steps(self, ids, max_new_tokens, options)


def _session(path: Path, exact: bool, threads: int | None, spin: bool) -> Runnable:
    ort = onnxruntime()
    options = ort.SessionOptions()
    options.add_session_config_entry(*FLOAT_PRODUCTS)
    if threads:
        options.intra_op_num_threads = threads
    if not spin:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    source: str | bytes = str(path)
    if exact:
        source = in_memory(without_rounding(path), path.parent, options)
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def without_rounding(path: Path) -> Any:
    """A graph with every pair of Quantize- and DequantizeLinear bypassed: the same weights, activations in float."""
    need("onnx", "export")
    import onnx

    proto: Any = onnx.load(path, load_external_data=False)
    quantized = {node.output[0]: node.input[0] for node in proto.graph.node if node.op_type == "QuantizeLinear"}
    bypassed: dict[str, str] = {}
    kept = []
    outputs = {output.name for output in proto.graph.output}
    for node in proto.graph.node:  # in order of computation, so that what a pair reads is already resolved
        for i, name in enumerate(node.input):
            node.input[i] = bypassed.get(name, name)
        if node.op_type == "DequantizeLinear" and node.input[0] in quantized:
            source = bypassed.get(quantized[node.input[0]], quantized[node.input[0]])
            bypassed[node.output[0]] = source
            if node.output[0] in outputs:
                kept.append(onnx.helper.make_node("Identity", [source], [node.output[0]]))
        elif node.op_type != "QuantizeLinear":
            kept.append(node)
    del proto.graph.node[:]
    proto.graph.node.extend(kept)
    read = {name for node in kept for name in node.input}
    used = [tensor for tensor in proto.graph.initializer if tensor.name in read]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(used)
    return proto
