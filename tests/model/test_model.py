"""The forward against transformers and against itself: cache, chunks, sampling, sharing."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinycompress.errors import InputError
from tinycompress.graph.config import Config, Layer
from tinycompress.graph.edit import cut
from tinycompress.graph.graph import Graph
from tinycompress.graph.quant_tensor import QuantSpec
from tinycompress.graph.rope import Rope
from tinycompress.model.attention import attend
from tinycompress.model.sampling import Draw
from tinycompress.quantization.rtn import RTN

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3]])


@settings(max_examples=15, deadline=None)
@given(
    kv=st.integers(1, 3), group=st.integers(1, 3), hidden=st.sampled_from([24, 40]), head_dim=st.sampled_from([8, 16]),
    tied=st.booleans(), biased=st.booleans(), layers=st.integers(1, 3),
)  # fmt: skip
def test_logits_equal_transformers(kv, group, hidden, head_dim, tied, biased, layers):
    pytest.importorskip("transformers")
    biases = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"}) if biased else frozenset()
    config = Config(
        vocab_size=32,
        hidden_size=hidden,
        head_dim=head_dim,
        layers=(Layer(kv * group, kv, 56),) * layers,
        tie_embeddings=tied,
        biases=biases,
        max_position=64,
    )
    graph = Graph.random(config, std=0.2)
    theirs = graph.to_hf()
    with torch.no_grad():
        assert torch.allclose(graph.module()(IDS), theirs(IDS).logits, atol=1e-4)
    back = Graph.from_hf(theirs)
    name = "model.layers.0.mlp.up_proj.weight"
    assert back.weights[name].data_ptr() == theirs.state_dict()[name].data_ptr()
    assert torch.equal(back.module()(IDS), graph.module()(IDS))


ROPES = [
    Rope(),
    Rope(type="linear", factor=2.0, original_max_position=8),
    Rope(type="yarn", factor=4.0, original_max_position=8),
    Rope(type="llama3", factor=4.0, original_max_position=8),
]


@pytest.mark.parametrize("rope", ROPES, ids=lambda r: r.type)
@pytest.mark.parametrize("chunks", [[16], [1] * 16, [5, 1, 7, 3]])
@pytest.mark.parametrize("kind", ["nonuniform", "peculiar"])
def test_the_cache_changes_nothing(kind, rope, chunks, request):
    graph = request.getfixturevalue(kind)
    graph = graph.replace(config=dataclasses.replace(graph.config, rope=rope))
    model = graph.module(dtype=torch.float64)
    whole = model(IDS)
    cache = model.new_cache(1, 16)
    parts = torch.cat([model(piece, cache) for piece in IDS.split(chunks, dim=1)], 1)
    assert torch.allclose(parts, whole, atol=1e-10)


def test_dynamic_rope_turns_cached_keys_again(tiny):
    """With frequencies that depend on the length, a cached decode equals a fresh forward at that length.

    One layer: a deeper one caches keys made from hidden states at shorter lengths, which no rotation can mend."""
    rope = Rope(type="dynamic", factor=4.0, original_max_position=8)
    model = cut(tiny.replace(config=dataclasses.replace(tiny.config, rope=rope)), "layers", [0]).module(
        dtype=torch.float64
    )
    cache = model.new_cache(1, 16)
    for t in range(16):
        step = model(IDS[:, t : t + 1], cache)
        assert torch.allclose(step[0, -1], model(IDS[:, : t + 1])[0, -1], atol=1e-10)


def test_a_full_cache_says_so(tiny):
    model = tiny.module()
    with pytest.raises(InputError, match="at most 4"):
        model(IDS, model.new_cache(1, 4))


def test_parameters_are_the_graphs_own_tensors(tiny):
    module = tiny.module()
    for name, parameter in module.state_dict().items():
        assert (
            parameter.data_ptr()
            == tiny.weights[tiny.config.weight_name(name[:-7]) if name.endswith("weight") else name].data_ptr()
        ), name
    assert set(dict(module.named_parameters())) == set(tiny.weights)


def test_gradients_reach_every_parameter(nonuniform):
    module = nonuniform.module().requires_grad_(True)
    module(IDS).logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
    with torch.no_grad():
        quick = module(IDS)
    assert torch.allclose(module(IDS), quick, atol=1e-5)  # the in-place path computes what the training path does


def test_a_packed_embedding_and_head_run(tiny):
    spec = QuantSpec(8, 16)
    from tinycompress.quantization.rtn import rtn_quantize

    names = ("model.embed_tokens.weight", "lm_head.weight")
    graph = tiny.replace(weights={n: rtn_quantize(tiny.weights[n], spec) for n in names})
    dense = tiny.replace(weights={n: graph.weights[n].dequantize() for n in names})
    assert torch.allclose(graph.module()(IDS), dense.module()(IDS), atol=1e-5)


def test_quantized_graphs_run_packed(tiny):
    graph = RTN(QuantSpec(4, 16))(tiny)
    dense = graph.replace(
        weights={n: w.dequantize() for n, w in graph.weights.items() if not isinstance(w, torch.Tensor)}
    )
    assert torch.allclose(graph.module()(IDS), dense.module()(IDS), atol=1e-4)


def test_greedy_generation_is_the_argmax_of_the_forward(tiny):
    model = tiny.module()
    seen = []
    out = model.generate(IDS, 6, stop=(), on_token=seen.append)
    ids = IDS
    for token in out.tolist():
        assert token == int(model(ids)[0, -1].argmax())
        ids = torch.cat((ids, torch.tensor([[token]])), 1)
    assert seen == out.tolist() and len(out) == 6


def test_generation_stops_at_an_end_token(tiny):
    model = tiny.module()
    first = int(model.generate(IDS, 1, stop=())[0])
    assert len(model.generate(IDS, 6, stop=(first,))) == 0


def test_sampling_is_seeded_and_bounded(tiny):
    model = tiny.module()
    a, b = (model.generate(IDS, 8, temperature=1.0, top_k=5, seed=1, stop=()) for _ in range(2))
    assert torch.equal(a, b)
    logits = torch.tensor([0.0, 5.0, 4.0, -1.0])
    g = torch.Generator().manual_seed(0)
    assert {Draw(1.0, top_k=2).token(logits, [], g) for _ in range(200)} == {1, 2}
    assert {Draw(1.0, top_p=0.5).token(logits, [], g) for _ in range(200)} == {1}
    assert {Draw(1.0, min_p=0.3).token(logits, [], g) for _ in range(200)} == {1, 2}
    assert Draw().token(logits, []) == 1
    assert Draw(repetition_penalty=2.0).token(logits, [1]) == 2


def test_ids_outside_the_vocabulary_are_refused(tiny):
    with pytest.raises(InputError, match="vocabulary"):
        tiny.module().generate(torch.tensor([[10**6]]))
    with pytest.raises(InputError, match="none"):
        tiny.module().generate(torch.empty(1, 0, dtype=torch.long))


def test_generation_ends_with_the_context(tiny):
    full = torch.arange(tiny.config.max_position)[None]
    assert len(tiny.module().generate(full[:, :-2], 10, stop=())) == 3  # the last one is not fed back
    with pytest.raises(InputError, match="context"):
        tiny.module().generate(torch.zeros(1, tiny.config.max_position + 1, dtype=torch.long))


def test_stories260k_equals_transformers(shared):
    transformers = pytest.importorskip("transformers")
    from tinycompress.checkpoints.checkpoint import load

    folder = shared / "models" / "stories260K"
    graph = load(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([[1, *graph.tokenizer.encode("Once upon a time, there was a little girl")]])  # 1 begins a text
    with torch.no_grad():
        assert torch.allclose(graph.module()(ids), theirs(ids).logits, atol=1e-4)
    ours = graph.module().generate(ids, 64, stop=())
    reference = theirs.generate(ids, max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0)[
        0, ids.shape[1] :
    ]
    assert ours.tolist() == reference.tolist()
    assert (
        graph.tokenizer.decode(ours.tolist()).strip().startswith("named Lily. She loved to play outside in the park.")
    )


def test_a_window_is_a_mask_over_all_scores(tiny):
    """The naive oracle: every score, masked to the last `window` keys."""
    q, k, v = (torch.randn(2, heads, 37, 8, dtype=torch.float64) for heads in (4, 2, 2))
    i = torch.arange(37)
    seen = (i[:, None] >= i[None]) & (i[:, None] - i[None] < 6)
    scores = q @ k.repeat_interleave(2, 1).transpose(-1, -2) / 8**0.5
    expected = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v.repeat_interleave(2, 1)
    assert torch.allclose(attend(q, k, v, 6), expected, atol=1e-12)
    assert torch.allclose(attend(q[:, :, 30:], k, v, 6), expected[:, :, 30:], atol=1e-12)
    assert torch.allclose(attend(q[:, :, 36:], k, v, 6), expected[:, :, 36:], atol=1e-12)


@pytest.mark.parametrize("int8", [False, True])
def test_a_window_bounds_the_cache(tiny, int8):
    layers = tuple(dataclasses.replace(layer, window=4) for layer in tiny.config.layers)
    windowed = tiny.replace(config=dataclasses.replace(tiny.config, layers=layers))
    model = windowed.module(dtype=torch.float64)
    cache = model.new_cache(1, 64, int8)
    assert cache.nbytes * 8 == tiny.module(dtype=torch.float64).new_cache(1, 64, int8).nbytes
    steps = torch.cat([model(IDS[:, t : t + 1], cache) for t in range(16)], 1)
    assert torch.allclose(steps, model(IDS), atol=0.5 if int8 else 1e-10)
    assert cache.layers[0][0].nbytes * 8 == tiny.module(dtype=torch.float64).new_cache(1, 64, int8).layers[0][0].nbytes


def test_a_cache_with_a_window_goes_back_as_far_as_it_remembers(tiny):
    layers = tuple(dataclasses.replace(layer, window=4) for layer in tiny.config.layers)
    model = tiny.replace(config=dataclasses.replace(tiny.config, layers=layers)).module(dtype=torch.float64)
    cache = model.new_cache(1, 16)
    whole = model(IDS)
    for piece in IDS.split(1, 1):
        model(piece, cache)
    cache.length = 15
    assert torch.allclose(model(IDS[:, 15:], cache), whole[:, 15:], atol=1e-10)
    cache.length = 6
    with pytest.raises(InputError, match="left the window"):
        model(IDS[:, 6:7], cache)
