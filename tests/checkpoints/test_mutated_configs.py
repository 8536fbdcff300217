"""Configs with a few fields changed: read as transformers reads them, or refused; never another model in silence."""

from __future__ import annotations

import json
import logging
import random
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from family_cases import model_of

from tinycompress.checkpoints.checkpoint import load
from tinycompress.errors import InputError

IDS = torch.randint(3, 64, (1, 24), generator=torch.Generator().manual_seed(0))
SMALL = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "initializer_range": 0.5}
NUMBERS = [None, True, False, 0, 1, 2, 3, 4, 8, 16, 24, 64, 0.5, 1.0, 2.0, 1e-6, 1e-5, 1e-2, 10000.0, 1e6, -1, "4", []]
SCALINGS = [
    {"rope_type": "default"},
    {"type": "linear", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "beta_fast": 8.0, "beta_slow": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5},
    {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.5},
    {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8, "low_freq_factor": 1.0}
    | {"high_freq_factor": 4.0},
    {"type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0], "original_max_position_embeddings": 8},
    {"type": "su", "short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0]},
    {"rope_type": "proportional", "factor": 2.0},
    {"factor": 2.0},
]
KEYS: dict[str, list[Any]] = {
    "attention_bias": [True, False, None],
    "mlp_bias": [True, False, None],
    "head_dim": [None, 4, 8, 2, "absent"],
    "hidden_act": ["silu", "swish", "gelu", "relu", None],
    "layer_types": [None, ["full_attention"] * 2, ["sliding_attention"] * 2, ["full_attention", "sliding_attention"]],
    "sliding_window": [None, 3, 5, 0, 4096, "absent"],
    "use_sliding_window": [True, False, None, "absent"],
    "max_window_layers": [0, 1, 2, 28, "absent"],
    "no_rope_layers": [None, [1, 1], [0, 1], [0, 0], [1], "absent"],
    "no_rope_layer_interval": [1, 2, 4],
    "rms_norm_eps": [1e-6, 1e-5, 1e-2, 0.1, "absent", None],
    "rope_theta": [10000.0, 1000.0, 100, 1e6, "absent", None],
    "rope_scaling": [None, *SCALINGS],
    "original_max_position_embeddings": [8, 16, None],
    "partial_rotary_factor": [1.0, 0.5, None],
    "max_position_embeddings": [8, 16, 32, 256, "absent"],
    "num_key_value_heads": [1, 2, 4, None, "absent"],
    "tie_word_embeddings": [True, False, None, "absent"],
    "model_type": ["llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "phi3", None],
    "pretraining_tp": [1, 2],
    "attention_dropout": [0.0, 0.5],
    "eos_token_id": [2, [2, 3], None, -1],
    "attn_logit_softcapping": [None, 30.0],
    "logit_scale": [1.0, 0.5],
    "embedding_multiplier": [1.0, 2.0],
    "rope_interleaved": [False, True],
    "num_local_experts": [4, 0],
    "quantization_config": [None, {}],
    "architectures": [["LlamaForCausalLM"], [], ["Other"], None],
}


if version("transformers") >= "5":  # 4.x does not read them
    KEYS["rope_parameters"] = [None, {"rope_theta": 500.0, "rope_type": "default"}, *SCALINGS]


def theirs_of(folder: Path) -> Any:
    """transformers' model, or None where it refuses the folder or lacks weights for it."""
    from transformers import AutoModelForCausalLM

    try:
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    except Exception:  # whatever transformers raises, it refuses
        return None
    lacking = info["missing_keys"] or info["mismatched_keys"] or info["unexpected_keys"]
    return None if lacking else model.eval()


def mutated(config: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    out = dict(config)
    for _ in range(draw.choice([1, 1, 2, 3])):
        key = draw.choice([*KEYS, *KEYS, *config])
        value = draw.choice(KEYS[key] if key in KEYS and draw.random() < 0.9 else NUMBERS)
        if value == "absent":
            out.pop(key, None)
        else:
            out[key] = value
    return out


def check(case: str, count: int, folder: Path) -> dict[str, int]:
    """Of `count` mutated configs: how many both read alike, and how many we refuse though transformers reads them."""
    model = model_of(case, **SMALL)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    own_head = not model.config.tie_word_embeddings
    draw = random.Random(case)
    numbers = {"alike": 0, "refused by both": 0, "refused by us": 0, "read by us alone": 0}
    for _ in range(count):
        changed = mutated(config, draw)
        # 4.x drops a stored head where the config says tied; 5.x and we keep it
        (folder / "config.json").write_text(json.dumps(changed | ({"tie_word_embeddings": False} if own_head else {})))
        theirs = theirs_of(folder)
        (folder / "config.json").write_text(json.dumps(changed))
        try:
            ours = load(folder)
        except InputError:
            numbers["refused by us" if theirs is not None else "refused by both"] += 1
            continue
        if theirs is None:
            numbers["read by us alone"] += 1
            continue
        with torch.no_grad():
            try:
                expected = theirs(IDS).logits
            except Exception:  # it opens and cannot run
                continue
            logits = ours.module()(IDS)
        what = {key: changed.get(key, "absent") for key in changed.keys() | config.keys()}
        different = {key: value for key, value in what.items() if value != config.get(key, "absent")}
        assert torch.allclose(logits, expected, atol=2e-4), f"{case} with {different}"
        numbers["alike"] += 1
    return numbers


@pytest.fixture
def quiet():
    """transformers and we warn of most of these configs."""
    pytest.importorskip("transformers")
    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")


@pytest.mark.parametrize("case", FAMILIES)
def test_fifty_configs_are_read_as_transformers_reads_them_or_refused(case, tmp_path, quiet):
    numbers = check(case, 50, tmp_path)
    assert numbers["alike"] >= 10


@pytest.mark.slow
@pytest.mark.parametrize("case", FAMILIES)
def test_two_thousand_configs_are_read_as_transformers_reads_them_or_refused(case, tmp_path, quiet):
    numbers = check(case, 2000, tmp_path)
    print(case, numbers)
    assert numbers["alike"] >= 400
