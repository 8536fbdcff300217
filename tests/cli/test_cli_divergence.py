"""`eval --reference` on small models: figures, the cache of the reference, engines, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cli_cases import MIXED, invoke, made, refused, run, tokenizer
from tokenizers import normalizers

from tinycompress.checkpoints import checkpoint
from tinycompress.checkpoints.tokenizer import Tokenizer
from tinycompress.graph.graph import Graph

__all__ = ["made", "tokenizer"]  # fixtures, for this file too
TEXT = ("--windows", "4", "--seq-len", "32")


def test_a_quantized_model_and_its_export_against_the_model(made: Path, tmp_path: Path) -> None:
    """As text and as JSON; what the cache gives equals what it was made of."""
    args = ("--reference", made / "uniform", *TEXT)
    measured = json.loads(run("eval", made / "small", *args, "--json"))
    figures = measured["reference"]["figures"]
    alone = json.loads(run("eval", made / "small", *TEXT, "--json"))
    assert measured["perplexity"] == pytest.approx(alone["perplexity"], rel=1e-6)
    assert measured["tokens"] == alone["tokens"] == 4 * 31 and measured["reference"]["positions"] == 4 * 32
    assert 0 < figures["kl_median"]["value"] <= figures["kl_99"]["value"] <= figures["kl_largest"]["value"]
    assert 0 < figures["top_1"]["low"] <= figures["top_1"]["value"] <= figures["top_1"]["high"] <= 1
    text = run("eval", made / "small", *args)
    assert f"perplexity {measured['perplexity']:.4f}, of the reference" in text
    assert f"{figures['kl']['value']:.3g}  [{figures['kl']['low']:.3g}, " in text
    cache = ("--reference-cache", tmp_path / "answers")
    for _ in range(2):
        assert json.loads(run("eval", made / "small", *args, *cache, "--json")) == measured
    exported = json.loads(run("eval", made / "onnx", *args, *cache, "--json"))
    assert len(list((tmp_path / "answers").glob("*.f32"))) == 1
    assert exported["engine"] == "onnxruntime" and exported["reference"]["engine"] == "torch"
    assert exported["reference"]["figures"]["kl"]["value"] == pytest.approx(figures["kl"]["value"], rel=0.2)


def test_the_size_of_a_cache_is_said_before(made: Path, tmp_path: Path) -> None:
    args = ("eval", made / "small", "--reference", made / "onnx", *TEXT, "--reference-cache", tmp_path / "answers")
    code, _, err = invoke(*args)
    assert code == 0
    (kept,) = (tmp_path / "answers").glob("*.f32")
    assert kept.stat().st_size == 4 * 4 * 32 * 300 and f"reference cache: 153.6 kB in {tmp_path / 'answers'}" in err
    assert "reference cache" not in invoke(*args)[2]


def test_what_cannot_be_compared_is_refused(made: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    backend = type(tokenizer.backend).from_str(tokenizer.backend.to_str())
    backend.normalizer = normalizers.Replace("t", "d")
    checkpoint.save(Graph(MIXED, Graph.random(MIXED, seed=1).weights, (), Tokenizer(backend)), tmp_path / "other")
    small = ("eval", made / "small", *TEXT)
    assert "--reference: found a model that reads the text as other tokens" in refused(
        *small, "--reference", tmp_path / "other"
    )
    assert "--reference-cache" in refused(*small, "--reference-cache", tmp_path / "answers")
    assert "at least 2" in refused("eval", made / "small", "--reference", made / "uniform", "--windows", 1)
    assert "--engine: found 'vllm'; accepted: llama.cpp" in refused(*small, "--engine", "vllm")
    assert "a .gguf file among the models" in refused(*small, "--engine", "llama.cpp")


def test_a_gguf_file_in_llama_cpp(made: Path, tmp_path: Path) -> None:
    """The runtime's own logits: near our reader's at float16 weights, in one batch and in several."""
    pytest.importorskip("llama_cpp")
    from tinycompress.cli.arguments import open_model
    from tinycompress.evaluation import llama_cpp

    run("compress", made / "uniform", "--format", "gguf", "-o", tmp_path / "model.gguf")
    graph = open_model(str(tmp_path / "model.gguf"))
    ids = torch.randint(300, (1, 40), generator=torch.Generator().manual_seed(0))
    expected = graph.dense(torch.float32).module()(ids)
    model = llama_cpp.LlamaCppModel(tmp_path / "model.gguf", graph.config, 40)
    assert (model(ids) - expected).abs().max() < 0.05
    llama_cpp.TOGETHER = 16
    assert (model(ids) - expected).abs().max() < 0.05
    args = ("eval", tmp_path / "model.gguf", "--reference", made / "uniform", *TEXT, "--engine", "llama.cpp", "--json")
    measured = json.loads(run(*args))
    assert measured["engine"] == "llama.cpp" and measured["reference"]["figures"]["kl"]["value"] < 1e-3
