"""The host's side of a static export, in NumPy: what an application around an NPU has to do.

A prompt is cut into chunks of the prefill graph's length S, the last one padded; single tokens go to the decode graph.
For each run the host gathers the embedding's rows, lays out mask and rotation, hands over its cache of C slots and
writes the new keys and values behind the `length` slots that are filled.

Needs numpy, safetensors and something that runs a graph, not torch and not this library, so that it can be read and
carried over; it is what the checks in runtimes/ drive. Letters: S, C, D hidden, K KV heads, d head_dim, V vocabulary.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

HOST = "host.safetensors"
WEIGHTS = "weights.data"
GRAPHS = {"prefill": "prefill.onnx", "decode": "decode.onnx"}
# On a CPU, ONNX Runtime would round the activations of products with packed weights to int8: not what an NPU does.
FLOAT_PRODUCTS = ("session.qdq_matmulnbits_accuracy_level", "0")
KEY_SCALE = "key_scale_{}"  # in the host's file, [K, d] for each slot of the cache: what its keys are divided by
EMBEDDING = "model.embed_tokens.weight"
Array = npt.NDArray[Any]


class Runnable(Protocol):
    """What runs one graph: onnxruntime's InferenceSession is one."""

    def run(self, names: Sequence[str], feeds: Mapping[str, Array]) -> Sequence[Array]: ...


@dataclass
class Cache:
    """What was read so far, in slots of a fixed number C.

    Fields:
        layers: (keys, values) float32 [1, K, C, d] of every layer with attention; keys are divided by the key scales of
            the host file, if any.
        length: slots that are filled. Default 0.
    """

    layers: list[tuple[Array, Array]]
    length: int = 0


class StaticSession:
    """`shape`: the manifest's numbers under "static"; `host`: the table and the rotation; `graphs`: prefill and
    decode."""

    def __init__(self, shape: Mapping[str, Any], host: Mapping[str, Array], graphs: Mapping[str, Runnable]) -> None:
        self.shape = shape
        self.host = host
        self.graphs = graphs

    @staticmethod
    def from_folder(folder: str | Path, open: Callable[[Path], Runnable] | None = None) -> StaticSession:
        """An exported folder; `open` turns the path of a graph into what runs it (default: onnxruntime on the CPU)."""
        from safetensors.numpy import load_file

        folder = Path(folder)
        open = open or cpu_session
        shape = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["static"]
        return StaticSession(
            shape, load_file(folder / HOST), {name: open(folder / file) for name, file in GRAPHS.items()}
        )

    def new_cache(self) -> Cache:
        shapes = [(1, kv_heads, self.shape["context"], self.shape["head_dim"]) for kv_heads in self.shape["kv_heads"]]
        return Cache([(np.zeros(s, np.float32), np.zeros(s, np.float32)) for s in shapes])

    def step(self, ids: Array, cache: Cache) -> Array:
        """The next ids [T] behind the cache, which grows by T: logits float32 [T, V]. ValueError beyond the context."""
        if cache.length + len(ids) > self.shape["context"]:
            raise ValueError(f"{cache.length + len(ids)} positions; the graphs have room for {self.shape['context']}")
        out = []
        while len(ids):
            name, size = ("decode", 1) if len(ids) == 1 else ("prefill", self.shape["chunk"])
            out.append(self._run(name, ids[:size], size, cache))
            ids = ids[size:]
        return np.concatenate(out)

    def logits(self, ids: Array, steps: int = 0) -> Array:
        """[T, V] of ids [T] behind nothing: in chunks, the last `steps` one at a time."""
        cache = self.new_cache()
        start = max(1, len(ids) - steps)
        return np.concatenate(
            [self.step(ids[:start], cache), *(self.step(ids[i : i + 1], cache) for i in range(start, len(ids)))]
        )

    def _run(self, name: str, ids: Array, size: int, cache: Cache) -> Array:
        """One run of a graph that takes `size` positions, of which ids [n] fill the first n."""
        n = len(ids)
        start = cache.length
        entries = [
            (f"{kind}_{slot}", array)
            for slot, pair in enumerate(cache.layers)
            for kind, array in zip(("key", "value"), pair)
        ]
        outputs = ["logits", *(f"new_{entry}" for entry, _ in entries)]
        logits, *new = self.graphs[name].run(outputs, self.feeds(ids, size, cache))
        for (_, array), values in zip(entries, new):
            array[:, :, start : start + n] = values[:, :, :n]
        cache.length += n
        return logits[0, :n]

    def feeds(self, ids: Array, size: int, cache: Cache) -> dict[str, Array]:
        """A graph's inputs for ids [n] behind the cache, padded to `size` positions."""
        n = len(ids)
        start = cache.length
        hidden = np.zeros((1, size, self.shape["hidden"]), np.float32)
        hidden[0, :n] = self.rows(ids)
        feeds = {"hidden": hidden}
        if cache.layers:
            for window in self.shape.get("windows", [None]):
                feeds[mask_name(window)] = self.mask(start, size, window)
            for key in ("cos", "sin") if self.shape.get("rope", True) else ():
                feeds[key] = np.zeros((1, 1, size, self.shape["head_dim"] // 2), np.float32)
                feeds[key][0, 0, :n] = self.host[f"rope.{key}"][start : start + n]
        for slot, (keys, values) in enumerate(cache.layers):
            feeds |= {f"past_key_{slot}": keys, f"past_value_{slot}": values}
        return feeds

    def mask(self, start: int, size: int, window: int | None = None) -> Array:
        """[1, 1, S, C + S]: 0 for the filled slots and, causally, the new positions behind all slots, of both only
        those less than `window` positions back; else -100."""
        context = self.shape["context"]
        new = np.arange(start, start + size)
        keys = np.concatenate([np.arange(context), new])  # the position of each slot
        filled = np.concatenate([np.arange(context) < start, np.ones(size, bool)])
        back = new[:, None] - keys
        seen = filled & (back >= 0) & (back < (window or context + size))
        return np.where(seen, np.float32(0), np.float32(self.shape["mask"]))[None, None]

    def rows(self, ids: Array) -> Array:
        """The embedding of ids [n], float32 [n, D]; a packed table is a stream of bits, low ones first."""
        if EMBEDDING in self.host:
            return self.host[EMBEDDING][ids]
        packed = self.host[f"{EMBEDDING}.packed"][ids]
        scales = self.host[f"{EMBEDDING}.scales"][ids]
        bits = self.shape["embedding_bits"]
        group = self.shape["hidden"] // scales.shape[1]
        stream = np.unpackbits(packed, axis=-1, bitorder="little")[..., : group * bits]
        q = stream.reshape(*scales.shape, group, bits) @ (1 << np.arange(bits))
        zeros = self.host.get(f"{EMBEDDING}.zeros")
        zero = 2 ** (bits - 1) if zeros is None else zeros[ids].astype(np.int64)[..., None]
        return ((q - zero).astype(np.float32) * scales[..., None]).reshape(len(ids), -1)


def mask_name(window: int | None) -> str:
    """The graphs' input for layers that see so many positions; None: all."""
    return f"mask_{window}" if window else "mask"


def cpu_session(path: Path) -> Runnable:
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read at the import
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.add_session_config_entry(*FLOAT_PRODUCTS)
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
