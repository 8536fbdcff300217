"""Measures against naive arithmetic, and intervals that cover what they should."""

import math

import pytest
import torch
import torch.nn.functional as F

from tinycompress.errors import InputError
from tinycompress.evaluation.perplexity import environment, perplexity, tokens_per_second
from tinycompress.evaluation.statistics import bootstrap, closure, paired_difference


def test_perplexity_is_the_mean_token_nll(tiny):
    tokens = torch.randint(tiny.config.vocab_size, (3, 20), generator=torch.Generator().manual_seed(0))
    model = tiny.module()
    result = perplexity(model, tokens)
    with torch.no_grad():
        logits = model(tokens)[:, :-1]
    oracle = F.cross_entropy(logits.flatten(0, 1).double(), tokens[:, 1:].flatten())
    assert result.value == pytest.approx(math.exp(oracle), rel=1e-5)
    assert result.tokens == 3 * 19 and "3 non-overlapping windows of 20" in result.protocol
    assert perplexity(lambda ids: model(ids), tokens).value == pytest.approx(result.value, rel=1e-5)


def test_perplexity_refuses_what_it_cannot_measure(tiny):
    with pytest.raises(InputError, match="vocabulary"):
        perplexity(tiny.module(), torch.full((1, 8), 10**6))
    with pytest.raises(InputError, match="context"):
        perplexity(tiny.module(), torch.zeros(1, tiny.config.max_position + 1, dtype=torch.long))
    with pytest.raises(InputError, match="windows"):
        perplexity(tiny.module(), torch.zeros(8, dtype=torch.long))


def test_bootstrap_intervals_cover_the_mean_about_as_often_as_they_say():
    g = torch.Generator().manual_seed(0)
    hits = 0
    for seed in range(200):
        x = torch.randn(40, generator=g, dtype=torch.float64)
        interval = bootstrap(lambda index, x=x: x[index].mean(-1), 40, seed, draws=500)
        hits += interval.low <= 0 <= interval.high
    assert 0.88 <= hits / 200 <= 0.99


def test_pairing_removes_what_the_windows_share():
    g = torch.Generator().manual_seed(0)
    hardness = torch.randn(30, generator=g, dtype=torch.float64) * 5
    a = hardness + 0.1 + 0.01 * torch.randn(30, generator=g, dtype=torch.float64)
    interval = paired_difference(a, hardness)
    assert interval.excludes_zero and interval.value == pytest.approx(0.1, abs=0.01)


def test_closure_is_the_share_won_back():
    fp, rtn = torch.full((8,), 3.0, dtype=torch.float64), torch.full((8,), 4.0, dtype=torch.float64)
    assert closure(rtn, torch.full((8,), 3.6, dtype=torch.float64), fp).value == pytest.approx(0.4)
    assert closure(rtn, rtn, fp).value == pytest.approx(0)


def test_speed_and_environment_are_reported(tiny):
    assert tokens_per_second(tiny.module(), torch.zeros(1, 8, dtype=torch.long), repeats=1) > 0
    assert environment()["versions"]["torch"]
