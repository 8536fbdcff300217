"""Topology: which linears read one activation, and what is cut together. The only place that knows.

Both are pure functions of the config: no tracing, no name patterns, no model walk.
Letters: H heads, K KV heads, d head_dim, F ffn_dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .config import LINEARS, Config, layer_prefix, shapes


@dataclass(frozen=True)
class Feed:
    """One activation: `source` is the parameter owner that writes it, `readers` the linears that read it.

    A per-channel scale on the activation folds exactly into `source` (1/s) and `readers` (s). `repeat` is how often
    each source row appears in the activation: v_proj's rows are read by `repeat` query heads, otherwise 1.
    """

    source: str
    readers: tuple[str, ...]
    repeat: int = 1
    layer: int | None = None


@dataclass(frozen=True)
class Axis:
    """Everything that is cut together. Index j of the axis is, in each parameter of `cuts`, the slice
    [j·stride, (j+1)·stride) of dimension `dim`. `groups` > 1: each of that many equal runs keeps the same count."""

    name: str
    size: int
    cuts: Mapping[str, tuple[int, int]]
    groups: int = 1

    @property
    def reader(self) -> str:
        """The weight that reads an axis of a layer, channel by channel: of o_proj or down_proj."""
        return next(name for name, (dim, _) in self.cuts.items() if dim == 1)


def feeds(config: Config) -> tuple[Feed, ...]:
    """Every activation that linears read, in the order the model computes them; every linear is read exactly once."""
    out: list[Feed] = []
    for i, layer in enumerate(config.layers):
        at = layer_prefix(i)
        attn, mlp = f"{at}.self_attn", f"{at}.mlp"
        if layer.n_heads:
            out.append(Feed(f"{at}.input_layernorm", (f"{attn}.q_proj", f"{attn}.k_proj", f"{attn}.v_proj"), layer=i))
            out.append(Feed(f"{attn}.v_proj", (f"{attn}.o_proj",), repeat=layer.group, layer=i))
        if layer.ffn_dim:
            out.append(Feed(f"{at}.post_attention_layernorm", (f"{mlp}.gate_proj", f"{mlp}.up_proj"), layer=i))
            out.append(Feed(f"{mlp}.up_proj", (f"{mlp}.down_proj",), layer=i))
    out.append(Feed("model.norm", ("lm_head",)))
    return tuple(out)


def axes(config: Config) -> dict[str, Axis]:
    """Every axis by name: `hidden`, `layers`, and for layer i `layers.i.ffn`, `layers.i.heads`, `layers.i.kv_heads`.

    head_dim is never cut: RoPE turns its channels in pairs.
    """
    d, names = config.head_dim, shapes(config)

    def present(cuts: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
        """Weights as given, and with each output-side cut its bias, if there is one."""
        biases = {f"{n[:-7]}.bias": (0, stride) for n, (dim, stride) in cuts.items() if dim == 0}
        return {n: c for n, c in (cuts | biases).items() if n in names}

    hidden: dict[str, tuple[int, int]] = {}
    for name, shape in names.items():
        writes = name.endswith(("o_proj.weight", "down_proj.weight", "o_proj.bias", "down_proj.bias"))
        if (len(shape) == 1 and not name.endswith(".bias")) or writes:
            hidden[name] = (0, 1)  # norms, and the rows that write the residual stream
        elif len(shape) == 2:
            hidden[name] = (1, 1)  # the embedding, the head, and the columns that read the residual stream
    out = {
        "hidden": Axis("hidden", config.hidden_size, hidden),
        "layers": Axis("layers", config.n_layers, {}),
    }
    for i, layer in enumerate(config.layers):
        attn, mlp = f"{layer_prefix(i)}.self_attn", f"{layer_prefix(i)}.mlp"
        q, k, v, o = (f"{attn}.{n}.weight" for n in LINEARS[:4])
        gate, up, down = (f"{mlp}.{n}.weight" for n in LINEARS[4:])
        if layer.n_heads:
            wide = d * layer.group
            kv_cuts = {k: (0, d), v: (0, d), q: (0, wide), o: (1, wide)}
            out[f"layers.{i}.kv_heads"] = Axis(f"layers.{i}.kv_heads", layer.n_kv_heads, present(kv_cuts))
            out[f"layers.{i}.heads"] = Axis(
                f"layers.{i}.heads", layer.n_heads, present({q: (0, d), o: (1, d)}), layer.n_kv_heads
            )
        if layer.ffn_dim:
            out[f"layers.{i}.ffn"] = Axis(
                f"layers.{i}.ffn", layer.ffn_dim, present({gate: (0, 1), up: (0, 1), down: (1, 1)})
            )
    return out
