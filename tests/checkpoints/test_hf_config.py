"""Hugging Face's config.json: every RoPE and bias means what transformers reads, and a bad field is one clear error."""

import dataclasses

import pytest
import torch
from checkpoint_cases import IDS, ROPES, SMALL, as_hf, edit, transformers_logits
from conftest import random_graph
from hypothesis import given, settings
from hypothesis import strategies as st

from tinycompress.checkpoints import hf
from tinycompress.checkpoints.checkpoint import load, save
from tinycompress.errors import InputError
from tinycompress.graph.config import Config
from tinycompress.graph.rope import Rope


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("tie", [True, False])
def test_same_logits_in_transformers_for_every_rope(name, tie, tmp_path):
    rope, length = ROPES[name]
    graph = random_graph(dataclasses.replace(SMALL, rope=rope, max_position=length, tie_embeddings=tie))
    folder = as_hf(graph, tmp_path / "out")
    back = load(folder)
    if rope.type == "longrope":  # written out, see hf.rope_to_hf
        rope = dataclasses.replace(rope, attention_factor=rope.attention_scale())
    assert back.config == dataclasses.replace(graph.config, rope=rope)
    ours = back.module()(IDS)
    assert torch.allclose(ours, graph.module()(IDS), atol=1e-6)
    torch.testing.assert_close(transformers_logits(folder), ours, atol=1e-4, rtol=0)
    if name not in ("default", "longrope short"):  # the rope matters at this length: the check above can fail
        assert not torch.allclose(
            ours, random_graph(dataclasses.replace(graph.config, rope=Rope())).module()(IDS), atol=1e-3
        )


@pytest.mark.parametrize(
    "biases", [{"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}, {"q_proj", "down_proj"}]
)
def test_biases_open_in_transformers(biases, tmp_path):
    graph = random_graph(dataclasses.replace(SMALL, biases=frozenset(biases)))
    save(graph, tmp_path / "out")
    torch.testing.assert_close(transformers_logits(tmp_path / "out"), graph.module()(IDS), atol=1e-4, rtol=0)
    assert load(tmp_path / "out").fingerprint() == graph.fingerprint()


HOSTILE = [
    ({"model_type": "gpt2"}, "model_type"),
    ({"model_type": None}, "model_type"),
    ({"model_type": "mistral", "sliding_window": 0}, "sliding_window"),
    ({"model_type": "mistral", "sliding_window": "16"}, "sliding_window"),
    ({"model_type": "mistral", "layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 2}, "layer_types"),
    ({"model_type": "qwen3", "layer_types": ["full_attention"]}, "layer_types"),
    ({"model_type": "smollm3", "no_rope_layers": [1, 2]}, "no_rope_layers"),
    ({"model_type": "gemma2"}, "llama | mistral | qwen2 | qwen3 | smollm3"),
    ({"rope_interleaved": True}, "rope_interleaved"),
    ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ({"embedding_multiplier": 12.0}, "embedding_multiplier"),
    ({"num_local_experts": 8}, "num_local_experts"),
    ({"quantization": {"group_size": 64, "bits": 4}}, "quantization"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "alpha": 3.0}}, "alpha"),
    ({"rope_scaling": {"rope_type": "default", "mrope_section": [16, 24, 24]}}, "mrope_section"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"hidden_size": -1}, "hidden_size"),
    ({"hidden_size": "64"}, "hidden_size"),
    ({"hidden_size": True}, "hidden_size"),
    ({"hidden_size": 10**30}, "hidden_size"),
    ({"hidden_size": ...}, "hidden_size"),
    ({"vocab_size": 0}, "vocab_size"),
    ({"vocab_size": 127}, "embed_tokens.*127"),
    ({"num_hidden_layers": 10**12}, "num_hidden_layers"),
    ({"num_hidden_layers": 3}, "layers.2"),
    ({"num_hidden_layers": 1}, "layers.1"),
    ({"num_key_value_heads": 3}, "n_kv_heads"),
    ({"num_key_value_heads": 0}, "num_key_value_heads"),
    ({"intermediate_size": 97}, "shape"),
    ({"head_dim": 15}, "head_dim"),
    ({"head_dim": None, "num_attention_heads": 5}, "num_attention_heads"),
    ({"rms_norm_eps": "tiny"}, "rms_norm_eps"),
    ({"rms_norm_eps": -1e-5}, "rms_norm_eps"),
    ({"rope_theta": float("nan")}, "rope_theta"),
    ({"rope_theta": 0.5}, "theta"),
    ({"tie_word_embeddings": "no"}, "tie_word_embeddings"),
    ({"attention_bias": True}, "bias"),
    ({"bos_token_id": "x"}, "bos_token_id"),
    ({"eos_token_id": [1, "x"]}, "eos_token_id"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ({"rope_scaling": "yarn"}, "rope_scaling"),
    ({"rope_scaling": {"rope_type": "mrope"}}, "rope_type"),
    ({"rope_scaling": {"rope_type": ["linear"]}}, "rope_type"),
    ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "factor"),
    ({"rope_scaling": {"type": "linear", "rope_type": "dynamic", "factor": 2.0}}, "rope_type"),
    (
        {
            "rope_scaling": {"rope_type": "linear", "factor": 2.0},
            "rope_parameters": {"rope_type": "linear", "factor": 4.0},
        },
        "rope_parameters",
    ),
    ({"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}, "rope_theta"),
    (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
        "original_max_position",
    ),
    ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}, "short_factor"),
]


@pytest.mark.parametrize("fields, message", HOSTILE, ids=[str(f)[:60] for f, _ in HOSTILE])
def test_a_bad_config_is_one_clear_error(fields, message, tiny, tmp_path):
    folder = as_hf(tiny, tmp_path / "out")
    edit(folder, **fields)
    with pytest.raises(InputError, match=message) as error:
        load(folder)
    assert (
        str(tmp_path) in str(error.value)
        or "Layer" in str(error.value)
        or "rope." in str(error.value)
        or "Config." in str(error.value)
    )


JSON = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.lists(st.integers(), max_size=2)
)
FIELDS = [
    *hf.config_to_hf(SMALL, torch.float32),
    "rope_parameters",
    "sliding_window",
    "use_sliding_window",
    "layer_types",
    "no_rope_layers",
    "original_max_position_embeddings",
]


@given(
    st.dictionaries(
        st.sampled_from(FIELDS),
        JSON | st.dictionaries(st.sampled_from(["type", "rope_type", "factor"]), JSON),
        max_size=3,
    )
)
@settings(max_examples=200, deadline=None)
def test_any_config_is_read_or_refused(fields):
    try:
        config = hf.config_from_hf(hf.config_to_hf(SMALL, torch.float32) | fields, "config.json")
    except InputError:
        return
    assert isinstance(config, Config)


def test_other_spellings_of_the_same_config():
    base = hf.config_to_hf(dataclasses.replace(SMALL, rope=ROPES["yarn"][0]), torch.float32)
    values = base["rope_scaling"] | {"rope_theta": base["rope_theta"]}
    five = {k: v for k, v in base.items() if k not in ("rope_theta", "rope_scaling")} | {"rope_parameters": values}
    old = base | {"rope_scaling": {("type" if k == "rope_type" else k): v for k, v in base["rope_scaling"].items()}}
    expected = hf.config_from_hf(base, "")
    assert hf.config_from_hf(five, "") == hf.config_from_hf(old, "") == expected
    no_head_dim = {k: v for k, v in base.items() if k not in ("head_dim", "num_key_value_heads")}
    read = hf.config_from_hf(no_head_dim, "")
    assert read.head_dim == 16 and read.layers[0].n_kv_heads == 4
    assert hf.config_from_hf(base | {"model_type": "mistral", "sliding_window": None}, "") == expected
    assert hf.config_from_hf(base | {"eos_token_id": [2, 7], "pad_token_id": -1}, "").eos_token_id == (2, 7)


def test_longrope_with_the_original_length_beside(tmp_path):
    rope, _ = ROPES["longrope"]
    data = hf.config_to_hf(dataclasses.replace(SMALL, rope=rope), torch.float32)
    scaling = {"type": "longrope", "short_factor": list(rope.short_factor), "long_factor": list(rope.long_factor)}
    read = hf.config_from_hf(
        data | {"rope_scaling": scaling}, ""
    ).rope  # as Phi-3 writes it: no factor, no attention factor
    assert read == rope and read.attention_scale() == rope.attention_scale()
