"""`compress --format` and `--quantize-embedding`: what is written, and what is refused before any work."""

import dataclasses
import json

import pytest
import torch
from conftest import random_graph
from typer.testing import CliRunner

from tinycompress.checkpoints.checkpoint import load, save
from tinycompress.checkpoints.format_check import blank, check_plan
from tinycompress.cli.main import app
from tinycompress.errors import InputError
from tinycompress.graph.config import EMBEDDING, Config, Layer
from tinycompress.graph.quant_tensor import QuantSpec, QuantTensor
from tinycompress.quantization.rtn import RTN

CONFIG = Config(vocab_size=96, hidden_size=64, head_dim=16, layers=(Layer(4, 2, 96),) * 2, max_position=64)
RTN_W4 = ("--quantize", "w4g32", "--quantize-method", "rtn")


def invoke(*arguments):
    return CliRunner().invoke(app, ["compress", *map(str, arguments)])


@pytest.fixture
def model(tmp_path):
    return save(random_graph(CONFIG), tmp_path / "model")


@pytest.mark.parametrize("format", ["gptq", "awq", "compressed-tensors"])
def test_folders(format, model, tmp_path):
    result = invoke(model, *RTN_W4, "--format", format, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    about = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert about["quant_method"] == format
    back = load(tmp_path / "out", dtype=torch.float32)
    ours = RTN(QuantSpec(4, 32, search="mse"))(load(model))
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(back.weights[name].ints(), ours.weights[name].ints())


def test_a_file_with_a_packed_embedding(model, tmp_path):
    command = (model, *RTN_W4, "--quantize-embedding", "w8g32", "--format", "gguf", "-o", tmp_path / "m.gguf")
    result = invoke(*command)
    assert result.exit_code == 0, result.output
    assert load(tmp_path / "m.gguf").config == CONFIG
    assert invoke(*command).exit_code == 2 and invoke(*command, "--overwrite").exit_code == 0


def test_the_embedding_alone(model, tmp_path):
    assert invoke(model, "--quantize-embedding", "w4g16", "-o", tmp_path / "out").exit_code == 0
    packed = {n: str(w.grid) for n, w in load(tmp_path / "out").weights.items() if isinstance(w, QuantTensor)}
    assert packed == {"model.embed_tokens.weight": "w4g16", "lm_head.weight": "w4g16"}


@pytest.mark.parametrize(
    "options, message",
    [
        (("--quantize", "w8g32", "--format", "awq"), "4 bits"),
        (("--quantize", "w4g16", "--format", "gguf"), "groups of 16"),
        (("--quantize", "w4g32", "--quantize-embedding", "w8g32", "--format", "gptq"), "quantized embedding"),
        (("--format", "gptq"), "without quantized weights"),
        (("--quantize", "w4g32", "--format", "gptq", "--export", "ort"), "--profile"),
        (("--quantize-embedding", "w8g48"), "48, which does not divide"),
        (("--quantize", "w4g32", "--format", "marlin"), "marlin"),
    ],
)
def test_refusals_come_before_the_work(options, message, model, tmp_path, monkeypatch):
    monkeypatch.setattr("tinycompress.pipeline.run", lambda *_: pytest.fail("the work began"))
    out = tmp_path / ("out.gguf" if "gguf" in options else "out")
    result = invoke(model, *options, "-o", out)
    assert result.exit_code == 2 and message in result.output and not out.exists()


def test_a_gguf_needs_a_file_name(model, tmp_path):
    result = invoke(model, *RTN_W4, "--format", "gguf", "-o", tmp_path / "out")
    assert result.exit_code == 2 and ".gguf" in result.output


def test_plans_read_no_weight_and_say_what_saving_would(nonuniform):
    def linears(graph, spec):
        return {linear.weight: spec for linear in graph.config.linears() if linear.layer is not None}

    graph = random_graph(CONFIG)
    w4g32 = linears(graph, QuantSpec(4, 32))
    for format in ("gptq", "awq", "compressed-tensors", "gguf"):
        check_plan(format, blank(graph, CONFIG, w4g32))
        with pytest.raises(InputError, match=r"different widths|without an FFN"):
            check_plan(format, blank(nonuniform, nonuniform.config, linears(nonuniform, QuantSpec(4, 16))))
    asymmetric = linears(graph, QuantSpec(4, 32, symmetric=False)) | {EMBEDDING: QuantSpec(8, 32)}
    check_plan("gguf", blank(graph, CONFIG, asymmetric))
    packed = RTN(QuantSpec(4, 32, symmetric=False))(graph)
    check_plan("gptq", blank(packed, CONFIG, {}))
    narrow = dataclasses.replace(CONFIG, layers=(Layer(4, 2, 32),) * 2)
    check_plan("gptq", blank(graph, narrow, w4g32))
