"""The embedding and the head on a grid: one table when tied, the same bytes on disk and in the export."""

import dataclasses

import pytest
import torch
from conftest import random_graph
from hypothesis import given, settings
from hypothesis import strategies as st

from tinycompress.checkpoints.checkpoint import load, save
from tinycompress.errors import InputError
from tinycompress.graph.config import Config, Layer
from tinycompress.graph.quant_tensor import QuantSpec, QuantTensor
from tinycompress.quantization import embedding
from tinycompress.quantization.embedding import QuantizeEmbedding, quantize_table
from tinycompress.quantization.rtn import RTN, rtn_quantize
from tinycompress.recipe import Options

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
IDS = torch.arange(24)[None]


@pytest.fixture
def tied():
    layers = (Layer(4, 2, 96), Layer(0, 0, 32), Layer(2, 1, 0))
    return random_graph(
        Config(vocab_size=128, hidden_size=64, head_dim=16, layers=layers, max_position=64, tie_embeddings=True)
    )


def packed(graph):
    return {n for n, w in graph.weights.items() if isinstance(w, QuantTensor)}


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(["w8", "w8g32", "w4g16", "w4g16-asym", "w3g8"]), st.integers(1, 40), st.integers(0, 99))
def test_rows_are_quantized_on_their_own(text, rows, seed):
    """Chunked as any other weight is when whole."""
    table, spec = torch.randn(rows, 64, generator=torch.Generator().manual_seed(seed)), QuantSpec.parse(text)
    old, embedding.ROWS = embedding.ROWS, 7
    try:
        ours = quantize_table(table, spec)
    finally:
        embedding.ROWS = old
    whole = rtn_quantize(table, spec)
    assert torch.equal(ours.packed, whole.packed) and torch.equal(ours.scales, whole.scales)
    assert torch.equal(ours.dequantize(), whole.dequantize())


@pytest.mark.parametrize("text", ["w8g64", "w4g32", "w4g16-asym"])
def test_tied_tables_are_packed_once(tied, text, tmp_path):
    out = QuantizeEmbedding(QuantSpec.parse(text))(tied)
    assert packed(out) == {EMBEDDING} and isinstance(tied.weights[EMBEDDING], torch.Tensor)
    dense = out.dense()
    assert torch.allclose(out.module()(IDS), dense.module()(IDS), atol=1e-5)
    assert not torch.equal(out.module()(IDS), tied.module()(IDS))
    save(out, tmp_path / "m")
    back = load(tmp_path / "m")
    assert back.fingerprint() == out.fingerprint() and torch.equal(back.module()(IDS), out.module()(IDS))
    assert "QuantizeEmbedding" in back.history[-1]


def test_untied_tables_are_packed_separately(tiny):
    out = QuantizeEmbedding(QuantSpec(8, 64), head_spec=QuantSpec(4, 16))(tiny)
    assert out.weights[EMBEDDING].grid.bits == 8 and out.weights[HEAD].grid.bits == 4
    table = out.weights[EMBEDDING].dequantize()
    assert torch.equal(out.module().model.embed_tokens(IDS), table[IDS])
    by_hand = tiny.replace(weights={EMBEDDING: table, HEAD: out.weights[HEAD].dequantize()})
    assert torch.allclose(out.module()(IDS), by_hand.module()(IDS), atol=1e-5)
    assert packed(QuantizeEmbedding(head=False)(tiny)) == {EMBEDDING}
    assert packed(QuantizeEmbedding()(tiny)) == {EMBEDDING, HEAD}


def test_eight_bits_cost_almost_nothing_and_four_little(tiny):
    reference = tiny.module()(IDS).log_softmax(-1)

    def divergence(graph):
        return (reference.exp() * (reference - graph.module()(IDS).log_softmax(-1))).sum(-1).mean().item()

    eight, four = (divergence(QuantizeEmbedding(QuantSpec(bits, 16))(tiny)) for bits in (8, 4))
    assert eight < 1e-3 < four < 0.2


def test_it_goes_with_a_pass_over_the_linears(tied):
    out = QuantizeEmbedding(QuantSpec(8, 32))(RTN(QuantSpec(4, 16))(tied))
    assert EMBEDDING in packed(out) and len(packed(out)) > 5
    again = RTN(QuantSpec(4, 16))(QuantizeEmbedding(QuantSpec(8, 32))(tied))
    assert torch.equal(out.module()(IDS), again.module()(IDS))
    assert out.nbytes < RTN(QuantSpec(4, 16))(tied).nbytes


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_export_holds_the_same_integers(tie, bits, tmp_path):
    pytest.importorskip("onnxruntime")
    from tinycompress.export import export, read

    graph = random_graph(
        Config(
            vocab_size=128, hidden_size=64, head_dim=16, layers=(Layer(4, 2, 96),), max_position=64, tie_embeddings=tie
        )
    )
    graph = QuantizeEmbedding(QuantSpec(bits, 32))(RTN(QuantSpec(4, 32))(graph))
    assert export(graph, tmp_path / "onnx", progress=False)["checks"]["passed"]
    assert read(tmp_path / "onnx").fingerprint() == graph.fingerprint()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda g: QuantizeEmbedding(QuantSpec(4, 48))(g), r"embed_tokens.*48.*64 inputs"),
        (lambda g: QuantizeEmbedding()(QuantizeEmbedding()(g)), r"embed_tokens.*already w8g64"),
        (lambda g: QuantizeEmbedding()(RTN(QuantSpec(4, 16), head=True)(g)), r"lm_head.*already w4g16.*head=False"),
        (lambda g: QuantizeEmbedding(QuantSpec(search="weighted")), r"spec\.search.*weighted.*'mse'"),
        (lambda g: QuantizeEmbedding(head=False, head_spec=QuantSpec()), "head_spec"),
    ],
)
def test_bad_input_is_named(tiny, make, message):
    with pytest.raises(InputError, match=message):
        make(tiny)


def test_tied_tables_have_one_grid(tied):
    for step in (QuantizeEmbedding(head=False), QuantizeEmbedding(head_spec=QuantSpec(4, 32))):
        with pytest.raises(InputError, match="one table"):
            step(tied)
    with pytest.raises(InputError, match="NaN"):
        QuantizeEmbedding()(tied.replace(weights={EMBEDDING: torch.full((128, 64), float("nan"))}))


def test_the_recipe_packs_the_embedding_last_and_checks_it_first(tiny):
    recipe = Options(quantize="w4g16", quantize_method="rtn", quantize_embedding="w8g64").recipe(tiny.config)
    assert recipe.foretell(tiny)[-1].graph.config == tiny.config
    assert [type(step).__name__ for step in recipe.passes(tiny)] == ["RTN", "QuantizeEmbedding"]
    with pytest.raises(InputError, match=r"embed_tokens.*48"):
        Options(quantize_embedding="w8g48").recipe(tiny.config).foretell(tiny)
    tied = dataclasses.replace(tiny.config, tie_embeddings=True)
    (step,) = Options(quantize_embedding="w8").recipe(tied).foretell(random_graph(tied))
    assert step.graph.config == tied and str(step.specs[EMBEDDING]) == "w8"
