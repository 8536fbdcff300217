"""LongRoPE's search: what it starts from, finds, and refuses."""

import pytest
import torch
from context_cases import ids_of

from tinycompress.checkpoints.checkpoint import load, save
from tinycompress.context.longrope import Journal, LongRope, first_factors, search
from tinycompress.context.scale_rope import ScaleRope
from tinycompress.errors import InputError
from tinycompress.evaluation.perplexity import perplexity
from tinycompress.graph.rope import Rope


def test_the_first_generation_holds_the_known_methods():
    linear, parts, ntk = first_factors(Rope(factor=4.0, original_max_position=2048), 64)
    assert linear == (4.0,) * 32
    assert parts[:9] == (1.0,) * 9 and parts[21:] == (4.0,) * 11  # YaRN's ramp of TinyLlama: 8 … 21
    assert ntk[0] == 1.0 and ntk[-1] == 4.0 and ntk == tuple(sorted(ntk))
    assert ntk[15] == pytest.approx(4 ** (30 / 62), abs=0.01)


def test_the_search_finds_a_planted_optimum():
    target = (1.0, 1.3, 2.2, 4.5)
    asked = []

    def loss(factors):
        asked.append(factors)
        return sum((a - b) ** 2 for a, b in zip(factors, target))

    first = [(4.0,) * 4, (1.0, 1.0, 4.0, 4.0)]
    best = search(loss, first, 4.0, population=16, generations=12, seed=0)
    assert (
        sum((a - b) ** 2 for a, b in zip(best, target))
        < 0.05
        < min(sum((a - b) ** 2 for a, b in zip(f, target)) for f in first)
    )
    assert len(asked) == len(set(asked)) <= 16 + 11 * 12
    assert all(f == tuple(sorted(f)) and f[0] >= 1 and f[-1] <= 5.0 for f in asked)
    assert best == search(lambda f: sum((a - b) ** 2 for a, b in zip(f, target)), first, 4.0, 16, 12, seed=0)


def test_longrope_takes_up_where_it_ended(tiny, tmp_path, monkeypatch):
    text, journal = ids_of(tiny, 2, 128), tmp_path / "journal.json"
    search_of = LongRope(text, population=6, generations=2, journal=journal)
    whole = search_of(tiny)
    rope = whole.config.rope
    assert (rope.type, rope.factor, rope.original_max_position, whole.config.max_position) == ("longrope", 2.0, 64, 128)
    assert rope.short_factor == (1.0,) * 8 and len(rope.long_factor) == 8
    assert whole.history == ("LongRope(population=6, generations=2, short='original', attention_factor=None, seed=0)",)
    nll = perplexity(whole.module(), text).nll.mean().item()
    known = Journal(journal, search_of._task(tiny)).losses
    assert known[rope.long_factor] == min(known.values()) == pytest.approx(nll, abs=1e-6)
    linear = (2.0,) * 8
    assert known[linear] >= known[rope.long_factor]
    monkeypatch.setattr("tinycompress.context.longrope.perplexity", None)  # nothing is measured twice
    assert search_of(tiny).config == whole.config
    with pytest.raises(InputError, match="the journal of this model and text"):
        LongRope(text + 1 - 1 + (text == 5), population=6, generations=2, journal=journal)(tiny)
    save(whole, tmp_path / "saved")
    ids = ids_of(tiny, 1, 100)
    assert torch.equal(load(tmp_path / "saved").module()(ids), whole.module()(ids))


def test_longrope_with_one_list_keeps_rotated_keys(tiny):
    out = LongRope(ids_of(tiny, 1, 128), population=4, generations=1, short="same")(tiny)
    assert out.config.rope.short_factor == out.config.rope.long_factor and not out.config.rope.varies_with_length


def test_longrope_refuses(tiny):
    text = ids_of(tiny, 1, 128)
    for bad, match in [
        (dict(tokens=text[0]), "at least one window"),
        (dict(population=3), "population.*at least 4"),
        (dict(generations=0), "generations.*at least 1"),
        (dict(short="none"), r"original \| same"),
    ]:
        with pytest.raises(InputError, match=match):
            LongRope(**(dict(tokens=text) | bad))
    with pytest.raises(InputError, match="longer ones than the model's context, 64"):
        LongRope(text[:, :64])(tiny)
    with pytest.raises(InputError, match=r"already scaled.*an unscaled model"):
        LongRope(ids_of(tiny, 1, 256))(ScaleRope(128, "yarn")(tiny))
