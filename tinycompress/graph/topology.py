"""Topology: which linears read one activation, and what is cut together. The only place that knows.

Both are pure functions of the config: no tracing, no name patterns, no model walk.
Letters: H heads, K KV heads, d head_dim, F ffn_dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .config import FINAL_NORM, HEAD, LINEARS, Config, layer_prefix, shapes


@dataclass(frozen=True)
class Feed:
    """One activation. A per-channel scale on it folds exactly into `source` (1/s) and `readers` (s).

    Fields:
        source: what writes it: the name of a norm or of a linear.
        readers: the names of the linears that read it.
        role: "attention_in" | "attention_out" | "ffn_in" | "ffn_out" | "head".
        repeat: how often each row of the source appears in it: rows of values are read by as many query heads as share
            a KV head; otherwise 1.
        layer: its layer, None for the head's.
    """

    source: str
    readers: tuple[str, ...]
    role: str
    repeat: int = 1
    layer: int | None = None

    @property
    def writes_stream(self) -> bool:
        """Whether what its reader gives is added to the residual stream."""
        return self.role in ("attention_out", "ffn_out")

    @property
    def behind_norm(self) -> bool:
        """Whether its source is a norm, which reads the residual stream."""
        return not self.writes_stream

    @property
    def norm(self) -> str | None:
        """The weight of the norm that writes it; None where the source is a linear."""
        return f"{self.source}.weight" if self.behind_norm else None

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes whose units its reader reads as channels."""
        kinds = {"attention_out": ("heads", "kv_heads"), "ffn_out": ("ffn",)}.get(self.role, ())
        return tuple(axis_name(self.layer, kind) for kind in kinds if self.layer is not None)


@dataclass(frozen=True)
class Axis:
    """Everything that is cut together.

    Fields:
        name: such as "layers.3.ffn" or "hidden".
        kind: "ffn" | "heads" | "kv_heads" of a layer, "hidden" | "layers" of none.
        layer: its layer, or None.
        size: how many units it has.
        cuts: by parameter, (dim, stride): unit j is the slice [j·stride, (j+1)·stride) of dimension `dim`.
        groups: each of that many equal runs of units keeps the same count.
    """

    name: str
    kind: str
    layer: int | None
    size: int
    cuts: Mapping[str, tuple[int, int]]
    groups: int = 1

    @property
    def reader(self) -> str:
        """The weight that reads an axis of a layer, channel by channel: of the output or the down projection."""
        return next(name for name, (dim, _) in self.cuts.items() if dim == 1)


def feeds(config: Config) -> tuple[Feed, ...]:
    """Every activation that linears read, in the order the model computes them; every linear is read exactly once."""
    readers: dict[tuple[int | None, str], list[str]] = {}
    for linear in config.linears():
        readers.setdefault((linear.layer, linear.role), []).append(linear.name)
    out: list[Feed] = []
    for i, layer in enumerate(config.layers):
        at = layer_prefix(i)
        sources = {
            "attention_in": f"{at}.input_layernorm",
            "attention_out": f"{at}.self_attn.v_proj",
            "ffn_in": f"{at}.post_attention_layernorm",
            "ffn_out": f"{at}.mlp.up_proj",
        }
        for role, source in sources.items():
            if (i, role) in readers:
                repeat = layer.group if role == "attention_out" else 1
                out.append(Feed(source, tuple(readers[i, role]), role, repeat, i))
    out.append(Feed(FINAL_NORM, (HEAD,), "head"))
    return tuple(out)


def stream_norms(config: Config) -> frozenset[str]:
    """The weights [D] of the norms that read the residual stream; those of queries and keys are not among them."""
    return frozenset(feed.norm for feed in feeds(config) if feed.norm)


def stream_writers(config: Config) -> frozenset[str]:
    """Weights and biases whose rows are channels of the residual stream; the embedding's are tokens."""
    linears = [linear for linear in config.linears() if linear.kind in ("output", "down")]
    return frozenset(name for linear in linears for name in (linear.weight, linear.bias))


def axis_name(layer: int | None, kind: str) -> str:
    """`hidden` and `layers` as they are; an axis of a layer with its index."""
    return kind if layer is None else f"layers.{layer}.{kind}"


def axes(config: Config) -> dict[str, Axis]:
    """Every axis by name: `hidden`, `layers`, and for layer i `layers.i.ffn`, `layers.i.heads`, `layers.i.kv_heads`.

    head_dim is never cut: RoPE turns its channels in pairs.
    """
    d, names = config.head_dim, shapes(config)

    def present(cuts: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
        """Weights as given, and with each output-side cut its bias, if there is one."""
        biases = {f"{n[:-7]}.bias": (0, stride) for n, (dim, stride) in cuts.items() if dim == 0}
        return {n: c for n, c in (cuts | biases).items() if n in names}

    writes_or_scales_stream = stream_writers(config) | stream_norms(config)
    hidden: dict[str, tuple[int, int]] = {}
    for name, shape in names.items():
        if name in writes_or_scales_stream:
            hidden[name] = (0, 1)  # norms, and the rows that write the residual stream
        elif len(shape) == 2:
            hidden[name] = (1, 1)  # the embedding, the head, and the columns that read the residual stream
    out = {
        "hidden": Axis("hidden", "hidden", None, config.hidden_size, hidden),
        "layers": Axis("layers", "layers", None, config.n_layers, {}),
    }
    for i, layer in enumerate(config.layers):
        attention, ffn = f"{layer_prefix(i)}.self_attn", f"{layer_prefix(i)}.mlp"
        q, k, v, o = (f"{attention}.{n}.weight" for n in LINEARS[:4])
        gate, up, down = (f"{ffn}.{n}.weight" for n in LINEARS[4:])
        found: list[Axis] = []
        if layer.n_heads:
            wide = d * layer.group
            kv_cuts = {k: (0, d), v: (0, d), q: (0, wide), o: (1, wide)}
            found.append(Axis(axis_name(i, "kv_heads"), "kv_heads", i, layer.n_kv_heads, present(kv_cuts)))
            head_cuts = present({q: (0, d), o: (1, d)})
            found.append(Axis(axis_name(i, "heads"), "heads", i, layer.n_heads, head_cuts, layer.n_kv_heads))
        if layer.ffn_dim:
            ffn_cuts = present({gate: (0, 1), up: (0, 1), down: (1, 1)})
            found.append(Axis(axis_name(i, "ffn"), "ffn", i, layer.ffn_dim, ffn_cuts))
        out |= {axis.name: axis for axis in found}
    return out
