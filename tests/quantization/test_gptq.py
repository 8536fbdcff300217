"""GPTQ and its refinement: naive oracles, identities, non-uniform graphs."""

import pytest
import torch

from tinycompress.calibration.gram import cross_gram, gram, output_gap, stream_gram
from tinycompress.calibration.walk import walk
from tinycompress.errors import InputError
from tinycompress.graph.quant_tensor import QuantSpec, QuantTensor
from tinycompress.quantization.gptq import GPTQ, gptq_quantize, propagate_error
from tinycompress.quantization.grid_search import find_grid, round_to_grid
from tinycompress.quantization.hessian_factor import column_order, damped_factor
from tinycompress.quantization.lpbq import is_lpbq
from tinycompress.quantization.refinement import descend, refit_lpbq, refit_scales
from tinycompress.quantization.rtn import RTN

SPEC = QuantSpec(4, 16)


@pytest.fixture
def tokens(nonuniform):
    return torch.randint(nonuniform.config.vocab_size, (8, 32), generator=torch.Generator().manual_seed(0))


def correlated(n, k, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, k, generator=g) @ torch.randn(k, k, generator=g) * torch.rand(k, generator=g)


def naive_gptq(W, H, spec, scales, zeros, order, damping):
    """Algorithm 1 of the paper, column by column on the whole remainder, with an explicit inverse."""
    W, K = W.double().clone(), W.shape[1]
    g = K // scales.shape[1]
    H = H.double()[order][:, order]
    H.diagonal().add_(damping * H.diagonal().mean())
    U = torch.linalg.cholesky(torch.linalg.inv(H)).T
    W = W[:, order]
    Q = torch.zeros_like(W)
    for j in range(K):
        column = order[j] // g
        s = scales[:, column].double()
        z = spec.zero if zeros is None else zeros[:, column].double()
        steps = W[:, j] / s
        Q[:, j] = ((steps + z).round() if spec.float_zero else steps.round() + z).clamp(0, 2**spec.bits - 1)
        e = (W[:, j] - (Q[:, j] - z) * s) / U[j, j]
        W[:, j:] -= e[:, None] * U[j, j:]
    out = torch.zeros_like(Q)
    out[:, order] = Q
    return out


@pytest.mark.parametrize("order", ["act", "gar", "natural"])
@pytest.mark.parametrize(
    "spec", [QuantSpec(4, 16), QuantSpec(3, None), QuantSpec(2, 32, False), QuantSpec(2, 32, False, float_zero=True)]
)
@pytest.mark.parametrize("block", [8, 128])
def test_gptq_equals_the_naive_loop(order, spec, block):
    x = correlated(400, 96)
    W = torch.randn(24, 96, generator=torch.Generator().manual_seed(1))
    H = x.T.double() @ x.double()
    q = gptq_quantize(W, H, spec, order=order, block=block)
    scales, zeros = find_grid("w", W, spec, H.diagonal().float())
    columns = column_order(H.diagonal(), spec.group_size or 96, order)
    same = q.ints() == naive_gptq(W, H, spec, scales, zeros, columns, 0.01)
    assert (
        same.float().mean() > 0.995
    )  # float32 against float64 may round a tie the other way, and then differ behind it


def test_gptq_with_an_identity_hessian_is_rtn():
    W = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    q = gptq_quantize(W, torch.eye(64), SPEC)
    scales, zeros = find_grid("w", W, SPEC, torch.ones(64))
    assert torch.equal(q.ints(), round_to_grid(W, scales, zeros, SPEC))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_has_a_smaller_output_error_than_rounding(bits):
    spec, x = QuantSpec(bits, 32), correlated(1000, 128)
    W = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    q = gptq_quantize(W, x.T @ x, spec)
    scales, zeros = find_grid("w", W, spec, x.square().mean(0))
    rtn = QuantTensor.from_ints(round_to_grid(W, scales, zeros, spec), scales, zeros, spec)
    error = [((t.dequantize() - W) @ x.T).square().sum().item() for t in (q, rtn)]
    assert error[0] < 0.7 * error[1]


def test_dead_channels_do_not_matter():
    x = correlated(300, 64)
    x[:, ::5] = 0
    W = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    q = gptq_quantize(W, x.T @ x, SPEC)
    assert torch.isfinite(q.dequantize()).all()


def test_gptq_on_a_nonuniform_graph(nonuniform, tokens):
    out = GPTQ(tokens, QuantSpec(3, 16))(nonuniform)
    options = (
        "order='act', damping=0.01, propagate=0.0, correction='qep', stream=False, refine=0, balance=False, "
        "tuning=None, head=False"
    )
    assert out.history == (f"GPTQ(spec={QuantSpec(3, 16)!r}, {options})",)
    reference = nonuniform.module()(tokens)
    error = lambda g: (g.module()(tokens) - reference).square().mean().item()  # noqa: E731
    assert error(out) < 0.8 * error(RTN(QuantSpec(3, 16))(nonuniform))
    assert all(isinstance(w, torch.Tensor) for w in nonuniform.weights.values())  # the old graph is untouched


def drifted(alpha=0.1):
    """Inputs [300, 24] of a float model and of a compressed one, float64."""
    x = correlated(300, 24).double()
    return x, x + alpha * torch.randn(300, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_propagated_errors_move_the_target_exactly():
    """QEP's identity: at α = 1 and λ = 0, ‖QX̂ - WX‖² and ‖(Q - W*)X̂‖² differ by a constant, whatever Q."""
    g = torch.Generator().manual_seed(0)
    x, seen = drifted()
    W = torch.randn(8, 24, generator=g, dtype=torch.float64)
    _, U, perm = damped_factor(seen.T @ seen, 8, "act", 1e-12, "w")
    target = W + propagate_error(U, perm, W @ (x - seen).T @ seen)
    constants = []
    for _ in range(3):
        Q = W + torch.randn(8, 24, generator=g, dtype=torch.float64)
        constants.append((seen @ Q.T - x @ W.T).square().sum() - (seen @ (Q - target).T).square().sum())
    assert torch.allclose(torch.stack(constants[1:]), constants[0], rtol=1e-5)


@pytest.mark.parametrize("correction", ["qep", "qronos", "gptaq"])
def test_corrections_approach_the_float_output(correction):
    x, seen = drifted(0.5)
    W = torch.randn(16, 24, generator=torch.Generator().manual_seed(1))
    H, cross, spec = seen.T @ seen, x.T @ seen, QuantSpec(4, 8)
    plain = gptq_quantize(W, H, spec, damping=1e-6).dequantize().double()
    corrected = gptq_quantize(W, H, spec, damping=1e-6, cross=cross, correction=correction).dequantize().double()
    error = [(seen @ q.T - x @ W.T.double()).square().sum() for q in (corrected, plain)]
    assert (
        error[0] < (0.97 if correction == "gptaq" else 0.9) * error[1]
    )  # GPTAQ moves only what is still to be rounded
    same = gptq_quantize(W, H, spec, cross=H, correction=correction)  # nothing drifted, nothing to correct
    assert torch.equal(same.ints(), gptq_quantize(W, H, spec).ints())


def test_a_gap_of_the_stream_moves_the_target():
    """With the gap of the stream the target is what makes stream + output what it was: the lstsq oracle of it."""
    x, seen = drifted(0.5)
    g = torch.Generator().manual_seed(2)
    W, drift = torch.randn(16, 24, generator=g).double(), torch.randn(300, 16, generator=g, dtype=torch.float64)
    fine = QuantSpec(8, 8)
    q = gptq_quantize(W.float(), seen.T @ seen, fine, damping=1e-9, cross=x.T @ seen, gap=drift.T @ seen, refine=2)
    oracle = torch.linalg.lstsq(seen, x @ W.T + drift).solution.T
    assert (q.dequantize().double() - oracle).norm() < 0.02 * oracle.norm() < 0.2 * (W - oracle).norm()
    whole = ((x - seen) @ W.T + drift).T @ seen  # the same without the float model's inputs
    alone = gptq_quantize(W.float(), seen.T @ seen, fine, damping=1e-9, gap=whole, refine=2)
    assert torch.equal(alone.ints(), q.ints())


@pytest.mark.parametrize("stream", [False, True])
def test_the_gap_of_an_output_is_what_the_cross_gram_says(nonuniform, tokens, stream):
    def visit(feed, inputs):
        if feed.writes_stream:
            W = nonuniform.tensor(nonuniform.config.weight_name(feed.readers[0]))
            gap = output_gap(inputs, W, stream)
            expected = W.double() @ (cross_gram(inputs) - gram(feed, inputs))
            if stream:
                expected = stream_gram(inputs, W) - W.double() @ gram(feed, inputs)
            assert torch.allclose(gap, expected, rtol=1e-3, atol=1e-3 * max(0.1, float(expected.abs().max())))
            return {nonuniform.config.weight_name(feed.readers[0]): W * 0.9}
        return None

    walk(nonuniform, tokens, visit, reference=True)


def test_balance_and_stream_on_a_nonuniform_graph(nonuniform, tokens):
    """Weighing positions and correcting the stream work where attention or FFN is missing, and differ from plain
    GPTQ."""
    spec = QuantSpec(3, 16)
    plain = GPTQ(tokens, spec, propagate=1.0)(nonuniform)
    for options in ({"balance": True}, {"stream": True}):
        out = GPTQ(tokens, spec, propagate=1.0, **options)(nonuniform)
        last = [n for n in out.weights if n.endswith("down_proj.weight")][-1]
        assert not torch.equal(out.weights[last].ints(), plain.weights[last].ints())
        assert torch.isfinite(out.module()(tokens)).all()
    with pytest.raises(InputError, match="stream"):
        GPTQ(tokens, spec, stream=True)


def test_balanced_inputs_divide_by_the_stream_after_them(nonuniform, tokens):
    def visit(feed, inputs):
        if feed.readers[0].endswith("down_proj"):
            W = nonuniform.tensor(f"{feed.readers[0]}.weight")
            for x, r, h, y in zip(inputs, inputs.reference, inputs.residual, inputs.balanced(W)):
                rms = (h + x @ W.T).square().mean(-1, keepdim=True).sqrt()
                assert torch.allclose(y, x / rms, rtol=1e-4) and torch.equal(x, r)
            assert torch.equal(next(iter(inputs.balanced(W).reference)), next(iter(inputs.balanced(W))))

    walk(nonuniform, tokens, visit, reference=True)


def test_qronos_rounds_the_first_column_given_the_float_others():
    """The least-squares value of one column with all others at W, from the data itself."""
    x, seen = drifted(0.5)
    W = torch.randn(16, 24, generator=torch.Generator().manual_seed(1)).double()
    H = seen.T @ seen
    q = gptq_quantize(W.float(), H, QuantSpec(4, 24), damping=1e-9, cross=x.T @ seen, correction="qronos")
    j = int(H.diagonal().argmax())
    rest = x @ W.T - seen @ W.T + seen[:, j, None] * W[:, j]
    best = (seen[:, j] @ rest / seen[:, j].square().sum()).float()
    expected = (best / q.scales[:, 0]).round().add(8).clamp(0, 15)
    assert torch.equal(q.ints()[:, j].float(), expected)


def test_gptaq_equals_the_naive_loop():
    x, seen = drifted(0.3)
    W = torch.randn(16, 24, generator=torch.Generator().manual_seed(1))
    H, cross, spec = seen.T @ seen, x.T @ seen, QuantSpec(4, 8)
    q = gptq_quantize(W, H, spec, order="natural", cross=cross, propagate=0.25, correction="gptaq", block=8)
    scales, _ = find_grid("w", W, spec, H.diagonal().float())
    _damped, U, _ = damped_factor(H, 8, "natural", 0.01, "w")
    P = 0.25 * torch.triu((cross - H) @ U.T, 1) @ U
    w, expected = W.double().clone(), torch.empty(16, 24)
    for j in range(24):
        s = scales[:, j // 8].double()
        expected[:, j] = ((w[:, j] / s).round() + 8).clamp(0, 15)
        error, now = (w[:, j] - (expected[:, j] - 8) * s) / U[j, j], w[:, j].clone()
        w[:, j:] += now[:, None] * P[j, j:] - error[:, None] * U[j, j:]
    assert (q.ints() == expected).float().mean() > 0.995


def test_propagation_comes_closer_to_the_float_model(nonuniform, tokens):
    reference = nonuniform.module()(tokens)
    spec = QuantSpec(3, 16)
    error = lambda g: (g.module()(tokens) - reference).square().mean().item()  # noqa: E731
    assert error(GPTQ(tokens, spec, propagate=0.5)(nonuniform)) < error(GPTQ(tokens, spec)(nonuniform))
    with pytest.raises(InputError, match="propagate"):
        GPTQ(tokens, spec, propagate=2.0)


@pytest.mark.parametrize("spec", [QuantSpec(4, 16), QuantSpec(3, None), QuantSpec(2, 32, False)])
def test_refinement_never_raises_the_error_and_solves_for_the_scales(spec):
    x = correlated(400, 96).double()
    W, H = torch.randn(24, 96, generator=torch.Generator().manual_seed(1)).double(), x.T @ x
    q = gptq_quantize(W.float(), H, spec)
    zeros = torch.full((1, 1), float(spec.zero)) if q.zeros is None else q.zeros.double()
    target = W @ H

    def error(ints, scales):
        steps = (ints.double().view(*scales.shape, -1) - zeros.double()[..., None]) * scales.double()[..., None]
        D = steps.view(24, 96) - W
        return ((D @ H) * D).sum(1)

    ints, scales = q.ints(), q.scales.double()
    before = error(ints, scales)
    scales = refit_scales(ints, H, target, scales, zeros.double())
    fitted = error(ints, scales)
    assert (fitted <= before * (1 + 1e-9)).all()
    nudged = error(ints, scales * (1 + 1e-3 * torch.randn(scales.shape, generator=torch.Generator().manual_seed(0))))
    assert (fitted < nudged).all()
    ints = descend(ints, H, target, scales, zeros.double(), spec)
    assert (error(ints, scales) <= fitted * (1 + 1e-9)).all() and error(ints, scales).sum() < 0.99 * fitted.sum()
    rounds = [gptq_quantize(W.float(), H, spec, refine=n) for n in (0, 1, 3)]
    sums = [error(r.ints(), r.scales).sum() for r in rounds]
    assert sums[0] > sums[1] > sums[2]


def test_refined_scales_of_htp_keep_their_form_and_no_single_integer_is_better():
    x = correlated(400, 64).double()
    W, H, spec = (
        torch.randn(6, 64, generator=torch.Generator().manual_seed(1)).double(),
        x.T @ x,
        QuantSpec.parse("w3g16-lpbq"),
    )
    rounds = [gptq_quantize(W.float(), H, spec, refine=n) for n in (0, 1, 3)]
    assert all(is_lpbq(q) for q in rounds)
    ints, scales, zeros = rounds[0].ints(), rounds[0].scales.double(), torch.full((1, 1), 4.0).double()

    def error(scales):
        D = (ints.double().view(6, 4, 16) - 4).mul(scales[..., None]).view(6, 64) - W
        return ((D @ H) * D).sum(1)

    start = error(scales)
    for _ in range(30):
        scales = refit_lpbq(ints, H, W @ H, scales, zeros)
    f, best = scales.amax(1, keepdim=True) / 16, error(scales)
    i = (scales / f).round()
    assert (best <= start).all() and best.sum() < 0.99 * start.sum() and torch.allclose(f * i, scales)
    for g in range(4):
        for value in range(1, 17):
            other = torch.where(i[:, g] == 16, 16.0, float(value)).double()
            assert (error(f * torch.cat((i[:, :g], other[:, None], i[:, g + 1 :]), 1)) >= best * (1 - 1e-9)).all()
    assert (error(1.001 * scales) > best).all() and (error(0.999 * scales) > best).all()
    sums = [((q.dequantize().double() - W) @ H * (q.dequantize().double() - W)).sum() for q in rounds]
    assert sums[0] > sums[1] > sums[2]


def test_descent_leaves_no_single_better_integer():
    """After enough sweeps no one integer can move and gain: the naive oracle tries them all."""
    x = correlated(200, 16).double()
    W, H, spec = torch.randn(4, 16, generator=torch.Generator().manual_seed(1)).double(), x.T @ x, QuantSpec(3, 8)
    q = gptq_quantize(W.float(), H, spec)
    ints, scales, zeros = q.ints(), q.scales.double(), torch.full((1, 1), 4.0).double()
    for _ in range(50):
        ints = descend(ints, H, W @ H, scales, zeros, spec)

    def error(ints):
        D = (ints.double().view(4, 2, 8) - 4).mul(scales[..., None]).view(4, 16) - W
        return ((D @ H) * D).sum(1)

    best = error(ints)
    for j in range(16):
        for value in range(8):
            other = ints.clone()
            other[:, j] = value
            assert (error(other) >= best * (1 - 1e-9)).all()


def test_calibration_shorter_than_a_width_names_the_linear_before_any_work(nonuniform, tokens):
    found = r"calibration tokens for model\.layers\.0\.mlp\.down_proj: found 64 positions for its 96 inputs"
    with pytest.raises(InputError, match=rf"{found}.*at least 96"):
        GPTQ(tokens[:2], SPEC)(nonuniform)
    assert GPTQ(tokens[:3], SPEC)(nonuniform).history  # 96 positions are enough


def test_unknown_options_are_named():
    tokens = torch.zeros(1, 4, dtype=torch.long)
    for options, names in (
        ({"order": "desc"}, "act"),
        ({"correction": "x"}, "qronos"),
        ({"refine": -1}, "refine"),
        ({"damping": 0}, "damping"),
    ):
        with pytest.raises(InputError, match=names):
            GPTQ(tokens, **options)
