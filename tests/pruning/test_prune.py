"""The pass `Prune` on whole small graphs: its budgets are met, and what it leaves computes what it should."""

import dataclasses
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pruning_cases import BOTH, MIXED, ids, problem, seen_by, small

from tinycompress.errors import InputError
from tinycompress.graph.config import Layer
from tinycompress.graph.graph import Graph
from tinycompress.graph.quant_tensor import QuantSpec
from tinycompress.graph.topology import axes
from tinycompress.pruning.axis_statistics import collect
from tinycompress.pruning.cutting import with_biases
from tinycompress.pruning.importance import CRITERIA
from tinycompress.pruning.prune import Prune
from tinycompress.pruning.refit import bias_for, keep_best
from tinycompress.quantization.gptq import GPTQ
from tinycompress.quantization.rtn import RTN


@pytest.mark.parametrize("allocation", ["optimal", "global", "uniform"])
@pytest.mark.parametrize("criterion", ["obs", "wanda_sp", "taylor"])
def test_targets_are_met_on_a_nonuniform_graph(allocation, criterion):
    graph = small()
    out = Prune(ids(), "params=0.7", criterion=criterion, allocation=allocation, multiple_of=16)(graph)
    assert 0.6 < out.config.n_body_params / graph.config.n_body_params <= 0.7
    for old, new in zip(graph.config.layers, out.config.layers):
        assert new.n_kv_heads == old.n_kv_heads and new.ffn_dim % 16 == 0
    assert torch.isfinite(out.module()(ids())).all()
    assert len(out.history) == 1 and out.history[0].startswith("Prune(target='params=0.7'")


def output_error(graph, out, tokens):
    return (out.module()(tokens) - graph.module()(tokens)).square().mean().item()


def test_compensation_and_the_reference_come_closer():
    graph = small()
    tokens = ids(12)
    error = {
        r: output_error(
            graph, Prune(tokens, "params=0.7", refit=r, multiple_of=16, allocation="uniform")(graph), tokens
        )
        for r in (False, True, "reference")
    }
    assert error["reference"] < error[True] < 0.9 * error[False]


@pytest.mark.parametrize("refit", [False, True, "reference"])
def test_a_pruned_graph_is_a_masked_graph(refit):
    """float64: the model with the same weights at full width, zero where the cut was, computes the same logits."""
    graph = small()
    tokens = ids()
    graph = graph.dense(torch.float64)
    step = Prune(tokens, "params=0.6", multiple_of=16, sublayers=True, refit=refit)
    chosen = step.choose(graph)
    out = step.cut_to(graph, chosen)
    assert out.config.layers == chosen.pruned.layers != graph.config.layers
    rebuilt = dict(graph.weights)
    for name, weight in out.weights.items():
        if weight.shape == graph.weights[name].shape:
            rebuilt[name] = weight
    for i, (old, new) in enumerate(zip(graph.config.layers, out.config.layers)):
        for kind, changed in (("ffn", new.ffn_dim != old.ffn_dim), ("heads", new.n_heads != old.n_heads)):
            if not changed:
                continue
            axis = axes(graph.config)[f"layers.{i}.{kind}"]
            reader = next(n for n, (d, _) in axis.cuts.items() if d == 1)
            if reader not in out.weights:  # the sublayer went
                rebuilt[reader] = torch.zeros_like(graph.weights[reader])
                continue
            rows = next(n for n, (d, _) in axis.cuts.items() if d == 0)  # rows that stayed are found by their values
            kept = (graph.weights[rows][:, None, :] == out.weights[rows][None]).all(-1).any(1)
            assert kept.sum() == out.weights[rows].shape[0]
            rebuilt[reader] = torch.zeros_like(graph.weights[reader])
            rebuilt[reader][:, kept] = out.weights[reader]
    whole = Graph(graph.config, rebuilt)
    assert (whole.module()(tokens) - out.module()(tokens)).abs().max() < 1e-8


def test_asking_for_everything_changes_nothing():
    graph = small()
    for step in (
        Prune(ids(), "params=1.0", multiple_of=16),
        Prune(ids(), keep={"ffn": 1.0, "heads": 1.0, "layers": 5}, multiple_of=16),
    ):
        out = step(graph)
        assert out.config == graph.config and all(torch.equal(out.weights[n], w) for n, w in graph.weights.items())


def test_counts_shares_layers_and_hidden_width():
    graph = small(layers=(Layer(4, 2, 96),) * 4)
    out = Prune(ids(), keep={"ffn": 64, "heads": 2, "layers": 3, "hidden": 48}, multiple_of=16)(graph)
    assert out.config.layers == (Layer(2, 2, 64),) * 3 and out.config.hidden_size == 48
    out = Prune(ids(), keep={"ffn": 0.5}, multiple_of=16)(graph)
    assert sum(layer.ffn_dim for layer in out.config.layers) == 2 * 96
    assert Prune(ids(), keep={"kv_heads": 1}, multiple_of=16)(graph).config.layers == (Layer(2, 1, 96),) * 4


def test_widths_suit_the_quantizer():
    """172 channels are no multiple of 32: the width comes down to one, heads to even numbers of 16 wide ones."""
    graph = small(layers=(Layer(6, 2, 172),) * 2)
    out = Prune(ids(), "params=0.9", multiple_of=32)(graph)
    assert all(layer.ffn_dim % 32 == 0 and layer.n_heads * 16 % 32 == 0 for layer in out.config.layers)
    planned = Prune(ids(), "params=0.9", multiple_of=32).plan(graph.config)
    assert planned.n_body_params <= 0.9 * graph.config.n_body_params
    GPTQ(ids(), QuantSpec(4, 32))(out)


def test_floors_hold():
    graph = small(layers=(Layer(4, 2, 96),) * 4)
    out = Prune(ids(), "params=0.6", axes=BOTH, multiple_of=16, floors={"ffn": 0.5, "heads": 2}, sublayers=True)(graph)
    assert all(layer.ffn_dim >= 48 and layer.n_heads >= 2 for layer in out.config.layers)


def test_sublayers_go_where_they_are_worth_least():
    graph = small(layers=(Layer(4, 2, 96),) * 4)
    useless = {
        n: graph.weights[n] * 1e-4
        for n in graph.weights
        if n in ("model.layers.2.self_attn.o_proj.weight", "model.layers.1.mlp.down_proj.weight")
    }
    out = Prune(ids(), "params=0.8", axes=BOTH, multiple_of=96, sublayers=True)(graph.replace(weights=useless))
    assert out.config.layers[2].n_heads == 0 and out.config.layers[1].ffn_dim == 0


def test_anybodys_criterion():
    graph = small(layers=(Layer(4, 2, 96),) * 2)
    first = lambda s: torch.arange(s.axis.size, 0, -1).double()  # noqa: E731
    out = Prune(ids(), keep={"ffn": 32}, criterion=first, refit=False, multiple_of=16)(graph)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(out.weights[name], graph.weights[name][:32])
    with pytest.raises(InputError, match="96 finite ones"):
        Prune(ids(), keep={"ffn": 32}, criterion=lambda s: torch.zeros(3), multiple_of=16)(graph)


def test_the_bias_keeps_the_mean_output():
    graph = small(layers=(Layer(4, 2, 96),))
    tokens = ids()
    out = Prune(tokens, keep={"ffn": 48}, criterion="flap", refit="bias", multiple_of=16)(graph)
    outputs = [g.module().model.layers[0].mlp for g in (graph, out)]
    x = torch.cat(list(seen_by(graph, tokens, "model.layers.0.mlp.up_proj"))).float()
    a, b = (mlp(x).mean(0) for mlp in outputs)
    assert torch.allclose(a, b, atol=1e-4) and out.config.biases == {"o_proj", "down_proj"}
    W, x = problem()
    assert torch.allclose(bias_for(W, x.mean(0), torch.tensor([1, 3])), (x[:, [1, 3]] @ W[:, [1, 3]].T).mean(0))
    plain = small()
    assert torch.equal(with_biases(plain).module()(tokens), plain.module()(tokens))


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.floats(0.4, 0.9), st.booleans())
def test_heads_stay_equal_in_every_group(kv, group, share, biased):
    biases = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "down_proj"}) if biased else frozenset()
    graph = small(layers=(Layer(kv * group, kv, 32), Layer(kv, kv, 48)), biases=biases)
    out = Prune(ids(2, 16), f"params={share:.2f}", axes=BOTH, multiple_of=8, sublayers=True)(graph)
    for old, new in zip(graph.config.layers, out.config.layers):
        assert new.n_kv_heads in (0, old.n_kv_heads)
    assert torch.isfinite(out.module()(ids(2, 16))).all()


def test_uneven_kv_heads_are_warned_of():
    graph = small(layers=(Layer(4, 4, 96), Layer(4, 2, 32)))
    step = Prune(ids(), "params=0.6", axes=("ffn", "kv_heads"), uneven_kv=True, multiple_of=16)
    with pytest.warns(UserWarning, match="ort profile loses Optimum"):
        out = step(graph)
    assert torch.isfinite(out.module()(ids())).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Prune(ids(), keep={"kv_heads": 1}, multiple_of=16)(small(layers=(Layer(4, 2, 32),) * 2))


def test_other_graphs_and_packed_ones_are_refused():
    graph = small()
    step = Prune(ids(), "params=0.8", multiple_of=16)
    other = small(layers=MIXED[:2])
    with pytest.raises(InputError, match="another graph"):
        step.cut_to(other, step.choose(graph))
    with pytest.raises(InputError, match="quantize last"):
        step(RTN(QuantSpec(4, 16))(graph))
    with pytest.raises(InputError, match="gradients"):
        CRITERIA["taylor"](collect(graph, ids(), ["layers.0.ffn"])["layers.0.ffn"])
    with pytest.raises(InputError, match="sublayers that are there"):
        collect(graph, ids(), ["layers.3.ffn"])
    with pytest.raises(InputError, match="multiple of 2"):
        keep_best(torch.zeros(4), 3, groups=2)


def test_the_repr_names_the_settings_not_the_tokens():
    step = Prune(ids(), "params=0.8")
    assert "tensor" not in repr(step) and step == dataclasses.replace(step, tokens=ids() + 1)


def test_plans_are_what_the_pass_leaves_where_nothing_is_shared_out():
    graph = small(layers=(Layer(4, 2, 96),) * 4)
    for step in (
        Prune(ids(), keep={"ffn": 64, "heads": 2, "layers": 3, "hidden": 48}, multiple_of=16),
        Prune(ids(), "params=0.7", allocation="uniform", multiple_of=16),
        Prune(ids(), keep={"kv_heads": 1}, multiple_of=16),
    ):
        assert step.plan(graph.config) == step(graph).config
    half = Prune(ids(), "bytes=350kb", multiple_of=16)
    assert half.plan(graph.config, itemsize=2).n_params > half.plan(graph.config).n_params


def test_the_seed_draws_the_labels_of_the_fisher_matrices():
    graph = small(layers=(Layer(4, 2, 96),) * 2)
    tokens = ids()
    losses = [Prune(tokens, "params=0.7", seed=seed, multiple_of=16).choose(graph).losses for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_tokens_come_as_batches_and_nothing_is_printed(capsys):
    graph = small(layers=(Layer(4, 2, 96),) * 2)
    step = Prune(ids().split(2), "params=0.7", multiple_of=16, progress=False, device="cpu")
    whole = Prune(ids(), "params=0.7", multiple_of=16)
    assert step(graph).fingerprint() == whole(graph).fingerprint()
    assert not capsys.readouterr().err and repr(step) == repr(whole)
