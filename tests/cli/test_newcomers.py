"""Folders as newcomers have them, through the commands of the README: nothing but the folder's name differs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_cases import run, tokenizer  # noqa: F401 (a fixture)

from tinycompress.checkpoints.tokenizer import Tokenizer

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "initializer_range": 0.1}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "vocab_size": 300}
LLAMA3 = {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<end>{% endfor %}"
FOLDERS: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 32, "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": 0},
    "llama": {
        "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 32},
        "tie_word_embeddings": True,
        "eos_token_id": [0, 7],
    },
}


def save(folder: Path, model_type: str, **fields: Any) -> None:
    """A random model as transformers saves it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **{**SIZES, **HEADS, **fields})
    transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)


def through_the_readme(model: Path, folder: Path) -> None:
    small, exported = folder / "small", folder / "small-onnx"
    run("inspect", model)
    text = ("--samples", "16", "--seq-len", "32")
    run("compress", model, "--prune", "params=0.8", "--context", "128", "--quantize", "w4g32", "-o", small, *text)
    run("export", small, "--profile", "ort", "-o", exported)
    run("verify", exported)
    assert "perplexity" in run("eval", exported, "--data", "pydoc", "--windows", "2", "--seq-len", "32")
    assert run("generate", exported, "The capital of France is", "--max-new-tokens", "4").strip()
    genai = json.loads((exported / "genai_config.json").read_text())
    ends = json.loads((model / "config.json").read_text())["eos_token_id"]
    assert genai["model"]["eos_token_id"] == ends


@pytest.mark.parametrize("model_type", FOLDERS)
def test_a_new_model(model_type, tmp_path, tokenizer: Tokenizer):  # noqa: F811
    model = tmp_path / "model"
    save(model, model_type, **FOLDERS[model_type])
    tokenizer.save(model)
    (model / "chat_template.jinja").write_text(TEMPLATE)
    through_the_readme(model, tmp_path)
    assert (tmp_path / "small-onnx" / "tokenizer.json").is_file()
    assert json.loads((tmp_path / "small-onnx" / "tokenizer_config.json").read_text())["chat_template"] == TEMPLATE


def test_the_first_tinyllama(tmp_path):
    """tokenizer.model alone, no generation_config.json, the fields of an old config.json."""
    spm = pytest.importorskip("sentencepiece")
    from tinycompress.calibration import data

    model = tmp_path / "model"
    save(model, "llama", eos_token_id=2, vocab_size=400)
    (model / "generation_config.json").unlink()
    config = json.loads((model / "config.json").read_text())
    for key in ("head_dim", "mlp_bias", "attention_bias", "attention_dropout", "dtype"):
        config.pop(key, None)
    (model / "config.json").write_text(json.dumps(config | {"rope_scaling": None, "torch_dtype": "bfloat16"}))
    text = tmp_path / "text.txt"
    text.write_text(data.text("pydoc")[:50_000])
    as_llama = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    place = {"input": str(text), "model_prefix": str(model / "tokenizer"), "minloglevel": 2}
    spm.SentencePieceTrainer.train(vocab_size=400, model_type="bpe", **as_llama, **place)
    (model / "tokenizer.vocab").unlink()
    (model / "tokenizer_config.json").write_text(
        json.dumps(
            {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>"}
        )
    )
    through_the_readme(model, tmp_path)
