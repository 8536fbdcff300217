"""Bits by sensitivity: the knapsack against brute force, the sweep against autograd over the whole model, budgets,
specs by linear."""

import itertools

import pytest
import torch
from conftest import random_graph
from hypothesis import given, settings
from hypothesis import strategies as st

from tinycompress.checkpoints.checkpoint import load, save
from tinycompress.errors import InputError
from tinycompress.graph.config import LINEARS, Config, Layer
from tinycompress.graph.quant_tensor import QuantSpec, QuantTensor
from tinycompress.knapsack import knapsack
from tinycompress.quantization.awq import AWQ
from tinycompress.quantization.gptq import GPTQ, gptq_quantize
from tinycompress.quantization.hqq import HQQ
from tinycompress.quantization.linear_specs import targets
from tinycompress.quantization.mixed_bits import (
    MixedBits,
    choose,
    linear_shapes,
    packed_bytes,
    quadratic_cost,
    sensitivity,
    weighted_rounding,
)
from tinycompress.quantization.rtn import RTN

CHOICES = ("w2g16", "w3g16", "w4g16", "w8g16")
SPECS = [QuantSpec.parse(text) for text in CHOICES]


@pytest.fixture
def tokens(nonuniform):
    return torch.randint(nonuniform.config.vocab_size, (4, 32), generator=torch.Generator().manual_seed(0))


def divergence(reference, graph, tokens):
    p, q = (g.module()(tokens).double().log_softmax(-1) for g in (reference, graph))
    return (p.exp() * (p - q)).sum(-1).mean().item()


# specs by linear


def some_specs(graph):
    """Another grid for every other linear, none for some."""
    names = list(targets(graph, QuantSpec(4, 16)))
    return {name: SPECS[i % 3] for i, name in enumerate(names) if i % 5 != 3}


@pytest.mark.parametrize(
    "make",
    [
        lambda t, s: RTN(s),
        lambda t, s: HQQ(s),
        GPTQ,
        AWQ,
        lambda t, s: GPTQ(t, s, order="gar", propagate=0.5, refine=1),
    ],
)
def test_each_linear_has_its_own_grid(nonuniform, tokens, make, tmp_path):
    specs = some_specs(nonuniform)
    out = make(tokens, specs)(nonuniform)
    packed = {n.removesuffix(".weight"): w.grid for n, w in out.weights.items() if isinstance(w, QuantTensor)}
    assert packed == {name: spec.grid for name, spec in specs.items()}
    assert len(out.history[0]) < 200 and "× w3g16" in out.history[0]
    save(out, tmp_path / "m")
    assert load(tmp_path / "m").fingerprint() == out.fingerprint()


@pytest.mark.parametrize("make", [GPTQ, AWQ])
def test_the_same_grid_for_all_is_the_same_graph(tiny, tokens, make):
    """Readers that are joined because their specs agree, and one spec for all, are one thing."""
    spec = QuantSpec(3, 16)
    assert make(tokens, targets(tiny, spec))(tiny).fingerprint() == make(tokens, spec)(tiny).fingerprint()


def test_readers_are_rounded_as_if_each_were_alone(tiny, tokens):
    """GPTQ rounds rows independently: another grid for k and v does not change q."""
    names = list(targets(tiny, QuantSpec(3, 16)))[:3]
    mixed = GPTQ(tokens, dict(zip(names, SPECS)))(tiny)
    for name, spec in zip(names, SPECS):
        alone = GPTQ(tokens, {name: spec})(tiny)
        assert torch.equal(alone.linear(name).ints(), mixed.linear(name).ints())


def test_awq_without_the_gqa_fold_leaves_the_values_alone(tiny, tokens):
    with_fold, without = (AWQ(tokens, QuantSpec(3, 16), quantize=False, gqa=gqa)(tiny) for gqa in (True, False))
    name = "model.layers.0.self_attn.o_proj.weight"
    assert torch.equal(without.weights[name], tiny.weights[name]) and not torch.equal(
        with_fold.weights[name], tiny.weights[name]
    )
    assert torch.allclose(without.module()(tokens), tiny.module()(tokens), atol=1e-4)


def test_bad_specs_are_named(tiny, tokens):
    name = "model.layers.0.mlp.up_proj"
    for specs, message in (
        ({"up_proj": SPECS[0]}, "no linear of this graph"),
        ({name: QuantSpec(4, 48)}, "up_proj.*48"),
        ({name: 4}, "QuantSpec"),
    ):
        with pytest.raises(InputError, match=message):
            RTN(specs)(tiny)
    with pytest.raises(InputError, match="lm_head"):
        GPTQ(tokens, {name: SPECS[0]}, head=True)(tiny)
    assert isinstance(RTN({"lm_head": QuantSpec(8, 16)})(tiny).weights["lm_head.weight"], QuantTensor)


# the choice


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.integers(1, 30), st.integers(0, 6)), min_size=1, max_size=3), min_size=1, max_size=5
    ),
    st.integers(0, 80),
)
def test_the_knapsack_finds_what_brute_force_finds(items, limit):
    prices, losses = [[p for p, _ in item] for item in items], [[float(x) for _, x in item] for item in items]
    fits = [
        picks
        for picks in itertools.product(*map(range, map(len, items)))
        if sum(p[i] for p, i in zip(prices, picks)) <= limit
    ]
    if not fits:
        with pytest.raises(InputError, match=f"at least {sum(map(min, prices))}"):
            knapsack(prices, losses, limit)
        return
    picked = knapsack(prices, losses, limit)
    assert sum(p[i] for p, i in zip(prices, picked)) <= limit
    assert sum(x[i] for x, i in zip(losses, picked)) == min(sum(x[i] for x, i in zip(losses, picks)) for picks in fits)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([2, 3, 4, 8]),
    st.sampled_from([None, 8, 32]),
    st.sampled_from(["none", "int", "float"]),
    st.integers(1, 9),
)
def test_packed_bytes_are_what_a_packed_weight_takes(bits, group, zeros, rows):
    spec, weight = (
        QuantSpec(bits, group, zeros == "none", float_zero=zeros == "float" and bits < 8),
        torch.randn(rows, 64),
    )
    assert packed_bytes((rows, 64), spec) == weighted_rounding(weight, torch.eye(64), spec).nbytes


def test_a_mean_of_whole_bits_is_met_to_the_byte(nonuniform):
    shapes = linear_shapes(nonuniform, SPECS)
    step = MixedBits(
        torch.zeros(1, 8, dtype=torch.long), RTN, bits=5.0, choices=CHOICES
    )  # w3g16: 3 bits, and 32 / 16 of its scales
    assert step.limit(shapes, SPECS) == sum(packed_bytes(shape, SPECS[1]) for shape in shapes.values())
    equal = {name: [3.0, 2.0, 1.9, 1.8] for name in shapes}  # the last bits hardly help: all at 3
    assert set(choose(equal, shapes, SPECS, step.limit(shapes, SPECS)).values()) == {SPECS[1]}


def test_budgets_that_cannot_be_met_name_the_nearest(nonuniform, tokens):
    shapes = linear_shapes(nonuniform, SPECS)
    least = sum(packed_bytes(shape, SPECS[0]) for shape in shapes.values())
    with pytest.raises(InputError, match="bits=4 or more"):
        MixedBits(tokens, RTN, bits=3.9, choices=CHOICES)(nonuniform)
    with pytest.raises(InputError, match=f"bytes={least} or more"):
        MixedBits(tokens, RTN, bytes=least - 1, choices=CHOICES)(nonuniform)
    assert {
        w.grid
        for w in MixedBits(tokens, RTN, bytes=least, choices=CHOICES)(nonuniform).weights.values()
        if isinstance(w, QuantTensor)
    } == {SPECS[0].grid}
    for options, message in (
        ({}, "one of the two"),
        ({"bits": 4.0, "bytes": 9}, "one of the two"),
        ({"bits": -1.0}, "positive"),
        ({"bits": 4, "choices": ()}, "w4g64"),
    ):
        with pytest.raises(InputError, match=message):
            MixedBits(tokens, RTN, **options)
    with pytest.raises(InputError, match="group_size"):
        MixedBits(tokens, RTN, bits=4.5, choices=("w4g48",))(nonuniform)


# the measurement


def biased(tied):
    layers = (Layer(4, 2, 96), Layer(0, 0, 32), Layer(2, 1, 0), Layer(0, 0, 0))
    return random_graph(
        Config(
            vocab_size=96,
            hidden_size=32,
            head_dim=8,
            layers=layers,
            max_position=64,
            tie_embeddings=tied,
            biases=frozenset(LINEARS),
        )
    )


@pytest.mark.parametrize("tied", [True, False])
def test_the_sweep_equals_autograd_over_the_whole_model(tied):
    """The same labels, one backward through everything, and every linear's gradients by hooks."""
    graph = biased(tied)
    graph = graph.replace(weights={n: w.double() for n, w in graph.weights.items()})
    tokens = torch.randint(96, (3, 16), generator=torch.Generator().manual_seed(0))
    module, seen = graph.module(), {}
    names = list(targets(graph, SPECS[0]))
    for name in names:
        module.get_submodule(name).register_forward_hook(
            lambda m, args, out, name=name: seen.__setitem__(name, (args[0], out))
        )
    embedded = module.model.embed_tokens(tokens).requires_grad_()
    x = embedded
    for block in module.model.layers:
        x = block(x, module.tables(0, 16))
    logits = module.lm_head(module.model.norm(x)).flatten(0, 1).float()
    labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=torch.Generator().manual_seed(7))[:, 0]
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    grads = dict(zip(names, torch.autograd.grad(loss, [seen[name][1] for name in names])))
    ours = sensitivity(graph, tokens, SPECS[:2], seed=7)
    assert list(ours) == names
    for name in names:
        inputs, weight = seen[name][0].detach(), graph.linear(name).float()
        hessian = torch.einsum("btk,btl->kl", inputs, inputs)
        for spec, cost in zip(SPECS, ours[name]):
            delta = weighted_rounding(weight, hessian, spec).dequantize() - weight
            naive = (
                sum((grads[name][i, t] @ delta.double() @ inputs[i, t]) ** 2 for i in range(3) for t in range(16))
                / 2
                / 48
            )
            assert cost == pytest.approx(naive.item(), rel=1e-4)


def test_costs_are_about_the_divergence_that_each_linear_causes(nonuniform, tokens):
    """8 bits are a small change, where the second order is all there is: within a factor of two on the whole, and in
    order."""
    spec = QuantSpec(8, 16)
    costs = sensitivity(nonuniform, tokens, [spec])
    hessians = {}
    from tinycompress.calibration.gram import gram
    from tinycompress.calibration.walk import walk

    walk(nonuniform, tokens, lambda feed, inputs: hessians.update(dict.fromkeys(feed.readers, gram(feed, inputs))))
    caused = []
    for name in costs:
        one = nonuniform.replace(
            weights={
                f"{name}.weight": weighted_rounding(nonuniform.linear(name).float(), hessians[name], spec).dequantize()
            }
        )
        caused.append(divergence(nonuniform, one, tokens))
    ours, caused = torch.tensor([c[0] for c in costs.values()]).log(), torch.tensor(caused).log()
    assert (ours - caused).mean().abs() < 0.7
    assert torch.corrcoef(torch.stack((ours, caused)))[0, 1] > 0.8


def test_more_bits_cost_less(nonuniform, tokens):
    costs = sensitivity(nonuniform, tokens, SPECS)
    assert all(sorted(c, reverse=True) == c for c in costs.values())
    guided = sensitivity(nonuniform, tokens, SPECS[:2], gptq_quantize)
    assert sum(c[0] for c in guided.values()) != sum(c[0] for c in costs.values())


def test_mixed_bits_beat_one_grid_for_all_of_the_same_size(nonuniform, tokens):
    """A graph whose layers matter unequally: the first attention sublayer's writes are small, so it can be coarse."""
    quiet = {
        n: w * 0.05
        for n, w in nonuniform.weights.items()
        if n.endswith(("layers.0.self_attn.o_proj.weight", "layers.4.mlp.down_proj.weight"))
    }
    graph = nonuniform.replace(weights=quiet)
    mixed = MixedBits(tokens, lambda specs: GPTQ(tokens, specs), bits=5.0, choices=CHOICES)(graph)
    uniform = GPTQ(tokens, QuantSpec(3, 16))(graph)
    assert mixed.nbytes <= uniform.nbytes
    assert divergence(graph, mixed, tokens) < 0.9 * divergence(graph, uniform, tokens)
    assert mixed.history[0].startswith("GPTQ(spec={") and mixed.history[1].startswith("MixedBits(bytes=None, bits=5.0")


def test_broken_activations_are_named(nonuniform, tokens):
    name = "model.layers.0.self_attn.v_proj.weight"
    broken = nonuniform.replace(weights={name: torch.full_like(nonuniform.weights[name], 1e38)})
    with pytest.raises(InputError, match=r"layers\.0.*NaN or infinite"):
        sensitivity(broken, tokens, SPECS)
    with pytest.raises(InputError, match="integer ids"):
        sensitivity(nonuniform, tokens.float(), SPECS)


def test_quadratic_cost_is_the_sum_over_positions():
    delta, x, g = torch.randn(3, 4), torch.randn(2, 5, 4), torch.randn(2, 5, 3)
    naive = sum(0.5 * (g[i, t] @ delta @ x[i, t]) ** 2 for i in range(2) for t in range(5))
    assert quadratic_cost(delta, x, g) == pytest.approx(naive.item(), rel=1e-4)
