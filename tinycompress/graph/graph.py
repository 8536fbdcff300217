"""The graph: a value that every pass takes and returns.

A graph is config and weights, with the history of passes and the tokenizer; it is never changed in place. What reads
what, and what is cut together, say `feeds` and `axes` (topology.py); edits are in edit.py. Weights carry Hugging Face
names and the half-split RoPE layout. Letters: D hidden_size, H heads, K KV heads, d head_dim, F ffn_dim, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from ..errors import InputError
from .config import FINAL_NORM, Config, shapes

if TYPE_CHECKING:
    from ..checkpoints.tokenizer import Tokenizer
    from ..model.transformer import Transformer
    from .quant_tensor import QuantTensor

Weight: TypeAlias = "Tensor | QuantTensor"
Pass = Callable[["Graph"], "Graph"]  # a pass is any such callable: no base class, no registry


@dataclass(frozen=True)
class LazyTensor:
    """A weight that is read when asked for (a GGUF block to dequantize, a dtype to convert); not kept.

    Fields:
        shape: of the tensor.
        dtype: of the tensor.
        read: makes the tensor, each time anew.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


class Weights(Mapping[str, "Weight"]):
    """Parameters by Hugging Face name. Memory-mapped tensors cost nothing until touched; lazy ones are read each
    time."""

    def __init__(self, entries: Mapping[str, Weight | LazyTensor]) -> None:
        known: Mapping[str, Weight | LazyTensor] = entries.entries if isinstance(entries, Weights) else entries
        self.entries: dict[str, Weight | LazyTensor] = dict(known)

    def __getitem__(self, name: str) -> Weight:
        entry = self.entries[name]
        return entry.read() if isinstance(entry, LazyTensor) else entry

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


@dataclass(frozen=True, eq=False, repr=False)
class Graph:
    """A model as a value. `replace` makes a changed copy that shares every weight that was not changed.

    Fields:
        config: the shapes, and the ids that begin and end a text.
        weights: parameters by name; any mapping is accepted.
        history: the passes that made the graph, one repr each.
        tokenizer: of the model, or None.
        generation: the contents of generation_config.json as they were read; None where there was none. Its ids are
            in `config`, its sampling values are what `generate` uses where the caller gives none.
    """

    config: Config
    weights: Weights
    history: tuple[str, ...] = ()
    tokenizer: Tokenizer | None = field(default=None)
    generation: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        weights = self.weights if isinstance(self.weights, Weights) else Weights(self.weights)
        expected = shapes(self.config)
        if missing := [name for name in expected if name not in weights.entries]:
            raise InputError("weights", f"no {_some(missing)}", f"the {len(expected)} parameters of the config")
        if unknown := [name for name in weights.entries if name not in expected]:
            raise InputError("weights", f"unexpected {_some(unknown)}", f"the {len(expected)} parameters of the config")
        for name, shape in expected.items():
            found = tuple(weights.entries[name].shape)
            if found != shape:
                raise InputError(name, f"shape {found}", f"{shape}, by the config")
        object.__setattr__(self, "weights", weights)

    def __repr__(self) -> str:
        c = self.config
        size = f"{c.n_layers} layers, hidden {c.hidden_size}, {c.n_params:,} parameters"
        return f"Graph({size}, history {list(self.history)})"

    def replace(
        self,
        *,
        weights: Mapping[str, Weight | LazyTensor] | None = None,
        config: Config | None = None,
        by: object = None,
        tokenizer: Tokenizer | None = None,
        generation: Mapping[str, Any] | None = None,
    ) -> Graph:
        """A new graph: `weights` override those of the same name, parameters the (new) config lacks are dropped,
        and `by` (a pass) is added to the history by its repr."""
        config = config or self.config
        merged = self.weights.entries | dict(weights or {})
        kept = {name: merged[name] for name in shapes(config) if name in merged}
        history = self.history if by is None else (*self.history, repr(by))
        kept_generation = self.generation if generation is None else generation
        return Graph(config, Weights(kept), history, tokenizer or self.tokenizer, kept_generation)

    def tensor(self, name: str) -> Tensor:
        """A parameter that must still be dense; a packed one is an InputError."""
        weight = self.weights[name]
        if not isinstance(weight, Tensor):
            raise InputError(name, f"a weight quantized to {weight.grid}", "a dense one (quantize last)")
        return weight

    def linear(self, name: str) -> Weight:
        """The weight [out, in] of a linear, the tied head included."""
        return self.weights[self.config.weight_name(name)]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype activations have: that of the norms, which are never quantized."""
        return self.weights.entries[f"{FINAL_NORM}.weight"].dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the weights as stored (packed, for quantized ones)."""
        total = 0
        for entry in self.weights.entries.values():
            total += getattr(entry, "nbytes", None) or math.prod(entry.shape) * entry.dtype.itemsize
        return total

    def fingerprint(self) -> str:
        """SHA-256 over config and weights (names, dtypes, bytes): equal graphs, equal fingerprints. Reads
        everything."""
        digest = hashlib.sha256(json.dumps(self.config.to_dict(), sort_keys=True).encode())
        for name in shapes(self.config):
            weight = self.weights[name]
            parts = {"": weight} if isinstance(weight, Tensor) else weight.tensors()
            for part, tensor in parts.items():
                digest.update(f"{name}{part} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def check_finite(self) -> None:
        """An `InputError` that names a weight, or a scale of one, which holds NaN or an infinity. Reads everything."""
        for name, weight in self.weights.items():
            parts = {"": weight} if isinstance(weight, Tensor) else weight.tensors()
            for part, tensor in parts.items():
                check_finite(name + part, tensor)

    def dense(self, dtype: torch.dtype | None = None) -> Graph:
        """The same function with packed weights unpacked (and, given a dtype, all weights converted) when they are
        read."""
        changed: dict[str, Weight | LazyTensor] = {}
        for name, entry in self.weights.entries.items():
            packed = not isinstance(entry, Tensor | LazyTensor)
            if packed or (dtype and entry.dtype != dtype):
                changed[name] = LazyTensor(
                    tuple(entry.shape), dtype or entry.dtype, partial(self._read_dense, name, dtype or entry.dtype)
                )
        return self.replace(weights=changed) if changed else self

    def _read_dense(self, name: str, dtype: torch.dtype) -> Tensor:
        weight = self.weights[name]
        return weight.to(dtype) if isinstance(weight, Tensor) else weight.dequantize(dtype)

    def module(
        self,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        trainable: Sequence[str] = (),
    ) -> Transformer:
        """The graph as an nn.Module: called on token ids [B, T] it returns logits [B, T, V].

        It shares the graph's tensors and learns nothing, but for the parameters that `trainable` names: these are
        copies with gradients. A name is a parameter's or a module's, and may have wildcards: "model.layers.3",
        "*.mlp.*", "*norm*".
        """
        from ..model.transformer import Transformer

        module = Transformer(self, device=device, dtype=dtype)
        if trainable:
            module.train_only(trainable)
        return module

    @staticmethod
    def random(config: Config, seed: int = 0, std: float = 0.02, dtype: torch.dtype = torch.float32) -> Graph:
        """Normal(0, std) matrices and biases, norms at one: for tests, benchmarks and training from scratch."""
        generator = torch.Generator().manual_seed(seed)
        weights = {}
        for name, shape in shapes(config).items():
            norm = len(shape) == 1 and not name.endswith(".bias")
            weights[name] = (
                torch.ones(shape, dtype=dtype)
                if norm
                else torch.empty(shape, dtype=dtype).normal_(0, std, generator=generator)
            )
        return Graph(config, Weights(weights))

    @staticmethod
    def from_hf(model: Any) -> Graph:
        """The graph of a live transformers model of a family that is carried; tensors are shared with the model."""
        from ..checkpoints.hf import graph_from_model

        return graph_from_model(model)

    def to_hf(self) -> Any:
        """A live transformers model that shares the graph's tensors (quantized ones are dequantized)."""
        from ..checkpoints.hf import model_from_graph

        return model_from_graph(self)


def check_finite(name: str, tensor: Tensor) -> None:
    """An `InputError` that names the weight if a float tensor holds NaN or an infinity; one pass, no copy."""
    if tensor.is_meta or not tensor.is_floating_point() or not tensor.numel():
        return
    lowest, highest = torch.aminmax(tensor.detach())
    if not (torch.isfinite(lowest) and torch.isfinite(highest)):
        raise InputError(name, "NaN or infinite values", "finite weights")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
