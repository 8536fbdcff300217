"""Long context: the cache in int8, Self-Extend, LongRoPE's search, measures against length."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from context_cases import MIXED, ids_of, small
from hypothesis import given, settings
from hypothesis import strategies as st

from tinycompress.context.scale_rope import ScaleRope
from tinycompress.errors import InputError
from tinycompress.evaluation.long_context import (
    cached_nll,
    footprint,
    full_windows,
    kv_bytes,
    perplexity_interval,
    sliding_windows,
    tail_nll,
)
from tinycompress.evaluation.passkey import Passkey, Retrieval, heat_map, passkey, retrieves
from tinycompress.graph.config import Layer
from tinycompress.graph.rope import Rope
from tinycompress.model.attention import attend
from tinycompress.model.kv_cache import quantize_rows
from tinycompress.model.self_extend import SelfExtend

# Attention behind a cache -------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(T=st.integers(1, 9), past=st.integers(0, 9), kv=st.integers(1, 2), group=st.integers(1, 3))
def test_attention_in_pieces_is_the_masked_softmax(T, past, kv, group):
    g = torch.Generator().manual_seed(T * past)
    q = torch.randn(2, kv * group, T, 4, generator=g, dtype=torch.float64)
    k, v = (torch.randn(2, kv, past + T, 4, generator=g, dtype=torch.float64) for _ in "kv")
    keys, values = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = (q @ keys.transpose(-1, -2) / 2).masked_fill(
        ~torch.ones(T, past + T, dtype=torch.bool).tril(past), -torch.inf
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tinycompress.model.attention.MASK_ROWS", 4)
        torch.testing.assert_close(attend(q, k, v), scores.softmax(-1) @ values)


# int8 ---------------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 9), st.sampled_from([1e-30, 1e-3, 1.0, 1e4]), st.integers(0, 99))
def test_int8_is_off_by_half_a_scale_at_most(rows, d, size, seed):
    x = torch.randn(rows, d, generator=torch.Generator().manual_seed(seed)) * size
    q, scales = quantize_rows(x)
    assert q.dtype == torch.int8 and scales.shape == (rows, 1)
    bound = x.abs().amax(-1, keepdim=True) / 254
    assert ((q * scales - x).abs() <= bound * (1 + 1e-5)).all()
    assert q.abs().amax(-1).min() == 127  # the whole range is used


def test_int8_of_zeros_is_zeros():
    q, scales = quantize_rows(torch.zeros(2, 4))
    assert not q.any() and torch.isfinite(scales).all()


@pytest.mark.parametrize("layers", [MIXED, ((Layer(4, 2, 96),) * 2)], ids=["mixed", "uniform"])
def test_an_int8_cache_is_near_and_small(layers):
    graph = small(layers=layers)
    model, ids = graph.module(), ids_of(graph, 2, 16)
    plain, packed = model.new_cache(2, 16), model.new_cache(2, 16, int8=True)
    for cache in (plain, packed):
        cache.logits = torch.cat([model(piece, cache) for piece in ids.split([7, 1, 5, 3], 1)], 1)
    error = (packed.logits - plain.logits).abs().max()
    assert 0 < error < 0.05 * plain.logits.abs().max()
    config = graph.config
    assert plain.nbytes == 2 * kv_bytes(config, 16) and packed.nbytes == 2 * kv_bytes(config, 16, int8=True)
    assert packed.nbytes < 0.32 * plain.nbytes  # (16 + 4) / 64
    with pytest.raises(InputError, match="at most 16"):
        model(ids[:, :1], packed)


def test_an_int8_cache_keeps_unrotated_keys_too():
    graph = small(rope=Rope(type="dynamic", factor=4.0, original_max_position=8))
    model, ids = graph.module(), ids_of(graph, 1, 20)
    logits = [
        torch.cat([model(piece, cache) for piece in ids.split(5, 1)], 1)
        for cache in (model.new_cache(1, 20), model.new_cache(1, 20, int8=True))
    ]
    assert 0 < (logits[0] - logits[1]).abs().max() < 0.05 * logits[0].abs().max()


# Self-Extend --------------------------------------------------------------------------------------------------------


def test_self_extend_within_its_window_is_ordinary_attention(nonuniform):
    plain, model = (nonuniform.module(dtype=torch.float64) for _ in range(2))
    ids = ids_of(nonuniform, 2, 24)
    assert torch.allclose(model.extend(SelfExtend(group=4, window=24))(ids), plain(ids), atol=1e-8)
    assert not torch.allclose(
        nonuniform.module(dtype=torch.float64).extend(SelfExtend(group=4, window=8))(ids), plain(ids), atol=1e-3
    )


def test_self_extend_with_groups_of_one_is_ordinary_attention(nonuniform):
    ids = ids_of(nonuniform, 1, 40)
    model = nonuniform.module(dtype=torch.float64).extend(SelfExtend(group=1, window=4))
    assert torch.allclose(model(ids), nonuniform.module(dtype=torch.float64)(ids), atol=1e-8)


@pytest.mark.parametrize("chunks", [[50], [1] * 50, [9, 1, 30, 10]])
def test_self_extend_is_the_paper_s_distances(tiny, chunks):
    """Against attention with an explicit distance for every pair, one rotation a pair; and through the cache."""
    option = SelfExtend(group=4, window=8)
    graph = tiny.replace(config=dataclasses.replace(tiny.config, layers=tiny.config.layers[:1]))
    model, ids = graph.module(dtype=torch.float64).extend(option), ids_of(graph, 1, 50)
    assert model.config.max_position == (64 - 8) * 4 + 8
    seen = []
    option_attend = SelfExtend.attend

    def watched(self, q, k, v, turn):
        out = option_attend(self, q, k, v, turn)
        seen.append((q, k, v, out))
        return out

    cache = model.new_cache(1, 50)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SelfExtend, "attend", watched)
        patch.setattr("tinycompress.model.self_extend.ROWS", 7)
        for piece in ids.split(chunks, 1):
            model(piece, cache)
    cos, sin = (t.double() for t in graph.config.rope.tables(16, 64))
    q, (_, k, v, _) = torch.cat([q for q, *_ in seen], 2), seen[-1]
    out = torch.cat([out for *_, out in seen], 2)
    for head, i in [(0, 49), (1, 20), (3, 8), (2, 7), (3, 0)]:
        scores = []
        for j in range(i + 1):
            near = i - j < option.window
            distance = i - j if near else i // 4 + option.window - option.window // 4 - j // 4
            a, b = q[0, head, i].chunk(2)
            turned = torch.cat((a * cos[distance] - b * sin[distance], b * cos[distance] + a * sin[distance]))
            scores.append(turned @ k[0, head // 2, j] / 4)
        expected = torch.stack(scores).softmax(0) @ v[0, head // 2, : i + 1]
        assert torch.allclose(out[0, head, i], expected, atol=1e-6)  # tables are float32


def test_self_extend_refuses(tiny):
    for bad in (dict(group=0), dict(window=0), dict(window=2.5)):
        with pytest.raises(InputError, match=r"SelfExtend.*positive integer"):
            SelfExtend(**bad)
    with pytest.raises(InputError, match=r"SelfExtend.window.*64.*less than the trained length, 64"):
        tiny.module().extend(SelfExtend(window=64))
    with pytest.raises(InputError, match=r"yarn scaling.*unscaled"):
        ScaleRope(128, "yarn")(tiny).module().extend(SelfExtend(window=8))


# LongRoPE -----------------------------------------------------------------------------------------------------------


# Measures -----------------------------------------------------------------------------------------------------------


def test_windows_are_counted_as_they_say(tiny):
    model, stream = tiny.module(), ids_of(tiny, 200)
    oracle = F.cross_entropy(model(stream[:64][None])[0, :-1], stream[1:64], reduction="none").double()
    assert full_windows(model, stream, 64, 3)[0].item() == pytest.approx(oracle.mean().item(), abs=1e-5)
    assert len(full_windows(model, stream, 64)) == 3
    assert torch.allclose(tail_nll(model, stream[:64], 10).double(), oracle[-10:], atol=1e-5)
    slid = sliding_windows(model, stream, length=32, stride=8, first=64, windows=4)
    last = model(stream[64 + 32 - 32 : 64 + 32][None])[0, -9:-1]
    assert slid[3].item() == pytest.approx(F.cross_entropy(last, stream[88:96]).item(), abs=1e-5)
    interval = perplexity_interval(slid)
    assert interval.low < interval.value < interval.high and interval.value == pytest.approx(slid.mean().exp().item())


@pytest.mark.parametrize("method", ["yarn", "ntk"])
def test_nll_through_the_cache_is_that_of_the_forward(nonuniform, method, monkeypatch):
    graph = ScaleRope(128, method)(nonuniform)
    model, ids = graph.module(), ids_of(graph, 100)
    monkeypatch.setattr("tinycompress.evaluation.long_context.CHUNK", 24)
    expected = F.cross_entropy(model(ids[None])[0, :-1], ids[1:], reduction="none")
    assert torch.allclose(cached_nll(model, ids), expected, atol=1e-4)
    packed = cached_nll(model, ids, int8=True)
    assert not torch.equal(packed, expected) and (packed.mean() - expected.mean()).abs() < 0.05


def test_footprint(tiny):
    model = tiny.module()
    float32, int8 = (footprint(model, 48, int8=int8, steps=4) for int8 in (False, True))
    assert float32.kv_bytes == kv_bytes(tiny.config, 48) == 2 * 4 * 48 * 16 * 4
    assert int8.kv_bytes == 2 * 4 * 48 * (16 + 4)
    assert min(float32.prefill_tokens_per_second, float32.decode_tokens_per_second) > 0


def test_lengths_that_do_not_fit_are_refused(tiny):
    model, stream = tiny.module(), ids_of(tiny, 200)
    for call, match in [
        (lambda: full_windows(model, stream, 64, 4), r"windows of 64 tokens.*1 … 3: the text has 200"),
        (lambda: full_windows(model, stream, 100), "at most the model's context, 64"),
        (lambda: sliding_windows(model, stream, 128, 8, 128, 2), "at most the model's context, 64.*ScaleRope"),
        (lambda: sliding_windows(model, stream, 32, 8, 4, 2), "first target of at least 24"),
        (lambda: sliding_windows(model, stream, 32, 8, 64, 20), r"1 … 17"),
        (lambda: cached_nll(model, stream), "at most the model's context, 64"),
        (lambda: footprint(model, 65), "at most the model's context, 64"),
        (lambda: footprint(model, 8, steps=8), r"steps.*1 … 7"),
    ]:
        with pytest.raises(InputError, match=match):
            call()


class Letters:
    """A tokenizer of bytes."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())


@settings(max_examples=30, deadline=None)
@given(
    length=st.integers(260, 600),
    depth=st.floats(0, 1),
    key=st.text("0123456789", min_size=5, max_size=5),
    bos=st.sampled_from([None, 1]),
)
def test_a_passkey_prompt_has_its_length_and_depth(length, depth, key, bos):
    task = Passkey(
        intro="Find the key.",
        filler="The grass is green.",
        statement="The pass key is {key}.",
        question="The pass key is",
    )
    prompt, answer = task.prompt(Letters(), length, depth, key, bos)
    assert len(prompt) + len(answer) == length
    text = bytes(prompt.tolist()[bos is not None :]).decode()
    assert bytes(answer.tolist()).decode() == f" {key}" and text.endswith("The pass key is") and text.count(key) == 1
    room = length - len(task.intro) - len(task.statement.format(key=key)) - len(task.question) - 6 - (bos is not None)
    assert text.index("The pass key is ") == len(task.intro) + round(depth * room)


def test_retrieval_counts_what_greedy_decoding_writes(tiny):
    model = tiny.module()
    prompt = ids_of(tiny, 20)
    greedy = model.generate(prompt, 5, stop=())
    assert retrieves(model, prompt, greedy)
    wrong = greedy.clone()
    wrong[3] = (wrong[3] + 1) % 128
    assert not retrieves(model, prompt, wrong)


def test_passkey_grid_and_its_picture(tmp_path):
    graph = small(max_position=512)
    task = Passkey(intro="Find.", filler="Grass.", statement="Key {key}.", question="Key", digits=1)
    result = passkey(graph.module(), Letters(), [40, 80], [0.0, 1.0], trials=2, task=task)
    assert result.right == ((0, 0), (0, 0)) and result.share == 0.0  # random weights
    some = Retrieval((512, 1024), (0.0, 0.5, 1.0), ((2, 1, 0), (0, 0, 2)), 2)
    assert some.share == pytest.approx(5 / 12)
    heat_map({"yarn": some, "ntk": result}, tmp_path / "maps" / "passkey.png")
    files = list((tmp_path / "maps").iterdir())
    assert [f.name for f in files] == ["passkey.png"] and files[0].read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match=r"at least .* tokens: the task without filler"):
        task.prompt(Letters(), 5, 0.0, "1")
    with pytest.raises(InputError, match=r"passkey depth.*0 … 1"):
        task.prompt(Letters(), 50, 1.5, "1")
    with pytest.raises(InputError, match="at most the model's context, 512"):
        passkey(graph.module(), Letters(), [1024], trials=1)
    with pytest.raises(InputError, match="tokenizer"):
        passkey(graph.module(), None, [40])
