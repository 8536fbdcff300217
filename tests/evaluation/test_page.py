"""The page about compressed models: its verdict, its figures, its pictures, and that it needs nothing but itself."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from tinycompress import RTN
from tinycompress.evaluation.page import page
from tinycompress.evaluation.pictures import bars_by_layer, dots_on_a_log_axis, size_against_perplexity
from tinycompress.evaluation.statistics import Interval
from tinycompress.evaluation.verdict import DO_NOT, LOOK, SHIP, Judged, Limits, layers_of, verdict
from tinycompress.graph.graph import Graph

VOID = {"meta", "line", "circle", "rect"}
FINE = {
    "perplexity": Interval(10.2, 9, 11),
    "reference_perplexity": Interval(10, 9, 11),
    "perplexity_ratio": Interval(1.02, 1.01, 1.03),
    "kl": Interval(0.02, 0.01, 0.03),
    "kl_median": Interval(0.01, 0.005, 0.02),
    "kl_99": Interval(0.3, 0.2, 0.4),
    "kl_99_9": Interval(0.8, 0.5, 1),
    "kl_largest": Interval(3, 2, 3),
    "top_1": Interval(0.95, 0.94, 0.96),
    "top_5": Interval(0.93, 0.92, 0.94),
}
REFERENCE = Judged("models/before", 400_000_000, 1000, 64, [(4, 128, 32.0)] * 3)
AFTER = Judged("models/after", 100_000_000, 900, 64, [(4, 128, 4.5), (4, 96, 4.5), (4, 64, 4.5)], FINE)


class Outline(HTMLParser):
    """Every tag closed in order, and all attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.mark.parametrize(
    ("changed", "decision"),
    [
        ({}, SHIP),
        ({"perplexity_ratio": Interval(1.04, 1.02, 1.06)}, LOOK),  # its worse end counts
        ({"perplexity_ratio": Interval(0.9, 0.8, 1.04)}, SHIP),
        ({"perplexity_ratio": Interval(1.2, 1.1, 1.3)}, DO_NOT),
        ({"top_1": Interval(0.91, 0.89, 0.93)}, LOOK),
        ({"top_1": Interval(0.76, 0.74, 0.8)}, DO_NOT),
        ({"kl_99": Interval(0.9, 0.8, 1.1)}, LOOK),
        ({"kl_99": Interval(2.9, 2.8, 3.1)}, DO_NOT),
    ],
)
def test_the_worst_figure_decides_and_stands_first(changed: dict[str, Interval], decision: str) -> None:
    found = verdict(replace(AFTER, figures=FINE | changed), REFERENCE, Limits())
    assert found.decision == decision
    words = {"perplexity_ratio": "Perplexity", "top_1": "The likeliest", "kl_99": "At one position"}
    if decision != SHIP:
        assert found.reasons[0].startswith(words[next(iter(changed))])
    assert found.reasons[-1] == "It takes 100 MB in place of 400 MB, 4.0 times smaller."


def test_a_failed_gate_is_not_shipped() -> None:
    checks = [{"check": "kl", "figure": 1.0, "limit": 0.1, "passed": False, "about": "nats"}]
    failed = verdict(replace(AFTER, gate={"passed": False, "checks": checks}), REFERENCE, Limits())
    assert failed.decision == DO_NOT and failed.reasons[0] == "The gate of the export failed (kl)."
    assert verdict(replace(AFTER, gate={"passed": True, "checks": []}), REFERENCE, Limits()).decision == SHIP
    grown = verdict(replace(AFTER, nbytes=500_000_000), REFERENCE, Limits())
    assert grown.reasons[-1] == "It takes 500 MB, more than the reference's 400 MB."


def test_bits_count_scales(nonuniform: Graph) -> None:
    """4-bit integers, and a scale of 32 bits for 16 of them."""
    layers = layers_of(RTN("w4g16")(nonuniform))
    assert [layer[:2] for layer in layers] == [(layer.n_heads, layer.ffn_dim) for layer in nonuniform.config.layers]
    assert all(bits == pytest.approx(6) for _, _, bits in layers)
    assert all(bits == 32 for _, _, bits in layers_of(nonuniform))


def test_a_page_holds_all_and_asks_for_nothing() -> None:
    metrics = {"piqa acc": {"value": 0.55, "low": 0.5, "high": 0.6, "reference": 0.58}}
    hostile = replace(AFTER, name='<script>alert("1")</script>', metrics=metrics, history=["Prune(a<b)"])
    gate = {"passed": True, "checks": [{"check": "kl", "figure": 0.01, "limit": 0.1, "passed": True, "about": "n<m"}]}
    text = page(REFERENCE, [replace(AFTER, gate=gate), hostile], "8 windows of pydoc")
    outline = Outline(text)
    assert "script" not in outline.tags and "link" not in outline.tags and "img" not in outline.tags
    assert not re.search(r"https?:|url\(|@import|src=|href=", text)
    assert outline.tags.count("svg") == outline.tags.count("figure") == 2 + 2 * 2  # no picture of heads: none changed
    words = " ".join(outline.words)
    for piece in ("Ship it: after", "100 MB", "10.2", "[9, 11]", "95.0%", "0.58", "0.55", "8 windows of pydoc"):
        assert piece in words
    assert "Prune(a<b)" in words and "n<m" in words


def places(svg: str, tag: str) -> list[dict[str, float]]:
    """The numbers of every element of a kind."""
    found = re.findall(rf"<{tag} ([^>]*)>", svg)
    return [{name: float(value) for name, value in re.findall(r'(\w+)="([-\d.]+)"', item)} for item in found]


def test_dots_lie_where_their_figures_say() -> None:
    points = [("a", 100, Interval(20.0, 19, 21)), ("b", 50, Interval(10.0, 9, 11)), ("c", 25, Interval(15.0, 14, 16))]
    a, b, c = places(size_against_perplexity(points), "circle")
    assert a["cx"] - b["cx"] == pytest.approx(2 * (b["cx"] - c["cx"]), abs=0.3)
    assert b["cy"] - c["cy"] == pytest.approx(c["cy"] - a["cy"], abs=0.3) and a["cy"] < c["cy"]
    rows = [("x", [Interval(value, value / 2, value * 2)]) for value in (0.001, 0.1, 1.0)]
    dots = places(dots_on_a_log_axis(rows, ["a"]), "circle")
    first, second, third = (dot["cx"] for dot in dots)
    assert (second - first) / (third - second) == pytest.approx(2, rel=0.01)
    zero = dots_on_a_log_axis([("x", [Interval(0, 0, 0)])], ["a"])
    assert all(math.isfinite(value) for dot in places(zero, "circle") for value in dot.values())


def test_bars_are_as_tall_as_their_values() -> None:
    shapes = places(bars_by_layer([4, 4], [2, 1, 0], "bits", "Bits", 1), "rect")
    after, before = shapes[:3], shapes[3:]
    assert len(before) == 2 and before[0]["height"] == before[1]["height"]
    assert after[0]["height"] == pytest.approx(before[0]["height"] / 2, abs=0.1)
    assert after[1]["height"] == pytest.approx(before[0]["height"] / 4, abs=0.1) and after[2]["height"] == 0
