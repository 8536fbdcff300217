"""Hidden width: the slice against a naive projection of the stream."""

import pytest
import torch
from pruning_cases import ids, small

from tinycompress.checkpoints.checkpoint import load, save
from tinycompress.errors import InputError
from tinycompress.graph.edit import fold_norms
from tinycompress.graph.quant_tensor import QuantSpec
from tinycompress.pruning.slice import Slice, principal_axes
from tinycompress.quantization.gptq import GPTQ


def test_slicing_nothing_off_is_exact():
    graph = small(tie_embeddings=True).dense(torch.float64)
    tokens = ids()
    out = Slice(tokens, 64)(graph)
    assert (out.module()(tokens) - graph.module()(tokens)).abs().max() < 1e-8
    assert not out.config.tie_embeddings and out.history == ("Slice(hidden=64)",)


def test_a_slice_is_the_projection_of_the_stream():
    """float64: the sliced graph computes what the folded one computes with the stream projected after every write."""
    graph = small().dense(torch.float64)
    tokens = ids()
    folded = fold_norms(graph)
    hidden = 48
    states = []
    module = folded.module()
    norms = [m for name, m in module.named_modules() if name.endswith("norm")]
    for norm in norms:
        norm.register_forward_hook(lambda m, args, out: states.append(out.detach().flatten(0, -2).clone()))
    module(tokens)
    Q = principal_axes([sum(x.T @ x for x in states)])[:, :hidden]
    changed = {}
    for name, weight in folded.weights.items():  # writers project: what is cut is never written
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            changed[name] = Q @ Q.T @ weight
        elif name == "model.embed_tokens.weight":
            changed[name] = weight @ Q @ Q.T
    projected = folded.replace(weights=changed)
    out = Slice(tokens, hidden)(graph)
    assert out.config.hidden_size == hidden
    assert torch.allclose(out.module()(tokens), projected.module()(tokens), atol=1e-8)


def test_a_low_rank_stream_is_sliced_without_loss():
    graph = small().dense(torch.float64)
    tokens = ids()
    basis = torch.linalg.qr(torch.randn(64, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).Q
    flat = {n: torch.ones_like(w) for n, w in graph.weights.items() if w.dim() == 1}
    for name, weight in graph.weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            flat[name] = basis @ basis.T @ weight
        elif name == "model.embed_tokens.weight":
            flat[name] = weight @ basis @ basis.T
    graph = graph.replace(weights=flat)
    assert (Slice(tokens, 32)(graph).module()(tokens) - graph.module()(tokens)).abs().max() < 1e-8


def test_sliced_graphs_save_load_and_quantize(tmp_path):
    graph = small()
    tokens = ids()
    out = GPTQ(tokens, QuantSpec(4, 16))(Slice(tokens, 48)(graph))
    save(out, tmp_path / "m")
    assert torch.equal(load(tmp_path / "m").module()(tokens), out.module()(tokens))


def test_impossible_slices_are_refused():
    nothing = torch.zeros(0, 0, dtype=torch.long)
    for hidden, names in ((0, "positive"), (65, "at most the model's 64")):
        with pytest.raises(InputError, match=names):
            Slice(nothing, hidden)(small())


def test_the_plan_of_a_slice_is_its_config():
    graph = small(tie_embeddings=True)
    tokens = ids()
    step = Slice(tokens, 48)
    assert step.plan(graph.config) == step(graph).config
