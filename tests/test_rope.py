"""Frequencies against published vectors and transformers' own tables."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinycompress.errors import InputError
from tinycompress.graph import LLAMA_2_7B, SMOLLM2_135M, TINYLLAMA_1_1B
from tinycompress.passes.rope import ScaleRope, scale_rope
from tinycompress.rope import Rope


@pytest.mark.parametrize("config, ends", [(TINYLLAMA_1_1B, (8, 21)), (LLAMA_2_7B, (20, 46)), (SMOLLM2_135M, (10, 20))])
def test_yarn_ramp_ends(config, ends):
    rope = scale_rope(config.rope, 4 * config.max_position, config.max_position, config.head_dim, "yarn")
    assert rope.yarn_range(config.head_dim) == ends


@pytest.mark.parametrize("factor, theta", [(2, 20452), (4, 41829), (8, 85550)])
def test_ntk_theta(factor, theta):
    assert round(scale_rope(Rope(), 2048 * factor, 2048, 64, "ntk").theta) == theta


@pytest.mark.parametrize("factor, scale", [(2, 1.0693), (4, 1.1386), (8, 1.2079)])
def test_yarn_attention_factor(factor, scale):
    assert Rope(type="yarn", factor=factor, original_max_position=2048).attention_scale() == pytest.approx(scale, abs=5e-5)


def test_yarn_at_factor_one_is_the_identity():
    plain, yarn = Rope(), Rope(type="yarn", factor=1.0, original_max_position=2048)
    for a, b in zip(plain.tables(64, 100), yarn.tables(64, 100)):
        assert torch.allclose(a, b, atol=1e-6)


@st.composite
def scaled(draw):
    kind = draw(st.sampled_from(["default", "linear", "dynamic", "yarn", "llama3", "longrope"]))
    d, original = draw(st.sampled_from([8, 16, 64, 128])), draw(st.sampled_from([128, 512, 2048]))
    theta, factor = draw(st.sampled_from([1e4, 1e5, 5e5])), draw(st.floats(1, 16))
    extra = {}
    if kind == "longrope":
        numbers = st.lists(st.floats(1, 32), min_size=d // 2, max_size=d // 2).map(tuple)
        factor = float(draw(st.integers(1, 16)))  # transformers derives it from two whole lengths
        extra = dict(short_factor=draw(numbers), long_factor=draw(numbers))
    if kind == "default":
        factor = 1.0
    return Rope(theta=theta, type=kind, factor=factor, original_max_position=original, **extra), d


@settings(max_examples=60, deadline=None)
@given(scaled(), st.sampled_from([0.5, 1.5, 4.0]))
def test_frequencies_equal_transformers(case, share):
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
    from transformers import LlamaConfig

    rope, d = case
    original = rope.original_max_position
    length = int(original * share)
    fields = dict(rope_type=rope.type, factor=rope.factor, original_max_position_embeddings=original)
    fields |= dict(low_freq_factor=rope.low_freq_factor, high_freq_factor=rope.high_freq_factor) if rope.type == "llama3" else {}
    fields |= dict(short_factor=list(rope.short_factor), long_factor=list(rope.long_factor)) if rope.type == "longrope" else {}
    config = LlamaConfig(hidden_size=4 * d, num_attention_heads=4, head_dim=d, rope_theta=rope.theta, max_position_embeddings=original)
    config.rope_scaling = fields
    if rope.type == "longrope":
        config.original_max_position_embeddings, config.max_position_embeddings = original, int(original * rope.factor)
    if rope.type == "default":
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        config.rope_scaling = None
        theirs, scale = LlamaRotaryEmbedding(config).inv_freq, 1.0
    else:
        theirs, scale = rope_utils.ROPE_INIT_FUNCTIONS[rope.type](config, "cpu", seq_len=length)
    assert torch.allclose(rope.inv_freq(d, length), theirs, rtol=1e-6, atol=0)
    assert rope.attention_scale() == pytest.approx(scale, rel=1e-6)


def test_scaling_is_a_pass(tiny):
    out = ScaleRope(context=4 * tiny.config.max_position, method="linear")(tiny)
    assert (out.config.rope.type, out.config.rope.factor, out.config.max_position) == ("linear", 4.0, 4 * tiny.config.max_position)
    assert out.history == (f"ScaleRope(context={out.config.max_position}, method='linear')",)
    again = ScaleRope(context=8 * tiny.config.max_position, method="linear")(out)
    assert again.config.rope.factor == 8.0 and again.config.rope.original_max_position == tiny.config.max_position


@pytest.mark.parametrize("method", ["linear", "yarn", "ntk"])
def test_scaled_models_stay_in_range_beyond_the_original_length(tiny, method):
    out = ScaleRope(context=2 * tiny.config.max_position, method=method)(tiny)
    ids = torch.arange(2 * tiny.config.max_position)[None] % tiny.config.vocab_size
    assert torch.isfinite(out.module()(ids)).all()


def test_bad_scaling_is_refused(tiny):
    with pytest.raises(InputError, match="context"):
        ScaleRope(context=8)(tiny)
    with pytest.raises(InputError, match="linear"):
        ScaleRope(context=8192, method="magic")
    yarn = ScaleRope(context=4096, method="yarn")(tiny)
    with pytest.raises(InputError, match="already scaled"):
        ScaleRope(context=8192, method="linear")(yarn)
    for bad in (dict(type="spiral"), dict(factor=0.5), dict(theta=float("nan")), dict(type="yarn", factor=2.0)):
        with pytest.raises(InputError):
            Rope(**bad)
