"""Grids and packing: round trips, optimality against brute force, errors that name the linear."""

import tempfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinycompress.checkpoints import checkpoint
from tinycompress.errors import InputError, OutputError
from tinycompress.graph.graph import Graph, LazyTensor
from tinycompress.graph.presets import SMOLLM2_135M
from tinycompress.graph.quant_tensor import BITS, QuantSpec, QuantTensor, pack, unpack
from tinycompress.model.linear import QuantLinear
from tinycompress.quantization.grid_search import find_grid, round_to_grid
from tinycompress.quantization.hqq import HQQ, hqq_quantize
from tinycompress.quantization.linear_specs import targets
from tinycompress.quantization.rotate import Rotate
from tinycompress.quantization.rtn import RTN, rtn_quantize

FLOAT_ZERO = ("w2g64-floatzero", QuantSpec(2, 64, False, float_zero=True))
groups, searches = st.sampled_from([None, 8, 16, 32]), st.sampled_from(["minmax", "mse"])
specs = st.one_of(
    st.builds(QuantSpec, st.sampled_from(BITS), groups, st.booleans(), searches),
    st.builds(QuantSpec, st.sampled_from([2, 3, 4]), groups, st.just(False), searches, float_zero=st.just(True)),
)


@given(st.sampled_from(BITS), st.integers(1, 5), st.integers(1, 70), st.integers(0, 2**31))
def test_pack_round_trips(bits, rows, n, seed):
    q = torch.randint(2**bits, (rows, n), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = pack(q, bits)
    assert packed.shape == (rows, -(-n // 8) * bits)
    assert torch.equal(unpack(packed, bits, n), q)


@given(st.integers(1, 40), st.integers(0, 2**31))
def test_pack_puts_low_bits_first(n, seed):
    """The layout that MatMulNBits reads: two 4-bit values a byte, the first in the low half."""
    q = torch.randint(16, (n * 8,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    assert torch.equal(pack(q, 4), q[0::2] | (q[1::2] << 4))


@settings(max_examples=60, deadline=None)
@given(specs, st.integers(1, 9), st.sampled_from([32, 64, 96]), st.integers(0, 1000))
def test_quantized_weights_are_close_and_stable(spec, rows, cols, seed):
    w = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    q = rtn_quantize(w, spec)
    back = q.dequantize()
    assert back.shape == w.shape and int(q.ints().max()) < 2**spec.bits
    g = spec.group_size or cols
    peak = w.reshape(rows, -1, g).abs().amax(-1, keepdim=True)
    if spec.search == "minmax":
        span = (w.reshape(rows, -1, g).amax(-1).clamp_min(0) - w.reshape(rows, -1, g).amin(-1).clamp_max(0))[..., None]
        step = peak / max(2 ** (spec.bits - 1) - 1, 1) if spec.symmetric else span / (2**spec.bits - 1)
        # Half a step, or for integer zero points a little more at the ends of the range.
        assert ((back - w).reshape(rows, -1, g).abs() <= step * (0.5 if spec.symmetric else 1.0) + 1e-5).all()
    again = round_to_grid(back, q.scales, q.zeros, spec)
    assert torch.equal(again, q.ints())


@settings(max_examples=30, deadline=None)
@given(specs, st.integers(0, 1000))
def test_quantized_tensors_round_trip_through_their_parts(spec, seed):
    w = torch.randn(5, 64, generator=torch.Generator().manual_seed(seed))
    q = rtn_quantize(w, spec)
    back = QuantTensor.from_tensors(q.tensors(), spec, q.shape)
    assert torch.equal(back.dequantize(), q.dequantize())
    assert torch.equal(q.select("w", 0, torch.tensor([4, 1])).dequantize(), q.dequantize()[[4, 1]])
    with pytest.raises(InputError):
        QuantTensor.from_tensors(q.tensors(), spec, (5, 128))
    for part, dtype in ((".packed", torch.float16), (".packed", torch.int64), (".scales", torch.int32)):
        with pytest.raises(InputError, match=f"packed weight.*{dtype}"):
            QuantTensor.from_tensors(q.tensors() | {part: q.tensors()[part].to(dtype)}, spec, q.shape)


def weighted_error(w, q, h):
    return ((q.dequantize() - w).square() * h).sum().item()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_weighted_grid_beats_minmax_where_it_counts(bits, symmetric):
    g = torch.Generator().manual_seed(0)
    w, h = torch.randn(32, 128, generator=g), torch.rand(128, generator=g).pow(4) + 0.01
    errors = {}
    for scale in ("minmax", "mse", "weighted"):
        spec = QuantSpec(bits, 64, symmetric, search=scale)
        scales, zeros = find_grid("w", w, spec, h)
        errors[scale] = weighted_error(
            w, QuantTensor.from_ints(round_to_grid(w, scales, zeros, spec), scales, zeros, spec), h
        )
    assert errors["weighted"] < errors["mse"] < errors["minmax"]


def test_the_search_comes_close_to_brute_force():
    g = torch.Generator().manual_seed(1)
    w, h = torch.randn(1, 32, generator=g), torch.rand(32, generator=g) + 0.1
    spec = QuantSpec(3, 32, True, search="weighted")
    scales, zeros = find_grid("w", w, spec, h)
    ours = weighted_error(w, QuantTensor.from_ints(round_to_grid(w, scales, zeros, spec), scales, zeros, spec), h)
    best = min(
        (((w / s).round().clamp(-4, 3) * s - w).square() * h).sum().item()
        for s in torch.cat((torch.linspace(0.05, 2, 4000), -torch.linspace(0.05, 2, 4000))).tolist()
    )
    assert ours <= best * 1.05


@pytest.mark.parametrize("spec", [QuantSpec(4, 32), QuantSpec(3, 32), QuantSpec(8, None), QuantSpec(2, 16, False)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_quantized_linear_multiplies_by_the_dequantized_weight(spec, bias):
    g = torch.Generator().manual_seed(0)
    q = rtn_quantize(torch.randn(300, 64, generator=g), spec)
    b = torch.randn(300, generator=g) if bias else None
    x = torch.randn(2, 5, 64, generator=g)
    assert torch.allclose(QuantLinear(q, b)(x), torch.nn.functional.linear(x, q.dequantize(), b), atol=1e-5)


@pytest.mark.parametrize("spec", [QuantSpec(3, None), FLOAT_ZERO[1]])
def test_large_matrices_are_rounded_in_pieces_to_the_same_bits(spec):
    for quantize, weights in ((rtn_quantize, 1 << 22), (hqq_quantize, 1 << 20)):  # more than are rounded at a time
        w = torch.randn(weights // 64 + 100, 64, generator=torch.Generator().manual_seed(0))
        whole, ends = quantize(w, spec), [quantize(w[rows], spec) for rows in (slice(0, 50), slice(-50, None))]
        assert whole.shape == w.shape and whole.grid == spec.grid
        for part, rows in zip(ends, (whole.rows(0, 50), whole.rows(len(w) - 50, len(w)))):
            assert all(torch.equal(tensor, rows.tensors()[suffix]) for suffix, tensor in part.tensors().items())


def test_rtn_quantizes_every_linear_but_the_head(nonuniform):
    out = RTN(QuantSpec(4, 16))(nonuniform)
    packed = {n for n, w in out.weights.items() if isinstance(w, QuantTensor)}
    assert packed == {f"{n}.weight" for n in targets(nonuniform, QuantSpec(4, 16))}
    assert "lm_head.weight" not in packed and len(packed) > 10
    assert torch.isfinite(out.module()(torch.arange(9)[None])).all()
    assert "lm_head.weight" in {
        n for n, w in RTN(QuantSpec(8, 16), head=True)(nonuniform).weights.items() if isinstance(w, QuantTensor)
    }
    assert out.nbytes < nonuniform.nbytes


def test_groups_that_do_not_divide_are_refused_before_any_work():
    graph = Graph.random(SMOLLM2_135M)
    with pytest.raises(InputError, match=r"q_proj.*128.*64"):
        RTN(QuantSpec(4, 128))(graph)


@pytest.mark.parametrize("width,accepted", [(576, "64, 32, 16, 8, or per-channel"), (172, r"per-channel \(w3-asym\)")])
def test_groups_that_fit_are_named(width, accepted):
    with pytest.raises(InputError, match=accepted):
        QuantSpec.parse("w3g128-asym").group("here", width)


def test_a_graph_is_quantized_once(tiny):
    with pytest.raises(InputError, match="already w4g16"):
        RTN(QuantSpec(8, 16))(RTN(QuantSpec(4, 16))(tiny))


def test_columns_of_a_packed_weight_are_not_cut(tiny):
    from tinycompress.graph.edit import cut

    with pytest.raises(InputError, match="pruning before quantization"):
        cut(RTN(QuantSpec(4, 16))(tiny), "layers.0.ffn", range(16))


def test_nan_weights_are_named():
    with pytest.raises(InputError, match="here"):
        find_grid("here", torch.full((2, 64), float("nan")), QuantSpec())


@pytest.mark.parametrize(
    "text, spec",
    [("w4g64", QuantSpec()), ("w3", QuantSpec(3, None)), ("w4g32-asym", QuantSpec(4, 32, False)), FLOAT_ZERO],
)
def test_specs_parse_and_print(text, spec):
    assert QuantSpec.parse(text) == spec and str(spec) == text


@pytest.mark.parametrize("text", ["4bit", "w5g64", "w4g7", "w4g0", "w4g64-sym", ""])
def test_bad_specs_say_what_is_accepted(text):
    with pytest.raises(InputError):
        QuantSpec.parse(text)


@pytest.mark.parametrize("make", [RTN, HQQ])
def test_large_results_are_kept_on_disk(nonuniform, tmp_path, monkeypatch, make):
    """Past the limit the packed weights are mapped files without a name, equal bit for bit, and save."""
    plain = make(QuantSpec(4, 16, symmetric=False))(nonuniform)
    monkeypatch.setattr("tinycompress.graph.mapped_memory.IN_MEMORY", 0)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    made, real = [], torch.from_file
    monkeypatch.setattr("torch.from_file", lambda *args, **how: (made.append(args[0]), real(*args, **how))[1])
    out = make(QuantSpec(4, 16, symmetric=False))(nonuniform)
    packed = {n: w for n, w in out.weights.items() if isinstance(w, QuantTensor)}
    assert len(made) == 3 * len(packed) and not list(tmp_path.iterdir())
    checkpoint.save(out, tmp_path / "out")
    for graph in (out, checkpoint.load(tmp_path / "out")):
        for name in packed:
            for suffix, tensor in plain.weights[name].tensors().items():
                assert torch.equal(graph.weights[name].tensors()[suffix], tensor)


def test_a_full_disk_is_named(nonuniform, monkeypatch):
    monkeypatch.setattr("tinycompress.graph.mapped_memory.IN_MEMORY", 0)
    monkeypatch.setattr("tempfile.tempdir", None)
    real = tempfile.NamedTemporaryFile

    def full(*args, **how):
        file = real(*args, **how)
        file.file = open("/dev/full", "wb")  # noqa: SIM115 (every write to it: no space left on device)
        file.write, file.flush = file.file.write, file.file.flush
        return file

    monkeypatch.setattr("tempfile.NamedTemporaryFile", full)
    with pytest.raises(OutputError, match=r"whose disk is full.*TMPDIR"):
        RTN(QuantSpec(4, 16))(nonuniform)


def test_a_rotated_large_model_is_kept_on_disk(nonuniform, tmp_path, monkeypatch):
    """Past the limit dense results are mapped when they are read, equal bit for bit, from a file without a name."""
    plain = Rotate()(nonuniform)
    monkeypatch.setattr("tinycompress.graph.mapped_memory.IN_MEMORY", 0)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    out = Rotate()(nonuniform)
    assert isinstance(out.weights.entries["lm_head.weight"], LazyTensor) and not list(tmp_path.iterdir())
    assert all(torch.equal(out.weights[name], weight) for name, weight in plain.weights.items())
    out.weights["lm_head.weight"].zero_()  # what a reader does to its copy stays with the reader
    assert torch.equal(out.weights["lm_head.weight"], plain.weights["lm_head.weight"])
