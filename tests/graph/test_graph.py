"""The graph's arithmetic and topology: shapes, feeds, axes, and that a cut is exactly a mask."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinycompress.errors import InputError
from tinycompress.graph.config import LINEARS, Config, Layer, shapes
from tinycompress.graph.edit import cut
from tinycompress.graph.graph import Graph
from tinycompress.graph.presets import LLAMA_2_7B, SMOLLM2_135M, TINYLLAMA_1_1B
from tinycompress.graph.rope import Rope
from tinycompress.graph.topology import axes, feeds

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]])


def double_graph(config: Config, seed: int = 0) -> Graph:
    """Random float64 weights with norms and biases that are not trivial, so that a wrong cut shows."""
    graph = Graph.random(config, seed, std=0.2, dtype=torch.float64)
    g = torch.Generator().manual_seed(seed)
    norms = {n: torch.rand(s, generator=g, dtype=torch.float64) + 0.5 for n, s in shapes(config).items() if "norm" in n}
    return graph.replace(weights=norms)


@st.composite
def configs(draw):
    d = draw(st.sampled_from([4, 8]))
    layer = st.builds(
        lambda kv, group, ffn, attn, window, rope: Layer(kv * group * attn, kv * attn, ffn, window, rope),
        st.integers(1, 3),
        st.integers(1, 3),
        st.sampled_from([0, 5, 12]),
        st.integers(0, 1),
        st.sampled_from([None, 3]),
        st.booleans(),
    )
    return Config(
        vocab_size=16,
        hidden_size=draw(st.integers(3, 20)),
        head_dim=d,
        layers=tuple(draw(st.lists(layer, min_size=1, max_size=3))),
        rope=draw(st.sampled_from([Rope(), Rope(type="yarn", factor=4, original_max_position=8)])),
        max_position=64,
        tie_embeddings=draw(st.booleans()),
        biases=draw(st.frozensets(st.sampled_from(LINEARS))),
        qk_norm_eps=draw(st.sampled_from([None, 1e-5])),
    )


def test_presets_have_their_published_sizes():
    assert TINYLLAMA_1_1B.n_params == 1_100_048_384
    assert LLAMA_2_7B.n_params == 6_738_415_616
    assert SMOLLM2_135M.n_params == 134_515_008


@pytest.mark.parametrize("config", [TINYLLAMA_1_1B, LLAMA_2_7B, SMOLLM2_135M])
def test_every_linear_is_read_exactly_once(config):
    all_feeds = feeds(config)
    assert len(all_feeds) == 4 * config.n_layers + 1
    readers = list(itertools.chain.from_iterable(f.readers for f in all_feeds))
    matrices = [n[:-7] for n, s in shapes(config).items() if len(s) == 2 and "embed" not in n]
    if config.tie_embeddings:
        matrices.append("lm_head")
    assert sorted(readers) == sorted(matrices)


def test_tinyllama_has_89_feeds():
    assert len(feeds(TINYLLAMA_1_1B)) == 89
    assert feeds(TINYLLAMA_1_1B)[1].repeat == 8  # v_proj rows are read by eight query heads each


def masked(graph: Graph, axis, keep) -> Graph:
    """The naive reading of an axis: everything outside `keep` set to zero, shapes as they were."""
    changed = {}
    for name, (dim, stride) in axis.cuts.items():
        index = [k * stride + s for k in keep for s in range(stride)]
        mask = torch.zeros(graph.weights[name].shape[dim], dtype=torch.float64)
        mask[index] = 1
        changed[name] = graph.weights[name] * (mask if dim == graph.weights[name].dim() - 1 else mask[:, None])
    return graph.replace(weights=changed)


def drawn(data, axis) -> list[int]:
    """Some units of an axis, the same number of each group."""
    per_group = axis.size // axis.groups
    n = data.draw(st.integers(1, per_group))
    return [
        g * per_group + i for g in range(axis.groups) for i in sorted(data.draw(st.permutations(range(per_group)))[:n])
    ]


@settings(max_examples=40, deadline=None)
@given(configs(), st.data())
def test_a_cut_is_a_mask(config, data):
    graph = double_graph(config)
    axis = data.draw(st.sampled_from([a for a in axes(config).values() if a.name != "layers"]))
    keep = drawn(data, axis)
    small = cut(graph, axis, keep)
    assert {n: tuple(w.shape) for n, w in small.weights.items()} == shapes(small.config)
    reference = masked(graph, axis, keep).module()(IDS)
    assert torch.allclose(small.module()(IDS), reference, atol=1e-8, rtol=0)


@settings(max_examples=25, deadline=None)
@given(configs(), st.data())
def test_cuts_on_all_axes_are_masks_on_all_of_them(config, data):
    """Every axis at once, in any order, with one of heads and KV groups a layer, and at the end some layers."""
    small = whole = double_graph(config)
    names = [
        data.draw(st.sampled_from(two))
        for i in range(config.n_layers)
        if (two := [f"layers.{i}.heads", f"layers.{i}.kv_heads"])[0] in axes(config)
    ]
    names += ["hidden", *(f"layers.{i}.ffn" for i, layer in enumerate(config.layers) if layer.ffn_dim)]
    for name in data.draw(st.permutations(names)):
        axis = axes(config)[name]
        keep = drawn(data, axis)
        small, whole = cut(small, name, keep), masked(whole, axis, keep)
    layers = sorted(data.draw(st.sets(st.integers(0, config.n_layers - 1), min_size=1)))
    writers = [
        n for n in whole.weights if n.split(".")[-2] in ("o_proj", "down_proj") and int(n.split(".")[2]) not in layers
    ]
    whole = whole.replace(weights={n: torch.zeros_like(whole.weights[n]) for n in writers})
    assert torch.allclose(cut(small, "layers", layers).module()(IDS), whole.module()(IDS), atol=1e-8, rtol=0)


def test_an_empty_cut_removes_the_sublayer(nonuniform):
    for axis in ("layers.0.ffn", "layers.0.heads", "layers.0.kv_heads"):
        small = cut(nonuniform, axis, [])
        gone = "mlp" if axis.endswith("ffn") else "self_attn"
        assert not any(f"layers.0.{gone}" in n for n in small.weights)
        silent = {
            n: torch.zeros_like(w)
            for n, w in nonuniform.weights.items()
            if f"layers.0.{gone}" in n and ("o_proj" in n or "down_proj" in n)
        }
        assert torch.allclose(small.module()(IDS), nonuniform.replace(weights=silent).module()(IDS), atol=1e-5)


def test_layers_can_be_dropped(nonuniform):
    small = cut(nonuniform, "layers", [0, 2])
    assert small.config.layers == (nonuniform.config.layers[0], nonuniform.config.layers[2])
    for name, weight in small.weights.items():
        assert weight is nonuniform.weights[name.replace("layers.1.", "layers.2.")]


def test_cuts_share_what_they_do_not_touch(tiny):
    small = cut(tiny, "layers.0.ffn", range(8))
    untouched = "model.layers.1.mlp.gate_proj.weight"
    assert small.weights[untouched] is tiny.weights[untouched]
    assert tiny.config.layers[0].ffn_dim != 8


@pytest.mark.parametrize(
    "axis, keep, names",
    [
        ("layers.0.ffn", [0, 0], "distinct"),
        ("layers.0.ffn", [-1], "distinct"),
        ("layers.0.ffn", [10**6], "distinct"),
        ("hidden", [], "at least one"),
        ("layers.9.ffn", [0], "layers.0.ffn"),
        ("layers.0.heads", [0, 1, 2], "every KV group"),
    ],
)
def test_impossible_cuts_say_what_is_accepted(tiny, axis, keep, names):
    with pytest.raises(InputError, match=names):
        cut(tiny, axis, keep)


def test_a_graph_checks_its_weights(tiny):
    weights = dict(tiny.weights)
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(InputError, match="up_proj"):
        Graph(tiny.config, {n: w for n, w in weights.items() if n != name})
    with pytest.raises(InputError, match="unexpected extra"):
        Graph(tiny.config, weights | {"extra": torch.zeros(1)})
    with pytest.raises(InputError, match=r"up_proj.*shape"):
        Graph(tiny.config, weights | {name: weights[name][:-1]})


@pytest.mark.parametrize(
    "change",
    [
        dict(hidden_size=0),
        dict(head_dim=3),
        dict(vocab_size=-1),
        dict(norm_eps=float("nan")),
        dict(biases=frozenset({"x_proj"})),
        dict(hidden_size="64"),
    ],
)
def test_impossible_configs_are_refused(tiny, change):
    with pytest.raises(InputError):
        dataclasses.replace(tiny.config, **change)


def test_impossible_layers_are_refused():
    for widths in ((3, 2, 8), (2, 0, 8), (0, 2, 8), (2, 2, -1)):
        with pytest.raises(InputError):
            Layer(*widths)


@given(configs())
@settings(max_examples=30, deadline=None)
def test_configs_survive_a_round_trip(config):
    assert Config.from_dict(config.to_dict()) == config


def test_unknown_config_fields_are_named(tiny):
    with pytest.raises(InputError, match="surprise"):
        Config.from_dict(tiny.config.to_dict() | {"surprise": 1})
    for rope in (None, 3, []):
        with pytest.raises(InputError, match=r"Config\.rope"):
            Config.from_dict(tiny.config.to_dict() | {"rope": rope})


def test_fingerprint_sees_every_change(tiny):
    name = "model.layers.1.self_attn.k_proj.weight"
    changed = tiny.weights[name].clone()
    changed[0, 0] += 1e-3
    prints = {tiny.fingerprint(), tiny.replace(weights={name: changed}).fingerprint()}
    prints.add(tiny.replace(config=dataclasses.replace(tiny.config, norm_eps=1e-6)).fingerprint())
    assert len(prints) == 3
    assert tiny.fingerprint() == tiny.replace(by="a note").fingerprint()
