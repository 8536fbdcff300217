"""Keys of GGUF files that change the numbers: read as transformers computes them, or refused by name."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import random_graph
from gguf_files import write

from tinycompress.checkpoints.checkpoint import load
from tinycompress.checkpoints.gguf_keys import KNOWN, WITHOUT_EFFECT
from tinycompress.checkpoints.hf import graph_from_model
from tinycompress.errors import InputError
from tinycompress.graph.config import Config, Layer
from tinycompress.graph.rope import Rope

TINY = Config(vocab_size=96, hidden_size=64, head_dim=16, layers=(Layer(4, 2, 96),) * 2, max_position=256)
IDS = torch.arange(200)[None] * 7 % 96


def file_with(tmp_path, keys, config=TINY, tensors=(), prefix="llama."):
    """A llama file with those keys, its tensors those of a random graph."""

    def metadata(writer):
        for key, value in keys.items():
            name = f"{prefix}{key}"
            if isinstance(value, bool):
                writer.add_bool(name, value)
            elif isinstance(value, int):
                writer.add_uint32(name, value)
            elif isinstance(value, float):
                writer.add_float32(name, value)
            elif isinstance(value, str):
                writer.add_string(name, value)
            else:
                writer.add_array(name, value)

    return write(tmp_path / "m.gguf", random_graph(config), metadata=metadata, extra=tensors)


YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 8.0, "rope.scaling.original_context_length": 32}
FORMULA = Rope(1e4, "yarn", 8.0, 32).attention_scale()


@pytest.mark.parametrize(
    "keys, more",
    [
        ({}, {}),
        ({"yarn_beta_fast": 4.0, "yarn_beta_slow": 0.25}, {"beta_fast": 4.0, "beta_slow": 0.25}),
        ({"yarn_beta_fast": 4.1, "yarn_ext_factor": 1.0}, {"beta_fast": 4.1}),
        ({"yarn_attn_factor": 1.7, "yarn_ext_factor": -1.0}, {"attention_factor": 1.7}),
        ({"attn_factor": 1.5, "yarn_log_multiplier": 0.0, "alpha": 0.0}, {"attention_factor": 1.5 * FORMULA}),
    ],
)
def test_yarn_as_transformers_computes_it(keys, more, tmp_path):
    """The rope_scaling of a config.json, and the keys that llama.cpp's converter makes of it."""
    transformers = pytest.importorskip("transformers")
    graph = random_graph(TINY)
    scaling = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32, **more}
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        rope_scaling=scaling,
        tie_word_embeddings=False,
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.load_state_dict(dict(graph.weights), strict=True)
    ours = load(file_with(tmp_path, YARN | {f"rope.scaling.{key}": value for key, value in keys.items()}))
    with torch.no_grad():
        assert (ours.module()(IDS) - theirs(IDS).logits).abs().max() < 1e-4
    assert ours.config.rope.beta_fast == more.get("beta_fast", 32.0)  # the decimal that was meant, not its float32
    assert graph_from_model(theirs).config.rope.attention_scale() == pytest.approx(
        ours.config.rope.attention_scale(), rel=1e-6
    )


def test_yarn_without_lengths(tmp_path):
    """llama.cpp takes the context for the original length; the stretch then comes on top of it, as in transformers."""
    rope = load(file_with(tmp_path, {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0})).config
    assert rope.rope.original_max_position == 256 and rope.max_position == 1024


LISTS = {
    "rope_factors_short.weight": np.linspace(1, 2, 8, dtype=np.float32),
    "rope_factors_long.weight": np.linspace(2, 9, 8, dtype=np.float32),
}
LONGROPE = {
    "rope.scaling.type": "longrope",
    "rope.scaling.original_context_length": 32,
    "rope.scaling.attn_factor": 1.25,
}


def test_longrope(tmp_path):
    config = load(file_with(tmp_path, LONGROPE, tensors=LISTS.items())).config
    short, long = (tuple(numbers.tolist()) for numbers in LISTS.values())
    assert config.rope == Rope(1e4, "longrope", 1.0, 32, 1.25, short_factor=short, long_factor=long)


def test_windows_by_key_and_pattern(tmp_path):
    four = dataclasses.replace(TINY, layers=TINY.layers * 2)

    def windows(keys):
        return [layer.window for layer in load(file_with(tmp_path, keys, four)).config.layers]

    window = {"attention.sliding_window": 24}
    assert windows({"attention.sliding_window": 0}) == [None] * 4
    assert windows(window) == [24] * 4
    assert windows(window | {"attention.sliding_window_pattern": 2}) == [24, None] * 2
    assert windows(window | {"attention.sliding_window_pattern": [True, False, False, True]}) == [24, None, None, 24]


REFUSED = {
    "experts": ({"expert_count": 8}, "llama.expert_count"),
    "a scale of logits": ({"logit_scale": 0.5}, "llama.logit_scale"),
    "a scale of residuals": ({"residual_scale": 0.22}, "llama.residual_scale"),
    "a scale of embeddings": ({"embedding_scale": 12.0}, "llama.embedding_scale"),
    "a scale of attention": ({"attention.scale": 0.1}, r"llama.attention.scale.*0\.25"),
    "soft caps": ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    "soft caps at the end": ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    "attention both ways": ({"attention.causal": False}, "attention.causal.*True"),
    "alibi": ({"attention.max_alibi_bias": 8.0}, "max_alibi_bias"),
    "clamped": ({"attention.clamp_kqv": 8.0}, "clamp_kqv"),
    "parallel residuals": ({"use_parallel_residual": True}, "use_parallel_residual"),
    "sections": ({"rope.dimension_sections": [2, 3, 3, 0]}, "rope.dimension_sections"),
    "rope unknown": ({"rope.whatever": 1}, "llama.rope.whatever"),
    "attention unknown": ({"attention.whatever": 1}, "llama.attention.whatever"),
    "tokens to come": ({"nextn_predict_layers": 1}, "nextn_predict_layers"),
    "part of a head": ({"rope.dimension_count": 8}, "rope.dimension_count.*16"),
    "values of another width": ({"attention.value_length": 8}, "attention.value_length"),
    "another base for windows": ({"rope.freq_base_swa": 5e5}, "freq_base_swa.*10000"),
    "alpha": ({"rope.scaling.alpha": 1000.0}, "rope.scaling.alpha"),
    "an unknown stretch": ({"rope.scaling.type": "ntk"}, "rope.scaling.type.*ntk.*yarn"),
    "a part of the ramp": (YARN | {"rope.scaling.yarn_ext_factor": 0.5}, "yarn_ext_factor"),
    "mscale": (YARN | {"rope.scaling.yarn_log_multiplier": 0.1}, "yarn_log_multiplier"),
    "a factor of two meanings": (YARN | {"rope.scaling.yarn_attn_factor": 1.0}, "yarn_attn_factor.*attn_factor"),
    "two factors": (
        YARN | {"rope.scaling.yarn_attn_factor": 1.5, "rope.scaling.attn_factor": 1.2},
        "yarn_attn_factor.*1.5 and 1.2",
    ),
    "yarn's ramp without yarn": ({"rope.scaling.yarn_ext_factor": 1.0}, "yarn_ext_factor.*linear"),
    "a factor on linear": ({"rope.scaling.factor": 2.0, "rope.scaling.attn_factor": 1.2}, "attn_factor.*linear"),
    "longrope without lists": (LONGROPE, "rope.scaling.type.*no tensors.*rope_factors_short"),
    "a stretch below one": ({"rope.scaling.type": "yarn", "rope.scaling.factor": 0.5}, r"factor.*m\.gguf"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_key_that_asks_for_more_is_refused_by_name(name, tmp_path):
    keys, message = REFUSED[name]
    path = file_with(tmp_path, keys)
    with pytest.raises(InputError, match=message) as error:
        load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_stretches_that_contradict_one_another(tmp_path):
    divisors = (("rope_freqs.weight", np.linspace(1, 4, 8, dtype=np.float32)),)
    with pytest.raises(InputError, match=r"rope_freqs.*yarn.*one way"):
        load(file_with(tmp_path, YARN, tensors=divisors))
    with pytest.raises(InputError, match=r"rope_factors_short.*one way"):
        load(file_with(tmp_path, {}, tensors=LISTS.items()))
    for bad in (np.zeros(8, np.float32), np.full(8, np.nan, np.float32), np.ones(8, np.float16)):
        with pytest.raises(InputError, match=r"rope_freqs\.weight"):
            load(file_with(tmp_path, {}, tensors=(("rope_freqs.weight", bad),)))


def test_harmless_keys_pass(tmp_path):
    ordinary = {key: values[-1] for key, values in WITHOUT_EFFECT.items()}
    ordinary = {
        key: float(value) if "scal" in key and not isinstance(value, bool) else value for key, value in ordinary.items()
    }
    harmless = {key: 1 for key in sorted(KNOWN) if key.startswith(("pooling", "decoder", "classifier.p", "vocab"))}
    keys = ordinary | harmless | {"attention.scale": 0.25, "rope.freq_base_swa": 1e4, "rope.dimension_count_swa": 16}
    assert load(file_with(tmp_path, keys)).config == load(file_with(tmp_path, {})).config


def test_an_unknown_key_is_named_in_a_warning(tmp_path):
    with pytest.warns(UserWarning, match=r"m\.gguf: not known.*: llama\.colour, llama\.mood"):
        load(file_with(tmp_path, {"mood": 1, "colour": "red"}))
    load(file_with(tmp_path, {"colour": "red"}, prefix="general."))  # not about the model


def test_every_architecture_that_is_refused_is_told_what_is_carried(tmp_path):
    for name in ("gemma3", "phi3", "qwen2moe", "qwen3moe", "mistral3", "mamba"):
        path = write(tmp_path / "m.gguf", random_graph(TINY), architecture=name)
        with pytest.raises(InputError, match=rf"'{name}'; accepted: llama \| qwen2 \| qwen3 \| smollm3"):
            load(path)
