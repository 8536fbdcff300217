"""Depth and hidden width: greedy removal against brute force, the slice against a naive projection."""

import pytest
import torch
from conftest import random_graph

from tinycompress.checkpoints.checkpoint import load, save
from tinycompress.errors import InputError
from tinycompress.evaluation.perplexity import perplexity
from tinycompress.graph.config import Config, Layer
from tinycompress.graph.edit import fold_norms
from tinycompress.graph.graph import Graph
from tinycompress.graph.quant_tensor import QuantSpec
from tinycompress.pruning.drop import Drop, remove, units_of
from tinycompress.pruning.slice import Slice, principal_axes
from tinycompress.quantization.gptq import GPTQ

MIXED = (Layer(4, 2, 96), Layer(6, 2, 64), Layer(0, 0, 32), Layer(4, 4, 0), Layer(3, 1, 48))


def small(layers=MIXED, **changes) -> Graph:
    return random_graph(
        Config(**(dict(vocab_size=128, hidden_size=64, head_dim=16, layers=layers, max_position=64) | changes))
    )


def ids(n: int = 6, length: int = 48) -> torch.Tensor:
    return torch.randint(128, (n, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("parts", ["layers", "attention", "ffn", "sublayers"])
def test_each_step_removes_the_unit_that_is_missed_least(parts):
    """The oracle cuts the graph and measures its perplexity, candidate by candidate."""
    graph, tokens = small(), ids(3)
    out = Drop(tokens, 2, parts)(graph)
    gone = []
    for _ in range(2):
        left = [unit for unit in units_of(graph, parts) if unit not in gone]
        values = [perplexity(remove(graph, [*gone, unit]).module(), tokens).value for unit in left]
        gone.append(left[values.index(min(values))])
    assert out.config == remove(graph, gone).config
    assert torch.equal(out.module()(tokens), remove(graph, gone).module()(tokens))


def test_removed_sublayers_add_nothing():
    graph, tokens = small(biases=frozenset({"o_proj", "down_proj"})), ids(2)
    silent = {
        n: torch.zeros_like(w)
        for n, w in graph.weights.items()
        if n.startswith(("model.layers.1.self_attn.o_", "model.layers.0.mlp.down_"))
    }
    assert len(silent) == 4
    out = remove(graph, [(1, "attention"), (0, "ffn")])
    assert torch.allclose(out.module()(tokens), graph.replace(weights=silent).module()(tokens), atol=1e-5)


def test_impossible_drops_are_refused():
    nothing = torch.zeros(0, 0, dtype=torch.long)
    for bad, names in (
        (dict(count=5), "fewer than the model's 5 layers"),
        (dict(count=-1), "a number"),
        (dict(count=1, parts="heads"), "sublayers"),
    ):
        with pytest.raises(InputError, match=names):
            Drop(nothing, **bad)(small())


def test_slicing_nothing_off_is_exact():
    graph, tokens = small(tie_embeddings=True).dense(torch.float64), ids()
    out = Slice(tokens, 64)(graph)
    assert (out.module()(tokens) - graph.module()(tokens)).abs().max() < 1e-8
    assert not out.config.tie_embeddings and out.history == ("Slice(hidden=64)",)


def test_a_slice_is_the_projection_of_the_stream():
    """float64: the sliced graph computes what the folded one computes with the stream projected after every write."""
    graph, tokens = small().dense(torch.float64), ids()
    folded, hidden = fold_norms(graph), 48
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
    graph, tokens = small().dense(torch.float64), ids()
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
    graph, tokens = small(), ids()
    out = GPTQ(tokens, QuantSpec(4, 16))(Slice(tokens, 48)(graph))
    save(out, tmp_path / "m")
    assert torch.equal(load(tmp_path / "m").module()(tokens), out.module()(tokens))


def test_impossible_slices_are_refused():
    nothing = torch.zeros(0, 0, dtype=torch.long)
    for hidden, names in ((0, "positive"), (65, "at most the model's 64")):
        with pytest.raises(InputError, match=names):
            Slice(nothing, hidden)(small())
