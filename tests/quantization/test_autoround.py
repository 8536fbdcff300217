"""Block tuning: gradients, what may move, and that it comes closer to the float model."""

import pytest
import torch

from tinycompress.calibration.walk import walk, walk_blocks
from tinycompress.errors import InputError
from tinycompress.graph.edit import cut
from tinycompress.graph.quant_tensor import QuantSpec, QuantTensor
from tinycompress.quantization.autoround import AutoRound
from tinycompress.quantization.block_tuning import BlockTuning, RoundedLinear, TunableBlock, draws
from tinycompress.quantization.gptq import GPTQ
from tinycompress.quantization.lpbq import is_lpbq
from tinycompress.quantization.rtn import RTN, rtn_quantize


@pytest.fixture
def tokens(nonuniform):
    return torch.randint(nonuniform.config.vocab_size, (8, 32), generator=torch.Generator().manual_seed(0))


def test_the_block_walk_shows_what_the_forward_computes(nonuniform, tokens):
    before, after, inputs = [], [], []
    module = nonuniform.module()
    for block in module.model.layers:
        block.register_forward_pre_hook(lambda m, args: before.append(args[0].clone()))
        block.register_forward_hook(lambda m, args, out: after.append(out.clone()))
    with torch.inference_mode():
        module(tokens[:2])

    def visit(layer, x, y, tables):
        inputs.append(torch.cat(x))
        assert torch.allclose(torch.cat(y), after[layer], atol=1e-5)
        return {}

    walk_blocks(nonuniform, nonuniform, tokens[:2], visit)
    assert len(inputs) == 5 and all(torch.allclose(x, y, atol=1e-5) for x, y in zip(inputs, before))
    with pytest.raises(InputError, match="reference"):
        walk_blocks(nonuniform, cut(nonuniform, "layers", [0, 1]), tokens, visit)


@pytest.mark.parametrize(
    "spec", [QuantSpec(3, 16), QuantSpec(2, 32, False), QuantSpec(4, None), QuantSpec(2, 32, False, float_zero=True)]
)
def test_a_rounded_linear_starts_as_the_packed_one_and_packs_what_it_computes(spec):
    weight = rtn_quantize(torch.randn(12, 64, generator=torch.Generator().manual_seed(0)), spec)
    linear = RoundedLinear(weight, None, torch.float32)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(linear(x), x @ weight.dequantize().T, atol=1e-5)
    with torch.no_grad():
        linear.u += torch.randn(linear.u.shape, generator=torch.Generator().manual_seed(2))
        linear.delta += 0.01
    assert torch.allclose(linear(x), x @ linear.packed().dequantize().T, atol=1e-5)
    assert (linear.packed().ints() != weight.ints()).any() and int(linear.packed().ints().max()) < 2**spec.bits


@pytest.mark.parametrize(
    "spec", [QuantSpec(3, 16), QuantSpec(2, 32, False), QuantSpec(8, None), QuantSpec(2, 32, False, float_zero=True)]
)
def test_integers_start_where_the_float_weight_lies_in_their_step(spec):
    weight = torch.randn(12, 64, generator=torch.Generator().manual_seed(0))
    packed = rtn_quantize(weight, spec)
    linear = RoundedLinear(packed, None, torch.float32, weight)
    assert torch.equal(linear.packed().ints(), packed.ints())
    step = packed.scales[..., None]
    at = (linear.u.detach() - linear.zeros) * step
    inside = ((weight.view_as(at) - at).abs() / step.abs()) < 0.002  # all but those that the grid does not reach
    assert inside.float().mean() > 0.8 and (linear.u - linear.u.round()).abs().mean() > 0.1
    away = RoundedLinear(packed, None, torch.float32, -weight)  # as GPTQ moves some: still the given integers
    assert torch.equal(away.packed().ints(), packed.ints())
    dead = QuantTensor.from_ints(packed.ints(), torch.zeros_like(packed.scales), packed.zeros, spec)
    assert torch.equal(RoundedLinear(dead, None, torch.float32, weight).packed().ints(), packed.ints())


def test_without_a_rate_no_integer_moves(nonuniform, tokens):
    quantized = GPTQ(tokens, QuantSpec(3, 16))(nonuniform)
    tuned = AutoRound(tokens, nonuniform, BlockTuning(steps=30, rate=0))(quantized)
    packed = [n for n, w in tuned.weights.items() if isinstance(w, QuantTensor)]
    assert all(torch.equal(tuned.weights[n].ints(), quantized.weights[n].ints()) for n in packed)
    assert any(not torch.equal(tuned.weights[n].scales, quantized.weights[n].scales) for n in packed)


def test_a_reference_of_other_widths_will_do(nonuniform, tokens):
    """A pruned and quantized graph, tuned towards the model that it was cut from."""
    small = cut(nonuniform, "layers.0.ffn", range(32))
    quantized = RTN(QuantSpec(3, 16))(small)
    tuned = AutoRound(tokens, nonuniform, BlockTuning(steps=30, batch=4))(quantized)
    error = lambda g: (g.module()(tokens) - nonuniform.module()(tokens)).square().mean().item()  # noqa: E731
    assert error(tuned) < error(quantized)


def test_a_stream_in_bfloat16_is_tuned_in_float32(nonuniform, tokens):
    """As on a GPU, where the stream has the graph's dtype: a start near the edge of a step would round to the next
    integer."""
    graph = RTN(QuantSpec(3, 16))(nonuniform)
    block = TunableBlock(graph, nonuniform, 1, torch.zeros(1, dtype=torch.bfloat16), True)
    name = "model.layers.1.mlp.up_proj.weight"
    assert block.rounded[name].u.dtype == torch.float32 and torch.equal(
        block.weights()[name].ints(), graph.weights[name].ints()
    )
    x = torch.randn(1, 8, nonuniform.config.hidden_size).bfloat16()
    assert block.error(x, x, graph.module().tables(0, 8)).dtype == torch.float32


def test_scales_of_htp_keep_their_form(nonuniform, tokens):
    graph = RTN(QuantSpec.parse("w3g16-lpbq"))(nonuniform)
    out = AutoRound(tokens, nonuniform, BlockTuning(steps=8, scale_rate=0.01))(graph)
    packed = {name: w for name, w in out.weights.entries.items() if isinstance(w, QuantTensor)}
    assert all(is_lpbq(w) for w in packed.values())
    assert any(not torch.equal(w.scales, graph.weights.entries[name].scales) for name, w in packed.items())


def test_gradients_are_straight_through_and_exact_in_the_scales():
    weight = rtn_quantize(torch.randn(4, 32, generator=torch.Generator().manual_seed(0)), QuantSpec(3, 16))
    linear = RoundedLinear(weight, None, torch.float64)
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        linear.u[0, 0, 0] = 9.0  # far outside the range
    y = linear(x)
    by = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    to_u, to_delta = torch.autograd.grad((y * by).sum(), (linear.u, linear.delta))
    straight = (by.T @ x).view_as(to_u) * linear.start[..., None]
    straight[0, 0, 0] = 0
    assert torch.allclose(to_u, straight)
    step = torch.zeros_like(linear.delta)
    step[1, 1] = 1e-6
    with torch.no_grad():
        linear.delta += step
        assert torch.allclose(((linear(x) - y) * by).sum() / 1e-6, to_delta[1, 1], rtol=1e-4)


def test_every_window_is_drawn_once_before_any_comes_again():
    picks = draws(7, 3, torch.Generator().manual_seed(0))
    seen = torch.cat([next(picks) for _ in range(14)])
    assert len(seen) == 42 and all(sorted(epoch.tolist()) == list(range(7)) for epoch in seen.split(7))
    assert not torch.equal(seen[:7], seen[7:14]) and len(next(draws(2, 5, torch.Generator()))) == 5


@pytest.mark.parametrize("quantizer", ["rtn", "gptq"])
def test_tuning_comes_closer_to_the_float_model(nonuniform, tokens, quantizer):
    spec = QuantSpec(3, 16)
    quantized = (RTN(spec) if quantizer == "rtn" else GPTQ(tokens, spec))(nonuniform)
    tuned = AutoRound(tokens, nonuniform, BlockTuning(steps=60, batch=4))(quantized)
    reference = nonuniform.module()(tokens)
    error = lambda g: (g.module()(tokens) - reference).square().mean().item()  # noqa: E731
    assert error(tuned) < 0.9 * error(quantized)
    packed = [n for n, w in tuned.weights.items() if isinstance(w, QuantTensor)]
    assert packed == [n for n, w in quantized.weights.items() if isinstance(w, QuantTensor)]
    moved = [(tuned.weights[n].ints().int() - quantized.weights[n].ints().int()).abs().max().item() for n in packed]
    assert max(moved) in (1, 2)
    assert torch.equal(tuned.weights["model.embed_tokens.weight"], nonuniform.weights["model.embed_tokens.weight"])
    again = AutoRound(tokens, nonuniform, BlockTuning(steps=60, batch=4))(quantized)
    assert all(torch.equal(again.weights[n].ints(), tuned.weights[n].ints()) for n in packed)  # a seed decides


def test_the_target_lies_between_the_float_block_and_the_float_graph(nonuniform, tokens, monkeypatch):
    """At 0 a block that is still exact has nothing to gain, whatever those before it lost; at 1 it answers for them."""
    packed = {
        "model.layers.1.mlp.down_proj.weight": rtn_quantize(
            nonuniform.weights["model.layers.1.mlp.down_proj.weight"], QuantSpec(8, 16)
        )
    }
    reference = nonuniform.replace(weights=packed)
    coarse = {n: w for n, w in RTN(QuantSpec(2, 16))(nonuniform).weights.items() if n.startswith("model.layers.0")}
    graph = reference.replace(weights=coarse)
    seen = {}

    def tune(block, inputs, targets, tables, *options):
        seen[block.at] = (
            torch.cat([block.error(x, y, tables).flatten() for x, y in zip(inputs.split(2), targets.split(2))])
            .mean()
            .item()
        )

    monkeypatch.setattr("tinycompress.quantization.block_tuning.tune", tune)
    errors = {}
    for alpha in (0.0, 0.5, 1.0):
        AutoRound(tokens, reference, BlockTuning(propagate=alpha))(graph)
        errors[alpha] = seen["model.layers.1"]
    assert errors[0.0] < 1e-9 < errors[0.5] < errors[1.0]
    assert errors[0.5] == pytest.approx(errors[1.0] / 4, rel=0.3)  # half the distance


def test_broken_activations_are_named(nonuniform, tokens):
    name = "model.layers.1.mlp.up_proj.weight"
    broken = nonuniform.replace(weights={name: torch.full_like(nonuniform.weights[name], 1e38)})
    with pytest.raises(InputError, match=r"output of model\.layers\.1: found NaN or infinite"):
        AutoRound(tokens[:2], broken, BlockTuning(steps=1))(RTN(QuantSpec(4, 16))(nonuniform))


def test_norms_stay_on_request_and_options_are_checked(nonuniform, tokens):
    quantized = RTN(QuantSpec(3, 16))(nonuniform)
    tuned = AutoRound(tokens, nonuniform, BlockTuning(steps=5, norms=False))(quantized)
    norms = [n for n in tuned.weights if "norm" in n]
    assert all(torch.equal(tuned.weights[n], nonuniform.weights[n]) for n in norms)
    with pytest.raises(InputError, match="run RTN or GPTQ first"):
        AutoRound(tokens, nonuniform)(nonuniform)
    for options, name in (
        ({"steps": 0}, "steps"),
        ({"rate": 2.0}, "rate"),
        ({"scale_rate": 0.5}, "scale_rate"),
        ({"propagate": 1.5}, "propagate"),
    ):
        with pytest.raises(InputError, match=name):
            BlockTuning(**options)


def test_a_finisher_sees_the_block_as_it_was_entered_and_its_parameters_are_run(nonuniform, tokens):
    """What the finisher returns decides what the next block gets; nothing returned, the walk is as without it."""
    plain, changed = [], []

    def visit(seen):
        def inputs(feed, found):
            seen.append(torch.cat(list(found)))

        return inputs

    def finish(graph, layer, before, targets, tables):
        block = graph.module().model.layers[layer]
        assert torch.allclose(torch.cat([block(h.clone(), tables) for h in before]), torch.cat(targets), atol=1e-5) == (
            layer < 2
        )
        name = "model.layers.1.mlp.down_proj.weight"
        return {name: graph.weights[name] * 2} if layer == 1 else {}

    with pytest.raises(InputError, match="reference"):
        walk(nonuniform, tokens, visit([]), finish=finish)
    walk(nonuniform, tokens, visit(plain))
    out = walk(nonuniform, tokens, visit(changed), reference=True, finish=finish)
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(out.weights[name], nonuniform.weights[name] * 2)
    expected = []
    walk(out, tokens, visit(expected))
    same = [torch.allclose(x, y, atol=1e-5) for x, y in zip(changed, expected)]
    first = next(i for i, (x, y) in enumerate(zip(plain, changed)) if not torch.allclose(x, y, atol=1e-5))
    assert all(same) and 0 < first < len(plain) - 1


def test_tuning_inside_the_walk_comes_closer_than_no_tuning(nonuniform, tokens):
    spec, tuning = QuantSpec(3, 16), BlockTuning(steps=60, batch=4, propagate=1.0)
    reference = nonuniform.module()(tokens)
    error = lambda g: (g.module()(tokens) - reference).square().mean().item()  # noqa: E731
    plain = GPTQ(tokens, spec, propagate=0.5)(nonuniform)
    tuned = GPTQ(tokens, spec, propagate=0.5, tuning=tuning)(nonuniform)
    assert error(tuned) < 0.9 * error(plain)
    assert {n for n, w in tuned.weights.items() if isinstance(w, QuantTensor)} == {
        n for n, w in plain.weights.items() if isinstance(w, QuantTensor)
    }
    assert any(not torch.equal(tuned.weights[n], nonuniform.weights[n]) for n in tuned.weights if "norm" in n)
    assert "BlockTuning(steps=60" in tuned.history[-1]
