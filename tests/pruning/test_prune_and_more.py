"""A pruned graph is a graph like any other: quantized, stretched, saved, exported, drawn."""

import torch
from pruning_cases import ids, small

from tinycompress.checkpoints.checkpoint import load, save
from tinycompress.context.scale_rope import ScaleRope
from tinycompress.graph.config import Layer
from tinycompress.graph.quant_tensor import QuantSpec
from tinycompress.pruning.prune import Prune
from tinycompress.quantization.gptq import GPTQ


def test_prune_scale_quantize_save_load(tmp_path):
    graph = small()
    tokens = ids()
    out = GPTQ(tokens, QuantSpec(4, 16))(ScaleRope(128)(Prune(tokens, "params=0.75", multiple_of=16)(graph)))
    save(out, tmp_path / "m")
    again = load(tmp_path / "m")
    assert again.config.layers == out.config.layers and len(again.history) == 3
    assert torch.equal(again.module()(tokens), out.module()(tokens))


def test_prune_quantize_export_verify(tmp_path):
    from tinycompress.export import export, verify

    graph = small(bos_token_id=1, eos_token_id=2)
    tokens = ids()
    out = GPTQ(tokens, QuantSpec(4, 16))(Prune(tokens, "params=0.75", multiple_of=16, sublayers=True)(graph))
    assert not out.config.uniform
    export(out, tmp_path / "onnx", tokens=tokens[:2], limits={"kl": 1.0, "flips": 1.0, "perplexity": 1.0})
    assert verify(tmp_path / "onnx", tokens=tokens[:2], limits={"kl": 1.0, "flips": 1.0, "perplexity": 1.0})["passed"]


def test_the_picture(tmp_path):
    graph = small()
    Prune(ids(), "params=0.8", multiple_of=16).choose(graph).draw(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    Prune(ids(), "params=0.8", multiple_of=16, allocation="uniform").choose(graph).draw(tmp_path / "plan.png")
    assert [p.name for p in tmp_path.iterdir()] == ["plan.png"]


def cut_on_every_axis(graph, tokens):
    """Three passes: KV groups; FFN channels, a layer and hidden channels; then one budget with sublayers."""
    first = Prune(tokens, keep={"kv_heads": 1}, multiple_of=16)
    second = Prune(tokens, keep={"ffn": 64, "layers": 3, "hidden": 48}, multiple_of=16)
    third = Prune(tokens, "params=0.8", multiple_of=16, sublayers=True)
    return third(second(first(graph)))


def test_a_graph_cut_on_every_axis_is_a_graph_like_any_other(tmp_path):
    from tinycompress.export import export, verify

    tokens = ids()
    graph = cut_on_every_axis(small(layers=(Layer(4, 2, 96),) * 4, bos_token_id=1, eos_token_id=2), tokens)
    assert graph.config.hidden_size == 48 and graph.config.n_layers == 3 and not graph.config.uniform
    out = GPTQ(tokens, QuantSpec(4, 16))(ScaleRope(128)(graph))
    save(out, tmp_path / "m")
    again = load(tmp_path / "m")
    assert again.config == out.config and len(again.history) == 5
    assert torch.equal(again.module()(tokens), out.module()(tokens))
    limits = {"kl": 1.0, "flips": 1.0, "perplexity": 1.0}
    export(again, tmp_path / "onnx", tokens=tokens[:2], limits=limits)
    assert verify(tmp_path / "onnx", tokens=tokens[:2], limits=limits)["passed"]
