"""Students that learn low-rank updates, on a grid, by their scales, or behind a norm."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from distill_cases import FAST, kl, perturbed, windows

from tinycompress.checkpoints import checkpoint
from tinycompress.distillation.distill import Distill
from tinycompress.distillation.lora import LoRA, merge
from tinycompress.distillation.training import Training
from tinycompress.errors import InputError
from tinycompress.graph.config import shapes
from tinycompress.graph.graph import Graph
from tinycompress.graph.quant_tensor import QuantSpec, QuantTensor
from tinycompress.quantization.embedding import QuantizeEmbedding
from tinycompress.quantization.fake_quant import PackedLinear, fake_quantize
from tinycompress.quantization.grid_search import find_grid, round_to_grid
from tinycompress.quantization.lpbq import is_lpbq
from tinycompress.quantization.rtn import RTN


def test_lora_merges_exactly_and_freezes_the_rest(nonuniform):
    graph = Graph(nonuniform.config, {n: w.double() for n, w in nonuniform.weights.items()})
    student, tokens, lora = perturbed(graph), windows(graph), LoRA(4, 8.0, ("q_proj", "up_proj"))
    pass_, modules = Distill(tokens, graph, FAST, lora=lora), []
    import tinycompress.distillation.distill as where

    plain = where.train
    try:
        where.train = lambda network, *args, **kwargs: (plain(network, *args, **kwargs), modules.append(network))
        out = pass_(student)
    finally:
        where.train = plain
    changed = {n for n in out.weights if not torch.equal(out.weights[n], student.weights[n])}
    assert changed == {n for n in out.weights if n.endswith(("q_proj.weight", "up_proj.weight"))}
    assert all(out.weights[n] is student.weights[n] for n in set(out.weights) - changed)
    ids = windows(graph, 2, seed=3)
    assert (
        (modules[0].transformer(ids) - out.module()(ids)).abs().max()
        < 1e-8
        < (out.module()(ids) - student.module()(ids)).abs().max()
    )


def test_lora_is_the_low_rank_sum():
    w, a, b = torch.randn(5, 7), torch.randn(2, 7), torch.randn(5, 2)
    torch.testing.assert_close(merge(w, a, b, 0.5), w + 0.5 * b @ a)


@pytest.mark.parametrize("grid", ["refind", "learn"])
@pytest.mark.parametrize("text", ["w3g16", "w4", "w2g16-asym"])
def test_the_packed_result_is_what_training_saw(nonuniform, monkeypatch, text, grid):
    import tinycompress.distillation.distill as where

    seen, plain = [], where.train
    monkeypatch.setattr(
        where, "train", lambda network, *args, **kwargs: (plain(network, *args, **kwargs), seen.append(network))
    )
    spec = QuantSpec.parse(text)
    out = Distill(windows(nonuniform), nonuniform, FAST, fake_quant=spec, grid=grid)(nonuniform)
    packed = {n: w for n, w in out.weights.items() if isinstance(w, QuantTensor)}
    assert len(packed) == sum(n.endswith("proj.weight") for n in shapes(nonuniform.config)) and {
        w.grid for w in packed.values()
    } == {spec.grid}
    for name, weight in packed.items():
        module = seen[0].transformer.get_submodule(name.removesuffix(".weight"))
        scales, zeros = module.grid(module.weight)
        assert torch.equal(fake_quantize(module.weight, scales, zeros, spec), weight.dequantize())
    ids = windows(nonuniform, 2, seed=4)
    with torch.no_grad():
        assert torch.equal(seen[0].transformer(ids), out.dense().module()(ids))
    if grid == "refind":  # what RTN makes of the trained float weights
        trained = Graph(
            nonuniform.config, {n: seen[0].get_parameter(f"transformer.{n}").detach() for n in nonuniform.weights}
        )
        rounded = RTN(spec)(trained)
        assert all(
            torch.equal(rounded.weights[n].packed, w.packed) and torch.equal(rounded.weights[n].scales, w.scales)
            for n, w in packed.items()
        )


def test_linears_have_grids_of_their_own(nonuniform):
    name = "model.layers.0.mlp.up_proj"
    specs = {name: QuantSpec(3, 16), "model.layers.3.self_attn.q_proj": QuantSpec(8, None)}
    out = Distill(windows(nonuniform), nonuniform, FAST, fake_quant=specs)(nonuniform)
    assert {n: w.grid for n, w in out.weights.items() if isinstance(w, QuantTensor)} == {
        f"{n}.weight": spec.grid for n, spec in specs.items()
    }
    with pytest.raises(InputError, match="a grid for lm_head"):
        Distill(windows(nonuniform), nonuniform, FAST, fake_quant={"lm_head": QuantSpec(4, 16)})(nonuniform)
    with pytest.raises(InputError, match="'learn' with lpbq"):
        Distill(windows(nonuniform), nonuniform, FAST, fake_quant=QuantSpec(4, 16, search="lpbq"), grid="learn")(
            nonuniform
        )


def test_quantization_aware_training_beats_rounding(nonuniform):
    tokens, spec = windows(nonuniform, 24), QuantSpec.parse("w2g16")
    rounded = RTN(spec)(nonuniform)
    for grid in ("refind", "learn"):
        out = Distill(tokens, nonuniform, Training(steps=25, lr=3e-3, batch=8), fake_quant=spec, grid=grid)(nonuniform)
        assert kl(nonuniform, out, tokens) < 0.8 * kl(nonuniform, rounded, tokens)


def test_gradients_of_fake_quantization():
    """Straight through inside the range, none outside; the scale's by the naive formula."""
    spec, w = QuantSpec(3, 8), torch.randn(4, 16)
    scales, _ = find_grid("w", w, spec)
    scales = (scales * 0.6).requires_grad_()  # so that some are clamped
    weight, upstream = w.clone().requires_grad_(), torch.randn(4, 16)
    fake_quantize(weight, scales, None, spec).backward(upstream)
    q = round_to_grid(w, scales.detach(), None, spec).float() - 4
    u = w / scales.detach().repeat_interleave(8, 1)
    inside = (u.round() >= -4) & (u.round() <= 3)
    assert 0 < inside.sum() < inside.numel()
    assert torch.equal(weight.grad, upstream * inside)
    torch.testing.assert_close(scales.grad, (upstream * (q - u * inside)).reshape(4, 2, 8).sum(-1))


@pytest.mark.parametrize("text", ["w3g16", "w4g16-asym", "w4", "w2g16-floatzero", "w4g16-lpbq"])
def test_scales_learn_and_integers_stay(nonuniform, monkeypatch, tmp_path, text):
    import tinycompress.distillation.distill as where

    seen, plain = [], where.train
    monkeypatch.setattr(
        where, "train", lambda network, *args, **kwargs: (plain(network, *args, **kwargs), seen.append(network))
    )
    spec, tokens = QuantSpec.parse(text), windows(nonuniform, 24)
    rounded = RTN(spec)(nonuniform)
    out = Distill(tokens, nonuniform, Training(steps=15, lr=5e-3, batch=8), scales=True)(rounded)
    assert kl(nonuniform, out, tokens) < 0.9 * kl(nonuniform, rounded, tokens)
    for name, before in rounded.weights.items():
        after = out.weights[name]
        if isinstance(before, QuantTensor):
            assert (
                torch.equal(after.packed, before.packed)
                and after.grid == spec.grid
                and not torch.equal(after.scales, before.scales)
            )
            assert (after.zeros is None) == (before.zeros is None) and (
                before.zeros is None or torch.equal(after.zeros, before.zeros)
            )
            assert text != "w4g16-lpbq" or is_lpbq(after)
        else:
            assert torch.equal(before, after) == (before.dim() > 1)
    ids = windows(nonuniform, 2, seed=4)
    with torch.no_grad():
        assert torch.equal(seen[0].transformer(ids), out.dense().module()(ids))
    checkpoint.save(out, tmp_path / "out")
    assert torch.equal(checkpoint.load(tmp_path / "out").dense().module()(ids), out.dense().module()(ids))


def test_a_packed_table_stays_while_scales_learn(tiny):
    rounded = QuantizeEmbedding(QuantSpec(8, 16))(RTN(QuantSpec(3, 16))(tiny))
    out = Distill(windows(tiny), tiny, FAST, scales=True)(rounded)
    assert out.weights["model.embed_tokens.weight"] is rounded.weights["model.embed_tokens.weight"]


@pytest.mark.parametrize("text", ["w3g8", "w3g8-asym", "w2g8-floatzero"])
def test_gradients_of_the_scales_of_packed_weights(text):
    spec, w, x = QuantSpec.parse(text), torch.randn(4, 16, dtype=torch.float64), torch.randn(5, 16, dtype=torch.float64)
    scales, zeros = find_grid("w", w, spec)
    weight = QuantTensor.from_ints(round_to_grid(w, scales, zeros, spec), scales, zeros, spec)
    linear = PackedLinear(weight, None, torch.float64)
    linear.scales_delta.data.uniform_(-0.1, 0.1)
    assert torch.autograd.gradcheck(
        lambda delta: torch.func.functional_call(linear, {"scales_delta": delta}, x), linear.scales_delta
    )


@pytest.mark.parametrize("tied", [False, True])
def test_the_stable_embedding_folds_away_exactly(nonuniform, monkeypatch, tied):
    import tinycompress.distillation.distill as where

    config = dataclasses.replace(nonuniform.config, tie_embeddings=tied)
    graph = Graph(config, {n: nonuniform.weights[n].double() for n in shapes(config)})
    seen, plain, ids = [], where.train, windows(nonuniform, 2, seed=5)

    def watch(network, *args, **kwargs):
        with torch.no_grad():
            assert (network.transformer(ids) - student.module()(ids)).abs().max() < 1e-8  # starts where the graph is
        plain(network, *args, **kwargs)
        seen.append(network)

    student = perturbed(graph)
    monkeypatch.setattr(where, "train", watch)
    out = Distill(windows(graph), graph, FAST, stable_embedding=True)(student)
    with torch.no_grad():
        assert (seen[0].transformer(ids) - out.module()(ids)).abs().max() < 1e-8
    name = "model.embed_tokens.weight"
    assert set(out.weights) == set(shapes(config)) and (out.weights[name] - student.weights[name]).abs().max() > 1e-4
