"""Teachers: online and streamed agree; a cache holds what the teacher said, survives a kill, and refuses what it is
not."""

from pathlib import Path

import pytest
import torch

from tinycompress.checkpoints.checkpoint import load, save
from tinycompress.distillation.teacher import OnlineTeacher, StreamedTeacher, sample_continuations
from tinycompress.errors import InputError
from tinycompress.graph.config import Config, Layer
from tinycompress.graph.graph import Graph
from tinycompress.graph.quant_tensor import QuantSpec
from tinycompress.model.transformer import Block
from tinycompress.quantization.rtn import RTN


@pytest.fixture
def tokens():
    return torch.randint(128, (7, 12), generator=torch.Generator().manual_seed(0))


# teachers


@pytest.mark.parametrize("kind", ["tiny", "nonuniform", "packed", "bfloat16"])
def test_streamed_and_online_teachers_are_the_model(kind, request, tokens):
    graph = request.getfixturevalue("nonuniform" if kind == "nonuniform" else "tiny")
    if kind == "packed":
        graph = RTN(QuantSpec(4, 16), head=True)(graph)
    graph = graph.dense(torch.bfloat16) if kind == "bfloat16" else graph
    expected = graph.dense(torch.float32).module()(tokens).flatten(0, 1)
    for teacher in (OnlineTeacher(graph), StreamedTeacher(graph)):
        target = teacher(tokens)
        assert target.hidden.dtype == torch.float32 and target.hidden.shape == (7 * 12, 64)
        assert torch.allclose(target.logits(), expected, atol=2e-4)


def test_a_streamed_teacher_reads_a_saved_graph_block_by_block(nonuniform, tokens, tmp_path, monkeypatch):
    """From the memory map, and never a second block's weights before it is done with the first's."""
    save(nonuniform, tmp_path / "teacher")
    graph, read = load(tmp_path / "teacher"), []
    get = type(graph.weights).__getitem__
    monkeypatch.setattr(type(graph.weights), "__getitem__", lambda self, name: (read.append(name), get(self, name))[1])
    target = StreamedTeacher(graph)(tokens)
    layers = [int(name.split(".")[2]) for name in read if name.startswith("model.layers.")]
    assert layers == sorted(layers) and len(layers) == len({n for n in read if n.startswith("model.layers.")})
    assert torch.allclose(target.logits(), OnlineTeacher(nonuniform)(tokens).logits(), atol=1e-4)


@pytest.mark.slow
def test_a_streamed_teacher_holds_one_block(tmp_path, monkeypatch):
    """Memory of this process's own (files that are mapped can be given back): of 6 blocks, 29 MB each in float32,
    one."""
    layers, name = (Layer(8, 8, 4096),) * 6, "model.layers.0.mlp.up_proj.weight"
    save(Graph.random(Config(256, 512, 64, layers), dtype=torch.bfloat16), tmp_path / "teacher")
    graph = load(tmp_path / "teacher")
    assert graph.weights.entries[name].dtype == torch.bfloat16

    def own():
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(lines["RssAnon"].split()[0]) / 1000

    ids = torch.zeros(2, 8, dtype=torch.long)
    StreamedTeacher(graph)(ids)
    seen, before, forward = [], own(), Block.forward
    monkeypatch.setattr(
        Block, "forward", lambda self, *inputs: (seen.append(own() - before), forward(self, *inputs))[1]
    )
    StreamedTeacher(graph)(ids)
    assert len(seen) == 6 and max(seen) < 50
    whole = OnlineTeacher(graph)
    assert own() - before > 90  # 175 MB, less what the heap had free
    del whole


def test_teachers_name_bad_tokens(tiny):
    for ask in (OnlineTeacher(tiny), StreamedTeacher(tiny)):
        with pytest.raises(InputError, match="0 … 127"):
            ask(torch.full((1, 4), 128))
        with pytest.raises(InputError, match="at most its context, 64"):
            ask(torch.zeros(1, 65, dtype=torch.long))
        with pytest.raises(InputError, match=r"ids \[windows, T\]"):
            ask(torch.zeros(4, dtype=torch.long))


# on-policy text


def test_continuations_are_the_models_own(nonuniform):
    """Greedy: step by step with the cache as with whole forwards; marked behind the prompt."""
    module, prompts = nonuniform.module(), torch.randint(128, (3, 5), generator=torch.Generator().manual_seed(1))
    ids, written = sample_continuations(module, prompts, 6, temperature=0)
    expected = prompts
    for _ in range(6):
        expected = torch.cat((expected, module(expected)[:, -1:].argmax(-1)), 1)
    assert torch.equal(ids, expected)
    assert torch.equal(written, torch.tensor([[False] * 5 + [True] * 6] * 3))


def test_continuations_follow_seed_and_distribution(tiny):
    module, prompts = tiny.module(), torch.ones(4000, 3, dtype=torch.long)
    ids, _ = sample_continuations(module, prompts, 1, seed=3)
    assert torch.equal(ids, sample_continuations(module, prompts, 1, seed=3)[0])
    assert not torch.equal(ids, sample_continuations(module, prompts, 1, seed=4)[0])
    frequencies = torch.bincount(ids[:, -1], minlength=128) / 4000
    assert (frequencies - module(prompts[:1])[0, -1].softmax(-1)).abs().max() < 0.03


def test_nothing_is_written_behind_the_end(tiny):
    import dataclasses

    prompts = torch.randint(128, (2, 5), generator=torch.Generator().manual_seed(1))
    free, _ = sample_continuations(tiny.module(), prompts, 8, temperature=0)
    end = int(free[0, 7])  # the third that row 0 writes (or sooner, if it repeats itself)
    ended = tiny.replace(config=dataclasses.replace(tiny.config, eos_token_id=end))
    ids, written = sample_continuations(ended.module(), prompts, 8, temperature=0)
    stop = free[0, 5:].tolist().index(end) + 5
    assert torch.equal(ids[0, : stop + 1], free[0, : stop + 1])
    assert (ids[0, stop:] == end).all() and written[0].tolist() == [False] * 5 + [True] * (stop - 4) + [False] * (
        12 - stop
    )


def test_continuations_must_fit(tiny):
    with pytest.raises(InputError, match="60 tokens and 5 new ones"):
        sample_continuations(tiny.module(), torch.zeros(1, 60, dtype=torch.long), 5)
    with pytest.raises(InputError, match="n_new of at least 1"):
        sample_continuations(tiny.module(), torch.zeros(1, 6, dtype=torch.long), 0)


# what a cache keeps


# a cache on disk
