"""Every family that is carried, against transformers: files, live models, caches and greedy text."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import random_graph
from family_cases import CASES, model_of

from tinycompress.checkpoints.checkpoint import load, save
from tinycompress.checkpoints.families import FAMILIES, family_of
from tinycompress.graph.config import LINEARS, Config, Layer
from tinycompress.graph.graph import Graph

IDS = torch.randint(3, 512, (2, 60), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("case", CASES)
def test_files_live_models_and_text_equal_transformers(case, tmp_path):
    theirs = model_of(case)
    theirs.save_pretrained(tmp_path / "theirs")
    graph = load(tmp_path / "theirs")
    with torch.no_grad():
        expected = theirs(IDS).logits
        assert torch.allclose(graph.module()(IDS), expected, atol=1e-4)
        assert torch.equal(Graph.from_hf(theirs).module()(IDS), graph.module()(IDS))
        assert torch.allclose(graph.to_hf()(IDS).logits, expected, atol=1e-4)
    own = save(graph, tmp_path / "own")
    back = type(theirs).from_pretrained(own)
    with torch.no_grad():
        assert torch.allclose(back(IDS).logits, expected, atol=1e-4)
    assert load(own).fingerprint() == graph.fingerprint()
    (own / "tinycompress.json").unlink()
    assert torch.equal(load(own).module()(IDS), graph.module()(IDS))
    greedy = theirs.generate(IDS[:1, :10], max_new_tokens=64, do_sample=False, eos_token_id=None)[0, 10:]
    endless = graph.replace(config=dataclasses.replace(graph.config, eos_token_id=None))
    assert torch.equal(endless.module().generate(IDS[:1, :10], 64), greedy)


@pytest.mark.parametrize("case", CASES)
def test_config_says_what_the_class_has(case):
    theirs = model_of(case)
    family = family_of(Graph.from_hf(theirs).config)
    assert family is not None
    assert family.architecture == type(theirs).__name__ or case == "mistral, all positions"


def test_what_no_class_of_transformers_has_is_kept_in_the_native_format_alone(tmp_path):
    layers = (Layer(4, 2, 96, window=8), Layer(4, 2, 96, window=16))
    normed = Config(128, 64, 16, (Layer(4, 2, 96),) * 2, norm_eps=1e-5, qk_norm_eps=1e-6)
    for i, config in enumerate((Config(128, 64, 16, layers), normed)):
        assert family_of(config) is None
        graph = random_graph(config)
        back = load(save(graph, tmp_path / str(i)))
        assert back.config == config and back.fingerprint() == graph.fingerprint()


def test_every_uniform_mixture_of_parts_has_a_class_or_none(tmp_path):
    """What `family_of` claims is proved: written, opened by the class, and equal."""
    transformers = pytest.importorskip("transformers")
    subsets = (frozenset(), frozenset({"q_proj"}), frozenset({"o_proj", "down_proj"}), frozenset(LINEARS))
    written: set[str] = set()
    for number, (biases, qk_norm, window, rope) in enumerate(
        (b, n, w, r) for b in subsets for n in (None, 1e-5) for w in (None, 7) for r in (True, False)
    ):
        layers = (Layer(4, 2, 96, window), Layer(4, 2, 96, rope=rope))
        graph = random_graph(Config(128, 64, 16, layers, biases=biases, qk_norm_eps=qk_norm))
        family = family_of(graph.config)
        folder = save(graph, tmp_path / str(number))
        if family is not None:
            written.add(family.model_type)
            theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
            with torch.no_grad():
                assert torch.allclose(theirs(IDS % 128).logits, graph.module()(IDS % 128), atol=1e-4), graph.config
        assert torch.equal(load(folder).module()(IDS % 128), graph.module()(IDS % 128))
    assert written == set(FAMILIES) - {"mistral"}


def test_a_head_of_its_own_under_a_tied_config_is_kept(tmp_path):
    theirs = model_of("qwen2")
    theirs.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert '"tie_word_embeddings": false' in text
    (tmp_path / "config.json").write_text(text.replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    with pytest.warns(UserWarning, match="not the embedding"):
        graph = load(tmp_path)
    with torch.no_grad():
        assert torch.allclose(graph.module()(IDS), theirs(IDS).logits, atol=1e-4)


def test_keys_of_a_config_that_nothing_reads_are_named(tmp_path):
    theirs = model_of("llama")
    theirs.config.favourite_colour = "blue"
    theirs.config.pretraining_tp = 2
    theirs.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="favourite_colour$"):
        load(tmp_path)
