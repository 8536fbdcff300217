"""Float zero points: the search against brute force, packing, quantizers, ONNX Runtime's own arithmetic, and who refuses them."""

import dataclasses

import pytest
import torch
from conftest import random_graph
from typer.testing import CliRunner

from tinycompress.checkpoints.checkpoint import load, save
from tinycompress.errors import InputError
from tinycompress.export import OrtModel, export, prepare, read
from tinycompress.export.read import apart, initializers
from tinycompress.graph.config import Config, Layer
from tinycompress.graph.quant_tensor import QuantSpec, QuantTensor
from tinycompress.quantization.embedding import QuantizeEmbedding
from tinycompress.quantization.gptq import GPTQ, gptq_quantize
from tinycompress.quantization.grid_search import find_grid, round_to_grid
from tinycompress.quantization.hqq import hqq_quantize
from tinycompress.quantization.rtn import RTN, rtn_quantize
from tinycompress.quantization.torchao import to_torchao

CONFIG = Config(
    vocab_size=128,
    hidden_size=64,
    head_dim=16,
    layers=(Layer(4, 2, 192), Layer(4, 1, 64)),
    max_position=64,
    bos_token_id=1,
)
SPEC = QuantSpec.parse("w2g32-floatzero")


def error(w, h, s, z, bits):
    q = (w / s + z).round().clamp(0, 2**bits - 1)
    return (((q - z) * s - w).square() * h).sum(-1)


@pytest.mark.parametrize("bits", [2, 3])
def test_the_search_comes_close_to_brute_force(bits):
    g = torch.Generator().manual_seed(bits)
    w, h = torch.randn(6, 32, generator=g) + torch.randn(6, 1, generator=g), torch.rand(32, generator=g) + 0.1
    spec = QuantSpec(bits, 32, False, search="weighted", float_zero=True)
    s, z = find_grid("w", w, spec, h)
    ours = error(w, h, s, z, bits)
    span = (w.amax(-1) - w.amin(-1))[:, None]
    best = torch.full((6,), torch.inf)
    for share in torch.linspace(0.3, 1.1, 80):  # both ends of the grid move freely
        for shift in torch.linspace(-0.5, 0.5, 81):
            step = span * share / (2**bits - 1)
            best = torch.minimum(best, error(w, h, step, -(w.amin(-1)[:, None] + shift * span) / step, bits))
    assert (ours <= best * 1.1).all() and ours.sum() <= best.sum() * 1.02


@pytest.mark.parametrize("scale", ["minmax", "mse", "weighted"])
def test_a_float_zero_point_loses_less_than_an_integer_one(scale):
    g = torch.Generator().manual_seed(0)
    w, h = torch.randn(64, 128, generator=g), torch.rand(128, generator=g).pow(2) + 0.01
    losses = []
    for float_zero in (False, True):
        spec = QuantSpec(2, 32, False, scale, float_zero=float_zero)
        s, z = find_grid("w", w, spec, h)
        weight = QuantTensor.from_ints(round_to_grid(w, s, z, spec), s, z, spec)
        assert weight.zeros.dtype == (torch.float32 if float_zero else torch.uint8)
        losses.append(((weight.dequantize() - w).square() * (h if scale == "weighted" else 1)).sum())
    assert losses[1] < 0.95 * losses[0]


@pytest.mark.parametrize("group", [torch.zeros(32), torch.full((32,), 0.7), torch.full((32,), -3.0)])
def test_constant_groups_are_kept(group):
    for scale in ("minmax", "mse"):
        weight = rtn_quantize(group[None], QuantSpec(2, 32, False, search=scale, float_zero=True))
        assert torch.allclose(weight.dequantize()[0], group, rtol=1e-6)


def test_refinement_moves_zero_points_too_and_never_raises_the_error():
    g = torch.Generator().manual_seed(0)
    x, W = (
        (torch.randn(300, 96, generator=g) @ torch.randn(96, 96, generator=g)).double(),
        torch.randn(24, 96, generator=g),
    )
    H, sums = x.T @ x, []
    for rounds in (0, 1, 3):
        q = gptq_quantize(W, H, SPEC, refine=rounds)
        D = q.dequantize(torch.float64) - W
        sums.append(((D @ H) * D).sum())
    assert sums[0] > sums[1] > sums[2]
    integer = gptq_quantize(W, H, QuantSpec.parse("w2g32-asym"), refine=3).dequantize(torch.float64) - W
    assert sums[2] < 0.97 * ((integer @ H) * integer).sum()
    # The zero points are the best for the integers and scales that came out.
    best = ((D @ H) * D).sum(1)
    for nudge in (0.01, -0.01):
        moved = dataclasses.replace(q, zeros=q.zeros + nudge).dequantize(torch.float64) - W
        assert (((moved @ H) * moved).sum(1) > best).all()


def test_hqq_leaves_the_zero_point_unrounded():
    w = torch.randn(32, 128, generator=torch.Generator().manual_seed(0))
    losses = [
        (hqq_quantize(w, QuantSpec.parse(f"w2g32-{kind}")).dequantize() - w).abs().pow(0.7).sum()
        for kind in ("asym", "floatzero")
    ]
    assert losses[1] < 0.97 * losses[0]


def test_saved_and_loaded_it_is_the_same_graph(nonuniform, tokens, tmp_path):
    graph = GPTQ(tokens, QuantSpec.parse("w2g16-floatzero"), refine=1, propagate=0.5)(nonuniform)
    back = load(save(graph, tmp_path / "m"))
    ids = torch.arange(12)[None]
    assert back.fingerprint() == graph.fingerprint() and torch.equal(back.module()(ids), graph.module()(ids))
    assert torch.allclose(graph.module()(ids), graph.dense().module()(ids), atol=1e-5)
    half = load(tmp_path / "m", dtype=torch.float16)
    assert all(w.zeros.dtype == torch.float16 for w in half.weights.values() if isinstance(w, QuantTensor))


@pytest.fixture
def tokens(nonuniform):
    return torch.randint(nonuniform.config.vocab_size, (4, 32), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("text", ["w2g32-floatzero", "w3g16-floatzero", "w4g64-floatzero", "w2-floatzero"])
@torch.inference_mode()
def test_onnx_runtime_computes_with_them(text, tmp_path):
    """The stored tensors bit for bit; logits within 1e-4 at both accuracy levels, since the kernel stays in float."""
    graph = RTN(dataclasses.replace(QuantSpec.parse(text), search="mse"), head=True)(random_graph(CONFIG))
    export(graph, tmp_path / "out", check=False)
    stored = apart(initializers(tmp_path / "out"), graph.config)
    packed = {name: w for name, w in graph.weights.items() if isinstance(w, QuantTensor)}
    for name, weight in packed.items():
        zeros = stored[f"{name}.zeros"]
        assert zeros.dtype == torch.float32 and zeros.shape == stored[f"{name}.scales"].shape
        assert torch.equal(zeros[:, :: zeros.shape[1] // weight.zeros.shape[1]], weight.zeros)
    assert len(packed) == 15 and read(tmp_path / "out").fingerprint() == prepare(graph).fingerprint()
    ids = torch.randint(128, (1, 24), generator=torch.Generator().manual_seed(1))
    expected = prepare(graph).module()(ids)
    assert expected.abs().max() > 0.5
    for level in (0, 4):
        torch.testing.assert_close(
            OrtModel(tmp_path / "out", accuracy_level=level, threads=1)(ids), expected, atol=1e-4, rtol=0
        )


@pytest.mark.parametrize("profile", ["web", "std", "openvino-npu", "qnn"])
def test_other_profiles_refuse_them(profile, tmp_path):
    layers = (Layer(4, 2, 192),)
    graph = RTN(QuantSpec.parse("w2g64-floatzero"))(
        random_graph(dataclasses.replace(CONFIG, hidden_size=128, head_dim=64, layers=layers))
    )
    with pytest.raises(InputError, match=r"grid of model\.layers\.0\.self_attn\.q_proj.*w2g64-floatzero"):
        export(graph, tmp_path / "out", profile, check=False)
    save(graph.dense(), tmp_path / "m")
    before = sorted(tmp_path.iterdir())
    from tinycompress.cli.main import app

    options = [
        "--quantize",
        "w2g64-floatzero",
        "--quantize-method",
        "rtn",
        "--export",
        profile,
        "-o",
        str(tmp_path / "out"),
    ]
    said = CliRunner().invoke(app, ["compress", str(tmp_path / "m"), *options])
    assert said.exit_code == 2 and "floatzero" in said.output and sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("format", ["gptq", "awq", "compressed-tensors"])
def test_other_formats_refuse_them(format, tmp_path):
    graph = RTN(QuantSpec.parse("w4g32-floatzero"))(
        random_graph(dataclasses.replace(CONFIG, layers=(Layer(4, 2, 96),) * 2))
    )
    with pytest.raises(InputError, match=rf"q_proj.weight in format {format}.*float zero points.*native or gguf"):
        save(graph, tmp_path / "out", format=format)
    assert not list(tmp_path.iterdir())


def test_who_else_refuses_them(tmp_path):
    with pytest.raises(InputError, match=r"QuantizeEmbedding\.spec.*floatzero"):
        QuantizeEmbedding(SPEC)
    name, graph = "model.embed_tokens.weight", random_graph(CONFIG)
    with pytest.raises(InputError, match=r"grid of model\.embed_tokens.*floatzero"):
        export(graph.replace(weights={name: rtn_quantize(graph.tensor(name), SPEC)}), tmp_path / "out", check=False)
    with pytest.raises(InputError, match="torchao"):
        to_torchao(rtn_quantize(torch.randn(4, 64), SPEC))
    with pytest.raises(InputError, match="float_zero"):
        QuantSpec(8, 64, False, float_zero=True)
    with pytest.raises(InputError, match="float_zero"):
        QuantSpec(2, 64, True, float_zero=True)
    good = rtn_quantize(torch.randn(4, 64), SPEC)
    with pytest.raises(InputError, match="zero points"):
        QuantTensor.from_tensors(good.tensors() | {".zeros": good.zeros.to(torch.uint8)}, SPEC, good.shape)
