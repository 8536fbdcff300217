"""The divergence of two models against naive arithmetic over whole logits; answers that are kept."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tinycompress import RTN
from tinycompress.errors import InputError, OutputError
from tinycompress.evaluation import answers as answering
from tinycompress.evaluation.answers import Answers, answers_of, head_of, streamed_answers
from tinycompress.evaluation.divergence import divergence
from tinycompress.evaluation.perplexity import perplexity
from tinycompress.evaluation.reference_cache import ReferenceCache
from tinycompress.evaluation.statistics import percentile
from tinycompress.graph.graph import Graph

TOKENS = torch.randint(128, (5, 12), generator=torch.Generator().manual_seed(0))
EXACT = {"rtol": 0, "atol": 0}


@pytest.fixture
def pair(nonuniform: Graph) -> tuple[Graph, Graph]:
    """A model and itself at 4 bits."""
    return nonuniform, RTN("w4g16")(nonuniform)


class Stepping:
    """A runtime: whole windows at once, or steps behind a cache, and how often each was asked for."""

    def __init__(self, graph: Graph) -> None:
        self.module = graph.module()
        self.config = graph.config
        self.steps = 0

    def __call__(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.module(ids)
        return logits

    def new_cache(self, batch: int, max_length: int) -> object:
        return self.module.new_cache(batch, max_length)

    def step(self, ids: Tensor, cache: object) -> Tensor:
        self.steps += 1
        logits: Tensor = self.module(ids, cache)
        return logits


@torch.no_grad()
def oracle(reference: Graph, model: Graph) -> dict[str, np.ndarray]:
    """All figures of every position, from whole logits and by loops."""
    logits = [g.module()(TOKENS).double().numpy() for g in (reference, model)]
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in logits)
    five = [np.argsort(-x, -1)[..., :5] for x in (p, q)]
    shared = [[len(set(a) & set(b)) / 5 for a, b in zip(*rows)] for rows in zip(*five)]
    following = TOKENS[:, 1:, None].numpy()
    nlls = [-np.log(np.take_along_axis(x[:, :-1], following, -1)[..., 0]) for x in (p, q)]
    return {
        "kl": (p * np.log(p / q)).sum(-1),
        "top_1": (p.argmax(-1) == q.argmax(-1)).astype(float),
        "top_5": np.array(shared),
        "reference_nll": nlls[0],
        "nll": nlls[1],
    }


@pytest.mark.parametrize("block", [None, 3 * 128])
def test_every_position_is_as_whole_logits_say(
    pair: tuple[Graph, Graph], block: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However few logits exist at a time."""
    if block is not None:
        monkeypatch.setattr(answering, "BLOCK", block)
    expected = oracle(*pair)
    found = divergence(pair[0].module(), pair[1].module(), TOKENS, progress=False)
    assert torch.allclose(found.kl, torch.from_numpy(expected["kl"]), rtol=1e-5, atol=1e-7)
    assert np.array_equal(found.same_top, expected["top_1"]) and 0.05 < expected["top_1"].mean() < 1
    assert np.allclose(found.same_five, expected["top_5"]) and expected["top_5"].mean() < 1
    assert np.allclose(found.nll, expected["nll"], atol=1e-5)
    assert np.allclose(found.reference_nll, expected["reference_nll"], atol=1e-5)
    assert found.tokens == 60 and found.mean_kl == pytest.approx(expected["kl"].mean(), rel=1e-5)


def test_figures_are_those_of_all_positions(pair: tuple[Graph, Graph]) -> None:
    expected = oracle(*pair)
    found = divergence(pair[0].module(), pair[1].module(), TOKENS, progress=False)
    figures = found.figures()
    kl = found.kl.numpy().ravel()
    for name, share in {"kl_median": 0.5, "kl_99": 0.99, "kl_99_9": 0.999, "kl_largest": 1}.items():
        assert figures[name].value == np.quantile(kl, share, method="inverted_cdf")
    for name in ("kl", "top_1", "top_5"):
        assert figures[name].value == pytest.approx(expected[name].mean(), rel=1e-5)
    both = [perplexity(graph.module(), TOKENS, progress=False).value for graph in pair]
    assert figures["reference_perplexity"].value == pytest.approx(both[0], rel=1e-5)
    assert figures["perplexity"].value == pytest.approx(both[1], rel=1e-5)
    assert figures["perplexity_ratio"].value == pytest.approx(both[1] / both[0], rel=1e-5)
    assert all(figure.low <= figure.value <= figure.high for figure in figures.values())
    assert figures["perplexity_ratio"].high < figures["perplexity"].high / figures["reference_perplexity"].low


def test_a_model_does_not_diverge_from_itself(tiny: Graph) -> None:
    figures = divergence(tiny.module(), tiny.module(), TOKENS, progress=False).figures()
    assert {name: figures[name].value for name in ("kl", "kl_largest", "top_1", "top_5", "perplexity_ratio")} == {
        "kl": 0,
        "kl_largest": 0,
        "top_1": 1,
        "top_5": 1,
        "perplexity_ratio": 1,
    }


def test_kl_is_that_of_the_reference_to_the_model() -> None:
    """Not the other way round: p = (3/4, 1/4) and q = (1/4, 3/4, ...) are told apart by a third token."""
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.1, 0.2, 0.7])
    p, q = p, torch.tensor([0.5, 0.1, 0.4])
    ids = torch.zeros(2, 3, dtype=torch.long)
    found = divergence(lambda ids: p.log().expand(1, 3, 3), lambda ids: q.log().expand(1, 3, 3), ids, progress=False)
    assert found.mean_kl == pytest.approx((p * (p / q).log()).sum().item(), rel=1e-6)
    assert found.mean_kl != pytest.approx((q * (q / p).log()).sum().item(), rel=1e-2)


def test_percentiles_of_resampled_windows_are_those_of_their_values() -> None:
    values = torch.rand(4, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    index = torch.randint(4, (10000, 4), generator=torch.Generator().manual_seed(0))
    for share in (0.3, 0.5, 0.99, 1.0):
        drawn = np.quantile(values[index].flatten(1).numpy(), share, axis=1, method="inverted_cdf")
        expected = torch.from_numpy(drawn).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
        interval = percentile(values, share)
        assert [interval.low, interval.high] == pytest.approx(expected.tolist(), abs=1e-12)


def test_a_runtime_is_asked_in_steps_where_logits_are_many(
    pair: tuple[Graph, Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = Stepping(pair[1])
    whole = divergence(pair[0].module(), runtime, TOKENS, progress=False)
    assert runtime.steps == 0
    monkeypatch.setattr(answering, "BLOCK", 2 * 128)
    monkeypatch.setattr(answering, "LOGITS", 5 * 128)  # two blocks of two positions
    stepped = divergence(pair[0].module(), runtime, TOKENS, progress=False)
    assert runtime.steps == 5 * 3
    assert torch.allclose(stepped.kl, whole.kl, rtol=0, atol=1e-5)


def test_models_that_cannot_be_compared_are_refused(tiny: Graph, pair: tuple[Graph, Graph]) -> None:
    module = tiny.module()
    with pytest.raises(InputError, match="vocabulary of the model: found 127"):
        divergence(module, lambda ids: module(ids)[..., :127], TOKENS, progress=False)
    with pytest.raises(InputError, match="logits of window 0: found NaN"):
        divergence(module, lambda ids: module(ids) * float("nan"), TOKENS, progress=False)
    with pytest.raises(InputError, match="windows: found 1; accepted: at least 2"):
        divergence(module, module, TOKENS[:1], progress=False).figures()
    with pytest.raises(InputError, match="context"):
        divergence(module, module, torch.zeros(2, 65, dtype=torch.long), progress=False)


def test_a_streamed_graph_answers_as_its_module(pair: tuple[Graph, Graph]) -> None:
    for graph in pair:
        streamed = streamed_answers(graph, TOKENS, progress=False)
        found = divergence(streamed, graph.dense(torch.float32).module(), TOKENS, progress=False)
        assert found.kl.max() < 1e-9 and found.same_top.min() == 1


def cache_of(folder: Path, graph: Graph, width: int = 64, **limits: int) -> ReferenceCache:
    return ReferenceCache(folder, {"graph": graph.fingerprint()}, (5, 12, width), **limits)


def test_kept_answers_give_the_same_figures_bit_for_bit(pair: tuple[Graph, Graph], tmp_path: Path) -> None:
    """From states of a torch model and its head, and from the logits of a runtime."""
    reference, model = pair
    direct = divergence(reference.module(), model.module(), TOKENS, progress=False)
    cache = cache_of(tmp_path, reference)
    cache.fill(lambda: answers_of(reference.module(), TOKENS), progress=False)
    assert cache.path.stat().st_size == cache.nbytes == 4 * 5 * 12 * 64
    kept = divergence(cache.answers(head_of(reference), 128), model.module(), TOKENS, progress=False)
    runtime = cache_of(tmp_path, reference, width=128)
    runtime.fill(lambda: answers_of(Stepping(reference), TOKENS), progress=False)
    from_logits = divergence(runtime.answers(None, 128), model.module(), TOKENS, progress=False)
    for other in (kept, from_logits):
        assert torch.equal(other.kl, direct.kl) and torch.equal(other.reference_nll, direct.reference_nll)
    assert len(list(tmp_path.glob("*.f32"))) == 2


def test_a_filled_cache_does_not_ask_again(tiny: Graph, tmp_path: Path) -> None:
    asked = []

    def make() -> Answers:
        asked.append(1)
        return answers_of(tiny.module(), TOKENS)

    for _ in range(2):
        cache_of(tmp_path, tiny).fill(make, progress=False)
    assert asked == [1]


def test_a_cache_is_bounded_before_the_reference_is_asked(tiny: Graph, nonuniform: Graph, tmp_path: Path) -> None:
    cache_of(tmp_path, tiny).fill(lambda: answers_of(tiny.module(), TOKENS), progress=False)
    full = cache_of(tmp_path, nonuniform, limit=2 * cache_of(tmp_path, tiny).nbytes - 1)
    with pytest.raises(InputError, match="15,360 bytes for this reference and 15,360 that are there"):
        full.fill(lambda: pytest.fail("asked"), progress=False)
    huge = ReferenceCache(tmp_path, {}, (1 << 20, 1 << 20, 64), limit=1 << 60)
    with pytest.raises(OutputError, match="bytes free"):
        huge.fill(lambda: pytest.fail("asked"), progress=False)


def test_a_damaged_cache_is_refused(tiny: Graph, tmp_path: Path) -> None:
    cache = cache_of(tmp_path, tiny)
    cache.fill(lambda: answers_of(tiny.module(), TOKENS), progress=False)
    data = bytearray(cache.path.read_bytes())
    data[100] ^= 1
    cache.path.write_bytes(data)
    with pytest.raises(InputError, match="other bytes than were written"):
        cache.answers(head_of(tiny), 128)
    about = json.loads(cache.path.with_suffix(".json").read_text())
    assert about["key"] == {"graph": tiny.fingerprint()} and about["shape"] == [5, 12, 64]
