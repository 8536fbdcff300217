"""Frequencies against published vectors and transformers' own tables."""

import dataclasses
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinycompress.checkpoints.hf import config_to_hf
from tinycompress.checkpoints.hf_rope import rope_from_hf
from tinycompress.context.scale_rope import METHODS, UNTRAINED, ChooseRope, ScaleRope, scale_rope
from tinycompress.errors import InputError
from tinycompress.evaluation.perplexity import perplexity
from tinycompress.graph.config import Config, Layer
from tinycompress.graph.graph import Graph
from tinycompress.graph.presets import LLAMA_2_7B, SMOLLM2_135M, TINYLLAMA_1_1B
from tinycompress.graph.rope import Rope
from tinycompress.recipe import Options


@pytest.mark.parametrize("config, ends", [(TINYLLAMA_1_1B, (8, 21)), (LLAMA_2_7B, (20, 46)), (SMOLLM2_135M, (10, 20))])
def test_yarn_ramp_ends(config, ends):
    rope = scale_rope(config.rope, 4 * config.max_position, config.max_position, config.head_dim, "yarn")
    assert rope.yarn_range(config.head_dim) == ends


@pytest.mark.parametrize("factor, theta", [(2, 20452), (4, 41829), (8, 85550)])
def test_ntk_theta(factor, theta):
    assert round(scale_rope(Rope(), 2048 * factor, 2048, 64, "ntk").theta) == theta


@pytest.mark.parametrize("factor, scale", [(2, 1.0693), (4, 1.1386), (8, 1.2079)])
def test_yarn_attention_factor(factor, scale):
    assert Rope(type="yarn", factor=factor, original_max_position=2048).attention_scale() == pytest.approx(
        scale, abs=5e-5
    )


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
    if kind == "yarn":
        extra = draw(
            st.fixed_dictionaries(
                {"truncate": st.booleans()},
                optional={
                    "attention_factor": st.floats(0.5, 2),
                    "beta_fast": st.floats(8, 64),
                    "beta_slow": st.floats(0.5, 4),
                },
            )
            | st.just({"mscale": 0.7, "mscale_all_dim": 0.5})
        )
    if kind == "llama3":
        extra = dict(low_freq_factor=draw(st.floats(0.5, 2)), high_freq_factor=draw(st.floats(3, 8)))
    if kind == "longrope":
        numbers = st.integers(0, 99).map(lambda seed: tuple(random.Random(seed).uniform(1, 32) for _ in range(d // 2)))
        factor = float(draw(st.integers(1, 16)))  # transformers derives it from two whole lengths
        extra = dict(short_factor=draw(numbers), long_factor=draw(numbers))
    if kind == "default":
        factor = 1.0
    return Rope(theta=theta, type=kind, factor=factor, original_max_position=original, **extra), d


@settings(max_examples=50, deadline=None)
@given(scaled(), st.sampled_from([0.5, 1.5, 4.0]))
def test_frequencies_equal_transformers(case, share):
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
    from transformers import LlamaConfig

    rope, d = case
    original = rope.original_max_position
    length = int(original * share)
    fields = dict(rope_type=rope.type, factor=rope.factor, original_max_position_embeddings=original)
    fields |= (
        dict(low_freq_factor=rope.low_freq_factor, high_freq_factor=rope.high_freq_factor)
        if rope.type == "llama3"
        else {}
    )
    if rope.type == "yarn":
        optional = dict(attention_factor=rope.attention_factor, mscale=rope.mscale, mscale_all_dim=rope.mscale_all_dim)
        fields |= dict(beta_fast=rope.beta_fast, beta_slow=rope.beta_slow, truncate=rope.truncate) | {
            k: v for k, v in optional.items() if v
        }
    fields |= (
        dict(short_factor=list(rope.short_factor), long_factor=list(rope.long_factor))
        if rope.type == "longrope"
        else {}
    )
    config = LlamaConfig(
        hidden_size=4 * d, num_attention_heads=4, head_dim=d, rope_theta=rope.theta, max_position_embeddings=original
    )
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
    assert (out.config.rope.type, out.config.rope.factor, out.config.max_position) == (
        "linear",
        4.0,
        4 * tiny.config.max_position,
    )
    assert out.history == (f"ScaleRope(context={out.config.max_position}, method='linear')",)
    again = ScaleRope(context=8 * tiny.config.max_position, method="linear")(out)
    assert again.config.rope.factor == 8.0 and again.config.rope.original_max_position == tiny.config.max_position


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=10, deadline=None)
@given(
    head_dim=st.sampled_from([4, 8, 64, 96]),
    times=st.sampled_from([1, 1.5, 2, 4, 8]),
    theta=st.sampled_from([1e4, 1e5]),
)
def test_a_scaled_config_means_the_same_in_transformers(method, head_dim, times, theta):
    """From ScaleRope through config.json to transformers' own module, at a length within and one beyond the trained
    one."""
    pytest.importorskip("transformers")
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = Config(
        vocab_size=8,
        hidden_size=4 * head_dim,
        head_dim=head_dim,
        layers=(Layer(4, 2, 8),),
        rope=Rope(theta=theta),
        max_position=64,
    )
    scaled = ScaleRope(round(64 * times), method)(Graph.random(config)).config
    data = config_to_hf(scaled, torch.float32)
    read, length = rope_from_hf(data, head_dim, "config.json")
    if method == "linear" or method == "ntk":  # these carry no trained length in a config.json
        read = dataclasses.replace(read, original_max_position=64)
    assert (read, length) == (scaled.rope, scaled.max_position)
    five = {k: v for k, v in data.items() if k not in ("rope_theta", "rope_scaling")}
    parameters = (data["rope_scaling"] or {"rope_type": "default"}) | {"rope_theta": data["rope_theta"]}
    assert rope_from_hf(five | {"rope_parameters": parameters}, head_dim, "") == rope_from_hf(data, head_dim, "")
    theirs = LlamaRotaryEmbedding(LlamaConfig(**data))
    for T in {min(16, scaled.max_position), scaled.max_position}:
        tables = theirs(torch.zeros(1), torch.arange(T)[None])
        torch.testing.assert_close(scaled.rope.inv_freq(head_dim, T), theirs.inv_freq, atol=0, rtol=1e-6)
        assert scaled.rope.attention_scale() == pytest.approx(theirs.attention_scaling, rel=1e-6)
        for a, b in zip(
            tables, scaled.rope.tables(head_dim, T)
        ):  # an angle is as far off as its frequency, times the position
            torch.testing.assert_close(
                a[0, :, : head_dim // 2], b, atol=1e-6 * (T if method == "dynamic" else 1), rtol=1e-6
            )


def test_yarn_by_one_is_the_unscaled_model(tiny):
    same = ScaleRope(tiny.config.max_position, "yarn")(tiny)
    ids = torch.arange(tiny.config.max_position)[None]
    torch.testing.assert_close(same.module()(ids), tiny.module()(ids), atol=1e-5, rtol=0)


def test_dynamic_is_unscaled_within_the_trained_length_and_ntk_beyond():
    dynamic = scale_rope(Rope(), 8192, 2048, 64, "dynamic")
    assert torch.equal(dynamic.inv_freq(64, 2048), Rope().inv_freq(64))
    theta = 1e4 * (4 * 4096 / 2048 - 3) ** (64 / 62)  # s·l/L - (s - 1) at l = 4096
    torch.testing.assert_close(dynamic.inv_freq(64, 4096), Rope(theta=theta).inv_freq(64))
    assert dynamic.varies_with_length


def test_ntk_by_parts_is_yarn_without_its_temperature():
    parts, yarn = (scale_rope(Rope(), 8192, 2048, 64, method) for method in ("ntk-by-parts", "yarn"))
    assert torch.equal(parts.inv_freq(64), yarn.inv_freq(64))
    assert parts.attention_scale() == 1.0 < yarn.attention_scale()
    with pytest.raises(InputError, match="already scaled"):
        scale_rope(parts, 16384, 8192, 64, "yarn")
    assert scale_rope(parts, 16384, 8192, 64, "ntk-by-parts").factor == 8


def test_a_linear_config_without_its_trained_length_is_scaled_from_there():
    rope, length = rope_from_hf(
        {"max_position_embeddings": 8192, "rope_scaling": {"type": "linear", "factor": 4.0}}, 64, ""
    )
    again = scale_rope(rope, 16384, length, 64, "linear")
    assert (again.factor, again.original_max_position) == (8.0, 2048)


@pytest.mark.parametrize("kind", ["yarn", "llama3", "longrope"])
def test_an_original_length_beyond_the_stretched_one_is_refused(kind):
    scaling = {
        "rope_type": kind,
        "factor": 2.0,
        "original_max_position_embeddings": 4096,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
    with pytest.raises(
        InputError, match=r"original_max_position_embeddings.*4096 with max_position_embeddings 2048.*at most"
    ):
        rope_from_hf({"max_position_embeddings": 2048, "rope_scaling": scaling}, 64, "config.json")


def test_dynamic_with_two_original_lengths_is_refused():
    scaling = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 1024}
    with pytest.raises(InputError, match=r"1024 with max_position_embeddings 2048.*leave the other out"):
        rope_from_hf({"max_position_embeddings": 2048, "rope_scaling": scaling}, 64, "config.json")


def test_longrope_with_one_list_does_not_vary():
    same = dict(short_factor=(1.0, 2.0), long_factor=(1.0, 2.0))
    assert not Rope(type="longrope", factor=2.0, original_max_position=8, **same).varies_with_length
    assert Rope(
        type="longrope", factor=2.0, original_max_position=8, **(same | {"short_factor": (1.0, 1.0)})
    ).varies_with_length


def test_the_best_method_is_chosen_on_the_text(tiny):
    text = torch.randint(128, (2, 128), generator=torch.Generator().manual_seed(0))
    losses = {method: perplexity(ScaleRope(128, method)(tiny).module(), text).nll.mean().item() for method in UNTRAINED}
    best = min(losses, key=losses.__getitem__)
    chosen = ChooseRope(text)(tiny)
    assert len(set(losses.values())) == 3 and chosen.config == ScaleRope(128, best)(tiny).config
    assert chosen.history == (f"ScaleRope(context=128, method='{best}')",)
    others = tuple(method for method in UNTRAINED if method != best)
    assert ChooseRope(text, others)(tiny).history != chosen.history
    with pytest.raises(InputError, match="at least one window"):
        ChooseRope(text[:0])(tiny)
    with pytest.raises(InputError, match=r"magic.*ntk-by-parts"):
        ChooseRope(text, ("magic",))


def test_a_recipe_measures_the_scaling_when_asked(tiny):
    def names(options):
        return [step["name"] for step in options.steps(tiny.config)]

    auto = Options(context=128, rope_method="auto")
    assert names(auto) == names(Options(context=128)) == ["ChooseRope"]
    assert names(Options(context=128, rope_method="yarn")) == ["ScaleRope"] and names(Options()) == []
    recipe = auto.recipe(tiny.config)
    assert recipe.foretell(tiny)[-1].graph.config.max_position == 128
    text = torch.randint(128, (1, 128), generator=torch.Generator().manual_seed(0))
    (step,) = recipe.passes(tiny, tokens=text)
    assert step(tiny).config == ChooseRope(text)(tiny).config
    with pytest.raises(InputError, match="present context, 64"):
        Options(context=32, rope_method="auto").recipe(tiny.config).foretell(tiny)
    with pytest.raises(InputError, match=r"Options\.rope_method.*'magic'.*auto \| linear"):
        Options(rope_method="magic")


def test_a_recipe_without_a_method_keeps_the_model_s_own(tiny):
    for method in ("yarn", "ntk-by-parts", "linear"):
        graph = ScaleRope(128, method)(tiny)
        recipe = Options(context=256).recipe(graph.config)
        (step,) = recipe.passes(graph)
        assert step == ScaleRope(256, method) and recipe.foretell(graph)[-1].graph.config == step(graph).config


@pytest.mark.parametrize("method", METHODS)
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
    with pytest.raises(
        InputError, match=r"ScaleRope.context.*at least the model's present context, 64.*factor below 1"
    ):
        ScaleRope(context=32)(tiny)
    with pytest.raises(InputError, match=r"ScaleRope.context.*positive"):
        ScaleRope(context=0)
    with pytest.raises(InputError, match=r"head_dim for ntk.*at least 4"):
        scale_rope(Rope(), 128, 64, 2, "ntk")


YARN = dict(type="yarn", factor=2.0, original_max_position=64)
LONG = dict(type="longrope", factor=2.0, original_max_position=64, long_factor=(1.0,))


@pytest.mark.parametrize(
    "bad, match",
    [
        (dict(type="spiral"), "rope.type.*spiral.*longrope"),
        (dict(factor=0.5), "rope.factor.*0.5.*at least 1"),
        (dict(theta=float("nan")), "rope.theta"),
        (dict(type="yarn", factor=2.0), "original_max_position.*yarn"),
        (YARN | dict(attention_factor=0.0), "attention_factor.*above 0"),
        (YARN | dict(beta_fast=1.0, beta_slow=2.0), "beta_fast > beta_slow"),
        (
            dict(type="llama3", factor=2.0, original_max_position=64, high_freq_factor=1.0),
            "high_freq_factor > low_freq_factor",
        ),
        (LONG | dict(short_factor=(-1.0,)), "short_factor.*above 0"),
        (LONG, "short_factor.*empty"),
    ],
)
def test_a_rope_that_cannot_be_is_refused(bad, match):
    with pytest.raises(InputError, match=match):
        Rope(**bad)
