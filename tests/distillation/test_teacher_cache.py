"""A teacher written to disk once: what it holds, what a kill leaves, what is refused."""

import shutil
from collections import namedtuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinycompress import files
from tinycompress.checkpoints.checkpoint import load
from tinycompress.distillation.fused_loss import Loss, fused_loss
from tinycompress.distillation.sparse_targets import Form, count, draw
from tinycompress.distillation.teacher import OnlineTeacher, sample_continuations
from tinycompress.distillation.teacher_cache import open_cache, write_cache
from tinycompress.errors import InputError, OutputError
from tinycompress.graph.graph import Graph


@pytest.fixture
def tokens():
    return torch.randint(128, (7, 12), generator=torch.Generator().manual_seed(0))


@settings(max_examples=40, deadline=None)
@given(r=st.integers(1, 6), V=st.integers(2, 300), n=st.integers(1, 60), seed=st.integers(0, 99))
def test_draws_survive_the_bytes(r, V, n, seed):
    g = torch.Generator().manual_seed(seed)
    logits, uniforms = torch.randn(r, V, generator=g) * 3, torch.rand(r, n, generator=g, dtype=torch.float64)
    form = Form("sample", n, V)
    counts, entries = form.encode(logits, uniforms)
    assert counts.dtype == entries.dtype == np.uint8 and entries.shape == (counts.sum(), form.width)
    ids, probs = form.decode(counts, entries)
    dense = np.zeros((r, V))
    np.add.at(dense, (np.arange(r)[:, None], ids), probs)
    drawn = draw(logits, uniforms)
    expected = torch.stack([torch.bincount(row, minlength=V) for row in drawn]) / n
    assert np.allclose(dense, expected, atol=1e-6)
    kept = [row[p > 0] for row, p in zip(ids, probs)]
    assert all(len(set(row)) == len(row) for row in kept)


@pytest.mark.parametrize(
    ("V", "n", "width"), [(49152, 50, 3), (128256, 50, 3), (128256, 200, 4), (2**20, 50, 4), (2, 1, 3)]
)
def test_the_width_of_an_entry_holds_the_largest_id_and_count(V, n, width):
    form = Form("sample", n, V)
    assert form.width == width
    logits = torch.full((1, V), -50.0)
    logits[0, V - 1] = 50.0
    ids, probs = form.decode(*form.encode(logits, torch.rand(1, n, dtype=torch.float64)))
    assert ids.tolist() == [[V - 1]] and probs.tolist() == [[1.0]]


def test_draws_are_distributed_as_the_teacher():
    logits = torch.tensor([[0.0, 1.0, 2.0, -80.0, 0.5]])
    drawn = draw(
        logits.expand(2000, -1), torch.rand(2000, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    )
    assert torch.allclose(torch.bincount(drawn.flatten(), minlength=5) / 100_000, logits.softmax(-1)[0], atol=0.01)
    ids, counts, per_row = count(torch.tensor([[1, 1, 4], [0, 2, 2]]))
    assert (ids.tolist(), counts.tolist(), per_row.tolist()) == ([1, 4, 0, 2], [2, 1, 1, 2], [2, 2])


def test_top_k_keeps_the_largest():
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(0))
    form = Form("topk", 7, 300)
    ids, probs = form.decode(*form.encode(logits, torch.zeros(4, 0)))
    top = logits.softmax(-1).topk(7, -1)
    assert np.array_equal(ids, top.indices) and np.allclose(probs, top.values, rtol=1e-3)


def write(graph, tokens, folder, **arguments):
    return write_cache(graph, tokens, folder, **({"draws": 20, "k": 9, "shard_tokens": 24} | arguments))


@pytest.mark.parametrize("kind", ["sample", "topk"])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_cache_holds_what_the_teacher_said(kind, streamed, nonuniform, tokens, tmp_path):
    """Any windows, in any order, across shards: against the teacher asked directly."""
    cache = write(nonuniform, tokens, tmp_path / "cache", kind=kind, streamed=streamed)
    assert len(list((tmp_path / "cache").glob("shard-*.bin"))) == 4
    order = [6, 0, 3]
    target = open_cache(tmp_path / "cache", tokens, teacher=nonuniform).target(order)
    probs = OnlineTeacher(nonuniform)(tokens[order]).logits().softmax(-1)
    if kind == "topk":
        top = probs.topk(9, -1)
        assert torch.equal(target.ids, top.indices) and torch.allclose(target.probs, top.values, rtol=2e-3)
    else:
        for row, window in enumerate(order):
            uniforms = torch.from_numpy(np.random.default_rng((0, window)).random((12, 20)))
            drawn = draw(probs[row * 12 : row * 12 + 12].log(), uniforms)
            expected = torch.stack([torch.bincount(d, minlength=128) for d in drawn]) / 20
            found = torch.zeros(12, 128).scatter_add_(
                1, target.ids[row * 12 : row * 12 + 12], target.probs[row * 12 : row * 12 + 12]
            )
            assert (found - expected).abs().sum() <= 0.11  # a draw may fall on the other side of an edge by rounding
    student = torch.randn(36, 8, requires_grad=True)
    fused_loss(student, torch.randn(128, 8), [Loss()], teacher=target).backward()
    assert torch.isfinite(student.grad).all() and cache.vocab_size == 128


def test_every_seed_and_every_window_has_its_own_draws(tiny, tmp_path):
    alike = torch.zeros(2, 12, dtype=torch.long)
    first, other = (write(tiny, alike, tmp_path / str(seed), seed=seed) for seed in (0, 1))
    assert not torch.equal(first.target([0]).ids, first.target([1]).ids)
    assert not torch.equal(first.target([0]).ids, other.target([0]).ids)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("at", [0, 1, 3])
def test_a_killed_run_goes_on_to_the_same_bytes(at, tiny, tokens, tmp_path, monkeypatch):
    write(tiny, tokens, tmp_path / "whole")
    real, calls = files.write_bytes, []

    def dies(path, parts):
        if str(path).endswith(".bin"):
            if len(calls) == at:
                (path.parent / f".{path.name}.tmp-0badcafe").write_bytes(b"half")  # what a kill leaves
                raise KeyboardInterrupt
            calls.append(path.name)
        real(path, parts)

    monkeypatch.setattr(files, "write_bytes", dies)
    with pytest.raises(KeyboardInterrupt):
        write(tiny, tokens, tmp_path / "killed")
    with pytest.raises(InputError, match=f"{at} of 4 shards.*goes on"):
        open_cache(tmp_path / "killed")
    monkeypatch.setattr(files, "write_bytes", real)
    asked = []
    ask = OnlineTeacher.__call__
    monkeypatch.setattr(OnlineTeacher, "__call__", lambda self, ids: (asked.append(len(ids)), ask(self, ids))[1])
    write(tiny, tokens, tmp_path / "killed")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert sum(asked) == 7 - 2 * at
    assert write(tiny, tokens, tmp_path / "killed").target([0]).ids.shape[0] == 12 and sum(asked) == 7 - 2 * at


def test_a_truncated_shard_is_named_and_made_again(tiny, tokens, tmp_path):
    folder = tmp_path / "cache"
    write(tiny, tokens, folder)
    before = contents(folder)
    (folder / "shard-00002.bin").write_bytes(before["shard-00002.bin"][:-5])
    with pytest.raises(InputError, match=r"shard-00002\.bin: found .* bytes; accepted: .* as the index says"):
        open_cache(folder)
    write(tiny, tokens, folder)
    assert contents(folder) == before
    (folder / "shard-00001.bin").unlink()
    with pytest.raises(InputError, match=r"shard-00001\.bin: found no such file"):
        open_cache(folder)


def test_a_damaged_shard_is_named_when_it_is_read(tiny, tokens, tmp_path):
    folder = tmp_path / "cache"
    write(tiny, tokens, folder)
    data = bytearray((folder / "shard-00001.bin").read_bytes())
    data[-1] ^= 1
    (folder / "shard-00001.bin").write_bytes(data)
    cache = open_cache(folder)
    cache.target([0, 1, 6])
    with pytest.raises(InputError, match=r"shard-00001\.bin: found other bytes"):
        cache.target([2])


def test_a_cache_of_something_else_is_refused(tiny, nonuniform, tokens, tmp_path, shared):
    folder = tmp_path / "cache"
    tokenizer = load(shared / "models" / "stories260K").tokenizer
    write(Graph(tiny.config, tiny.weights, tokenizer=tokenizer), tokens, folder)
    open_cache(folder, tokens.int(), tokenizer, tiny)
    with pytest.raises(InputError, match="made for other tokens"):
        open_cache(folder, tokens.flip(0))
    with pytest.raises(InputError, match="another tokenizer"):
        tokenizer.backend.add_tokens(["new"])
        open_cache(folder, tokenizer=tokenizer)
    other = tiny.replace(weights={"model.norm.weight": tiny.tensor("model.norm.weight") * 2})
    with pytest.raises(InputError, match="another teacher"):
        open_cache(folder, teacher=other)
    for graph, arguments, name in (
        (other, {}, "teacher"),
        (tiny, {"draws": 30}, "'n'"),
        (tiny, {"seed": 1}, "seed"),
        (tiny, {"kind": "topk"}, "kind"),
    ):
        with pytest.raises(InputError, match=f"begun with .*{name}"):
            write(graph, tokens, folder, **arguments)
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        write(tiny, tokens, tmp_path / "occupied")
    files.write_json(tmp_path / "old" / "index.json", {"format": 0})
    with pytest.raises(InputError, match="found format 0"):
        open_cache(tmp_path / "old")
    files.write_json(tmp_path / "old" / "index.json", {"format": 1, "kind": "sample"})
    with pytest.raises(InputError, match="found no n, vocab_size"):
        open_cache(tmp_path / "old")
    with pytest.raises(InputError, match="no such file"):
        open_cache(tmp_path / "nothing")
    with pytest.raises(InputError, match="window of the cache: found 7"):
        open_cache(folder).target([7])


def test_too_little_disk_is_said_before_the_teacher_runs(tiny, tokens, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    monkeypatch.setattr(OnlineTeacher, "__call__", lambda *_: pytest.fail("the teacher ran"))
    with pytest.raises(OutputError, match=r"1,000 bytes free, and at least 1,\d\d\d bytes"):
        write(tiny, tokens, tmp_path / "cache")


def test_a_disk_that_fills_up_can_be_gone_on_with(tiny, tokens, tmp_path, monkeypatch):
    real = files.write_bytes

    def full(path, parts):
        if path.name == "shard-00002.bin":
            raise OSError(28, "No space left on device")
        real(path, parts)

    monkeypatch.setattr(files, "write_bytes", full)
    with pytest.raises(OSError, match="No space left on device"):
        write(tiny, tokens, tmp_path / "cache")
    monkeypatch.setattr(files, "write_bytes", real)
    write(tiny, tokens, tmp_path / "cache")
    write(tiny, tokens, tmp_path / "other")
    assert contents(tmp_path / "cache") == contents(tmp_path / "other")


def test_a_teacher_that_says_nan_is_not_cached(tiny, tokens, tmp_path):
    huge = torch.full_like(tiny.tensor("lm_head.weight"), 3e38)  # finite, and its logits are not
    broken = tiny.replace(weights={"lm_head.weight": huge})
    with pytest.raises(InputError, match="teacher on window 0: found NaN"):
        write(broken, tokens, tmp_path / "cache")


def test_bad_settings_are_named(tiny, tokens, tmp_path):
    for arguments, message in (
        ({"kind": "all"}, r"kind of cache: found 'all'"),
        ({"draws": 0}, r"draws: found 0; accepted: 1 … 255"),
        ({"kind": "topk", "k": 129}, r"k: found 129; accepted: 1 … 128"),
        ({"shard_tokens": 0}, "at least 1 token"),
        ({"seed": -1}, "seed of the cache: found -1"),
    ):
        with pytest.raises(InputError, match=message):
            write(tiny, tokens, tmp_path / "cache", **arguments)


def test_text_costs_about_what_the_paper_says(shared, tmp_path):
    """A trained model on its own text, 50 draws: 36 bytes a token at 12 ids; it has a small vocabulary, hence fewer."""
    graph = load(shared / "models" / "stories260K")
    ids, _ = sample_continuations(graph.module(), torch.ones(4, 1, dtype=torch.long), 127)
    cache = write_cache(graph, ids, tmp_path / "cache")
    assert cache.nbytes / ids.numel() < 40
    student = graph.module()
    hidden = student.hidden(ids).flatten(0, 1)
    kl = fused_loss(hidden, student.lm_head.weight, [Loss()], teacher=cache.target(range(4)))
    other = fused_loss(hidden * 0.5, student.lm_head.weight, [Loss()], teacher=cache.target(range(4)))
    assert 0 < kl < other  # the teacher itself fits its samples best
