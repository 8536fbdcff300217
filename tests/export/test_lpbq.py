"""LPBQ: scales of the form that Qualcomm's HTP stores, searched, refined and run."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from static_exported import MIXED, YARN, no_runtime, short_chunks, small

from tinycompress.errors import InputError
from tinycompress.export import export, read
from tinycompress.graph.config import Layer
from tinycompress.graph.graph import Graph
from tinycompress.graph.quant_tensor import QuantSpec, QuantTensor
from tinycompress.quantization.gptq import gptq_quantize
from tinycompress.quantization.grid_search import find_grid, round_to_grid
from tinycompress.quantization.lpbq import is_lpbq, snap_scales
from tinycompress.quantization.rtn import RTN, rtn_quantize

__all__ = ["no_runtime", "short_chunks"]  # fixtures, for this file too


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.sampled_from([2, 3, 4, 8]), st.booleans(), st.integers(0, 99))
def test_lpbq_scales_are_a_float_times_an_integer(N, G, bits, weighted, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(N, G * 16, generator=generator) * torch.rand(N, G, generator=generator).repeat_interleave(
        16, 1
    )
    importance = torch.rand(G * 16, generator=generator) if weighted else None
    spec = QuantSpec(bits, 16, search="lpbq")
    scales, zeros = find_grid("w", weight, spec, importance)
    multiple = scales / scales.amax(1, keepdim=True) * 16
    assert zeros is None and (scales > 0).all()
    torch.testing.assert_close(multiple, multiple.round(), atol=1e-4, rtol=0)
    assert multiple.min() >= 1 - 1e-4
    assert is_lpbq(QuantTensor.from_ints(round_to_grid(weight, scales, None, spec), scales, None, spec))


def test_is_lpbq_tells_ordinary_scales():
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    assert not is_lpbq(rtn_quantize(weight, QuantSpec(4, 16, search="minmax")))
    assert not is_lpbq(rtn_quantize(weight, QuantSpec(4, 16, symmetric=False)))
    assert is_lpbq(rtn_quantize(weight, QuantSpec(4, None, search="minmax")))  # one block a row is its own factor
    quantized = rtn_quantize(weight, QuantSpec.parse("w4g16-lpbq"))
    assert is_lpbq(quantized) and not is_lpbq(dataclasses.replace(quantized, scales=-quantized.scales))
    assert not is_lpbq(dataclasses.replace(quantized, scales=quantized.scales * torch.tensor([1, 1, 1.03, 1])))


def test_searching_the_form_beats_rounding_to_it_afterwards():
    """Scales searched with the integers against those that the compiler would make of the best ordinary ones."""
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) * torch.rand(
        64, 1, generator=torch.Generator().manual_seed(1)
    )
    ordinary = rtn_quantize(weight, QuantSpec(4, 32, search="minmax"))
    step = ordinary.scales.amax(1, keepdim=True) / 16
    compiled = dataclasses.replace(ordinary, scales=(ordinary.scales / step).round().clamp(1, 16) * step)
    native = rtn_quantize(weight, QuantSpec.parse("w4g32-lpbq"))
    errors = [(q.dequantize() - weight).square().mean() for q in (native, compiled)]
    assert errors[0] < 0.85 * errors[1]


def test_gptq_rounds_on_the_lpbq_grid():
    generator = torch.Generator().manual_seed(0)
    weight, x = (
        torch.randn(16, 64, generator=generator),
        torch.randn(512, 64, generator=generator) @ torch.randn(64, 64, generator=generator),
    )
    spec, H = QuantSpec.parse("w4g16-lpbq"), (x.T @ x).double()
    quantized = gptq_quantize(weight, H, spec)
    scales, _ = find_grid("w", weight, spec, H.diagonal().float())
    assert is_lpbq(quantized) and torch.equal(quantized.scales, scales)
    nearest = round_to_grid(weight, scales, None, spec)
    error = [
        ((q - weight) @ x.T).square().sum()
        for q in (quantized.dequantize(), QuantTensor.from_ints(nearest, scales, None, spec).dequantize())
    ]
    assert error[0] < 0.8 * error[1]


def test_lpbq_in_the_spec():
    spec = QuantSpec.parse("w4g32-lpbq")
    assert (spec.search, str(spec), spec.symmetric) == ("lpbq", "w4g32-lpbq", True)
    with pytest.raises(InputError, match="lpbq"):
        QuantSpec(4, 32, symmetric=False, search="lpbq")
    with pytest.raises(InputError, match=r"\[-asym\|-floatzero\|-lpbq\]"):
        QuantSpec.parse("w4g32-asym-lpbq")
    with pytest.raises(InputError, match=r"scales: found \(2, 3\)"):
        snap_scales(torch.ones(2, 16), torch.ones(2, 3), 4)


def in_runtime(graph: Graph, folder, profile: str, runtime: str) -> dict:
    """What the runtime's check says about an export of the graph; skips where the runtime is not installed."""
    from tinycompress.export.gate.runtime import installed, run_check

    if not installed(runtime):
        pytest.skip(f"make runtime NAME={runtime}")
    export(graph, folder, profile, check=False, progress=False)
    return run_check(runtime, folder, read(folder), profile)


@pytest.mark.runtime
@pytest.mark.parametrize("spec", [None, "w4", "w4g32-lpbq"])
def test_htp_runs_the_graphs(spec, tmp_path):
    layers = (Layer(4, 2, 128), Layer(2, 1, 64), Layer(0, 0, 64), Layer(4, 4, 0))
    graph = small(layers=layers, rope=YARN, biases=frozenset({"q_proj", "down_proj"}), max_position=64)
    result = in_runtime(RTN(QuantSpec.parse(spec))(graph) if spec else graph, tmp_path / "out", "qnn", "qnn")
    assert result["passed"], result["failures"]


@pytest.mark.runtime
def test_htp_keeps_lpbq_scales_and_changes_ordinary_ones(tmp_path):
    """FFN layers only, so that nothing but the weights can differ between HTP and the CPU."""
    graph = small(layers=(Layer(0, 0, 128),) * 2, max_position=64)
    specs = {"native": QuantSpec.parse("w4g32-lpbq"), "ordinary": QuantSpec(4, 32, search="minmax")}
    found = {
        name: in_runtime(RTN(spec)(graph), tmp_path / name, "qnn", "qnn")["figures"]["htp_to_cpu"]
        for name, spec in specs.items()
    }
    assert found["native"] < found["ordinary"] / 10, found


@pytest.mark.runtime
def test_rknn_runs_the_graphs(tmp_path):
    graph = small(layers=MIXED, rope=YARN, biases=frozenset({"q_proj", "down_proj"}), max_position=64)
    result = in_runtime(graph, tmp_path / "out", "static", "rknn")
    assert result["passed"], result["failures"]
