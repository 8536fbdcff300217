"""GGUF files of every architecture that is carried: written, read back and, where it is installed, run by llama.cpp."""

import dataclasses
import json

import gguf
import numpy as np
import pytest
import torch
from conftest import random_graph
from gguf_cases import CARRIED, DIVIDED, FOURTH, UNEVEN, WINDOWED, config, layers
from other_libraries import run

from tinycompress.checkpoints.checkpoint import load, save
from tinycompress.checkpoints.gguf_families import ARCHITECTURES
from tinycompress.errors import InputError
from tinycompress.graph.config import Layer
from tinycompress.graph.rope import Rope

IDS = torch.arange(60)[None] * 7 % 96


def graph_of(config, seed=0):
    """A random graph whose biases weigh in."""
    graph = random_graph(config, seed)
    return graph.replace(weights={name: graph.tensor(name) * 5 for name in graph.weights if name.endswith(".bias")})


def logits(graph, ids=IDS):
    with torch.no_grad():
        return graph.module()(ids)


def key(path, name):
    return gguf.GGUFReader(path).fields[name].contents()


@pytest.mark.parametrize("case", CARRIED)
def test_a_config_comes_back_whole(case, tmp_path):
    architecture, wanted = CARRIED[case]
    graph = graph_of(wanted)
    path = save(graph, tmp_path / "m.gguf", format="gguf")
    back = load(path)
    assert key(path, "general.architecture") == architecture
    if wanted.rope.attention_factor is None:
        assert back.config == wanted
    assert back.config.rope.attention_scale() == pytest.approx(wanted.rope.attention_scale(), rel=1e-7)
    assert {name: back.weights[name].equal(weight) for name, weight in graph.weights.items()} == dict.fromkeys(
        graph.weights, True
    )
    assert torch.allclose(logits(back), logits(graph), atol=1e-5)


@pytest.mark.parametrize("case", DIVIDED)
def test_a_stretch_without_keys_is_written_as_divisors(case, tmp_path):
    graph = graph_of(DIVIDED[case])
    back = load(save(graph, tmp_path / "m.gguf", format="gguf"))
    assert back.config.rope.type == "longrope" and back.config.max_position == graph.config.max_position
    assert torch.allclose(logits(back), logits(graph), atol=1e-5)
    for length in (8, 60):
        exact = graph.config.rope.inv_freq(16, length)
        assert torch.allclose(back.config.rope.inv_freq(16, length), exact, rtol=1e-6)


@pytest.mark.parametrize("case", WINDOWED)
def test_the_context_is_held_to_a_window(case, tmp_path):
    architecture, wanted = WINDOWED[case]
    graph = graph_of(wanted)
    with pytest.warns(UserWarning, match=rf"{architecture} has no window: context_length is the window, 32"):
        path = save(graph, tmp_path / "m.gguf", format="gguf")
    assert key(path, f"{architecture}.context_length") == 32
    back = load(path)
    assert back.config == dataclasses.replace(wanted, max_position=32)
    assert torch.equal(logits(back), logits(graph))  # longer than the window, which is read


def test_windows_of_several_widths_hold_the_context_to_the_narrowest(tmp_path):
    graph = random_graph(config(layers(windows=(24, 32, 32, None))))
    with pytest.warns(UserWarning, match="24"):
        back = load(save(graph, tmp_path / "m.gguf", format="gguf"))
    assert back.config.max_position == 24 and [layer.window for layer in back.config.layers] == [24, None, None, None]
    assert torch.allclose(logits(back, IDS[:, :24]), logits(graph, IDS[:, :24]), atol=1e-6)


@pytest.mark.parametrize(
    "bad, message",
    [
        (config(layers(ropes=(False, True, True, True))), r"layers \[0\] without RoPE.*every fourth"),
        (config(FOURTH, qk_norm_eps=1e-5), r"layers \[3\] without RoPE"),
        (config(FOURTH, biases=frozenset({"o_proj"})), "biases on o_proj.*smollm3"),
        (config(qk_norm_eps=1e-6), "eps 1e-06 beside 1e-05"),
        (config(qk_norm_eps=1e-5, rope=Rope(1e4, "llama3", 4.0, 16)), "llama3 in llama.cpp's qwen3.*yarn"),
        (config(FOURTH, rope=Rope(1e4, "yarn", 4.0, 16, beta_fast=8.0)), "beta_fast 8.*smollm3.*beta_fast 32"),
        (config(rope=Rope(1e4, "dynamic", 4.0, 16)), "dynamic.*yarn"),
        (config((*UNEVEN, Layer(4, 2, 0))), r"layers \[4\] without an FFN.*layout=.deci"),
        (config(UNEVEN[2:]), r"layer 0 without attention.*layout=.deci"),
        (config(UNEVEN, qk_norm_eps=1e-5), r"different widths with norms.*layout=.uniform"),
    ],
)
def test_what_no_architecture_computes_is_refused_before_writing(bad, message, tmp_path):
    with pytest.raises(InputError, match=message):
        save(random_graph(bad), tmp_path / "m.gguf", format="gguf")
    assert not list(tmp_path.iterdir())


def test_every_architecture_is_written_by_a_case():
    assert {architecture for architecture, _ in CARRIED.values()} == set(ARCHITECTURES)


@pytest.mark.runtime
@pytest.mark.parametrize("case", [*CARRIED, *DIVIDED, *(f"{name}, window" for name in WINDOWED)])
def test_llama_cpp_computes_the_same(case, tmp_path):
    windowed = case.removesuffix(", window")
    wanted = WINDOWED[windowed][1] if windowed != case else DIVIDED[case] if case in DIVIDED else CARRIED[case][1]
    graph = graph_of(wanted)
    ids = IDS[:, :32] if windowed != case else IDS
    if windowed != case:
        with pytest.warns(UserWarning, match="no window"):
            path = save(graph, tmp_path / "m.gguf", format="gguf")
    else:
        path = save(graph, tmp_path / "m.gguf", format="gguf")
    (tmp_path / "ids.json").write_text(json.dumps(ids[0].tolist()))
    run("llama-cpp", "llama_cpp_logits.py", path, tmp_path / "ids.json", tmp_path / "out.npy", cwd=tmp_path)
    theirs = torch.from_numpy(np.load(tmp_path / "out.npy"))
    assert (logits(graph, ids)[0] - theirs).abs().max() < 5e-5 and theirs.std() > 0.5
