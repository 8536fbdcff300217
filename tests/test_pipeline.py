"""Passes in order, and a work folder from which a rerun takes up: only what changed, and what follows it, runs
again."""

from __future__ import annotations

import dataclasses
import re
import shutil
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tinycompress import pipeline
from tinycompress.context.longrope import LongRope
from tinycompress.context.scale_rope import ScaleRope
from tinycompress.distillation.distill import Distill
from tinycompress.distillation.training import Training
from tinycompress.errors import InputError
from tinycompress.graph.config import Config, Layer
from tinycompress.graph.graph import Graph
from tinycompress.graph.quant_tensor import QuantSpec, QuantTensor
from tinycompress.pruning.prune_ffn import PruneFFN
from tinycompress.quantization.gptq import GPTQ, gptq_quantize
from tinycompress.quantization.mixed_bits import MixedBits
from tinycompress.quantization.rtn import RTN

CONFIG = Config(vocab_size=64, hidden_size=32, head_dim=8, layers=(Layer(4, 2, 64), Layer(4, 2, 48)), max_position=32)
NORM = "model.norm.weight"
calls: list[str] = []


@dataclass(frozen=True)
class Scale:
    """Multiplies the last norm; counts its calls."""

    by: float
    tokens: Tensor = field(default_factory=lambda: torch.zeros(1), repr=False, compare=False)
    fail: bool = field(default=False, repr=False)

    def __call__(self, graph: Graph) -> Graph:
        calls.append(repr(self))
        return graph.replace(weights={NORM: graph.weights[NORM] * self.by + self.tokens.sum()}, by=self)


class Killed(Exception):
    pass


def killed(graph: Graph) -> Graph:
    raise Killed


@pytest.fixture
def graph() -> Graph:
    calls.clear()
    return Graph.random(CONFIG, seed=1, std=0.1)


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(64, (4, 32), generator=torch.Generator().manual_seed(0))


def run(graph: Graph, *passes: pipeline.Pass, work: Path | None = None) -> tuple[Graph, list[str]]:
    calls.clear()
    return pipeline.run(graph, passes, work, progress=False), list(calls)


def steps_in(work: Path) -> list[Path]:
    return sorted(path for path in work.iterdir() if path.name != "work.json")


def test_passes_run_in_order_and_are_noted(graph: Graph) -> None:
    out, ran = run(graph, Scale(2.0), Scale(3.0))
    assert ran == ["Scale(by=2.0)", "Scale(by=3.0)"] == list(out.history)
    assert torch.equal(out.weights[NORM], graph.weights[NORM] * 6)
    assert graph.history == ()


def test_no_passes_is_the_same_graph(graph: Graph, tmp_path: Path) -> None:
    assert run(graph, work=tmp_path)[0] is graph


def test_a_rerun_skips_what_is_done(graph: Graph, tmp_path: Path) -> None:
    first, ran = run(graph, Scale(2.0), Scale(3.0), work=tmp_path)
    assert len(ran) == 2
    again, ran = run(graph, Scale(2.0), Scale(3.0), work=tmp_path)
    assert ran == []
    assert again.fingerprint() == first.fingerprint()
    assert again.history == first.history


def test_a_longer_pipeline_takes_up_behind_the_shorter(graph: Graph, tmp_path: Path) -> None:
    run(graph, Scale(2.0), work=tmp_path)
    assert run(graph, Scale(2.0), Scale(3.0), work=tmp_path)[1] == ["Scale(by=3.0)"]


def test_a_changed_pass_runs_again_with_all_that_follows(graph: Graph, tmp_path: Path) -> None:
    run(graph, Scale(2.0), Scale(3.0), Scale(5.0), work=tmp_path)
    out, ran = run(graph, Scale(2.0), Scale(4.0), Scale(5.0), work=tmp_path)
    assert ran == ["Scale(by=4.0)", "Scale(by=5.0)"]
    assert torch.equal(out.weights[NORM], graph.weights[NORM] * 40)
    assert run(graph, Scale(2.0), Scale(3.0), Scale(5.0), work=tmp_path)[1] == []  # the old steps are still there


def test_fields_that_stay_out_of_repr_count(graph: Graph, tmp_path: Path) -> None:
    one, other = Scale(2.0, torch.tensor([1.0])), Scale(2.0, torch.tensor([2.0]))
    assert repr(one) == repr(other) and one == other
    run(graph, one, work=tmp_path)
    out, ran = run(graph, other, work=tmp_path)
    assert len(ran) == 1
    assert torch.equal(out.weights[NORM], graph.weights[NORM] * 2 + 2)


def test_another_graph_or_history_is_another_run(graph: Graph, tmp_path: Path) -> None:
    run(graph, Scale(2.0), work=tmp_path)
    assert len(run(Graph.random(CONFIG, seed=2), Scale(2.0), work=tmp_path)[1]) == 1
    noted = Graph(graph.config, graph.weights, ("something",))
    assert run(noted, Scale(2.0), work=tmp_path)[0].history == ("something", "Scale(by=2.0)")


def test_a_teacher_counts_by_its_weights(graph: Graph) -> None:
    @dataclass(frozen=True)
    class Taught:
        teacher: Graph = field(repr=False)

        def __call__(self, graph: Graph) -> Graph:
            return graph

    same, other = Graph.random(CONFIG, seed=1, std=0.1), Graph.random(CONFIG, seed=2, std=0.1)
    assert pipeline._key("", Taught(graph)) == pipeline._key("", Taught(same)) != pipeline._key("", Taught(other))


def test_what_changes_no_result_does_not_count(graph: Graph, tokens: Tensor) -> None:
    def key(**options: object) -> str | None:
        return pipeline._key("", Distill(tokens, graph, Training(steps=1), **options))  # type: ignore[arg-type]

    plain = key()
    assert plain is not None
    assert (
        key(log=Path("log")) == key(work=Path("work")) == plain and key(stop=lambda: False) == plain
    )  # a function alone would have no key
    assert key(on_policy=0.5) != plain
    quiet = pipeline._key("", PruneFFN(tokens, progress=False))
    assert quiet == pipeline._key("", PruneFFN(tokens)) != pipeline._key("", PruneFFN(tokens, keep=0.5))
    assert pipeline._key("", GPTQ(tokens, device="cuda")) == pipeline._key("", GPTQ(tokens))
    windows = tokens.repeat(1, 2)
    assert pipeline._key("", LongRope(windows, journal="a")) == pipeline._key("", LongRope(windows))


def test_a_function_of_the_library_counts_by_its_name(tokens: Tensor) -> None:
    def key(**options: Any) -> str | None:
        return pipeline._key("", MixedBits(tokens, RTN, bits=4, **options))

    assert key() is not None and key() != key(rounding=gptq_quantize) != None  # noqa: E711
    assert key(rounding=lambda *_: None) is None


def test_fresh_makes_the_steps_of_this_run_again(graph: Graph, tmp_path: Path) -> None:
    run(graph, Scale(2.0), Scale(3.0), work=tmp_path)
    run(graph, Scale(2.0), Scale(4.0), work=tmp_path)
    calls.clear()
    pipeline.run(graph, [Scale(2.0), Scale(3.0)], tmp_path, progress=False, fresh=True)
    assert calls == ["Scale(by=2.0)", "Scale(by=3.0)"]
    assert run(graph, Scale(2.0), Scale(4.0), work=tmp_path)[1] == []  # the other run's is still there


def test_a_class_counts_by_its_name_not_by_its_module() -> None:
    def key(name: str, module: str) -> str | None:
        made = dataclasses.make_dataclass(name, [("by", float)], namespace={"__module__": module})
        return pipeline._key("", made(2.0))

    assert key("Halve", "one") == key("Halve", "other") != key("Double", "one")


def test_arrays_dictionaries_and_types_tell_passes_apart() -> None:
    @dataclass(frozen=True)
    class Holder:
        value: object = field(repr=False)

    long = torch.arange(5000)
    values = [
        *(long, long + (long == 2500), long.int(), long.view(2, -1), torch.tensor(1.0)),
        *(long.numpy(), long.numpy() + 1, {"a": long}, {"a": long + 1}, (long,), (long, long), "1", 1, None),
    ]
    keys = [pipeline._key("", Holder(value)) for value in values]
    assert None not in keys
    assert len(set(keys)) == len(values)


def test_a_function_is_a_pass_that_runs_every_time(graph: Graph, tmp_path: Path) -> None:
    def halve(graph: Graph) -> Graph:
        calls.append("halve")
        return graph.replace(weights={NORM: graph.weights[NORM] / 2})

    out, _ = run(graph, Scale(2.0), halve, Scale(3.0), work=tmp_path)
    assert out.history == (
        "Scale(by=2.0)",
        "test_a_function_is_a_pass_that_runs_every_time.<locals>.halve",
        "Scale(by=3.0)",
    )
    again, ran = run(graph, Scale(2.0), halve, Scale(3.0), work=tmp_path)
    assert ran == ["halve"]  # nothing tells what it does, but it did the same: what follows it is found
    assert again.fingerprint() == out.fingerprint() and again.history == out.history


def test_a_result_that_is_no_graph(graph: Graph) -> None:
    with pytest.raises(InputError, match=r"NoneType.*Graph"):
        run(graph, lambda graph: None)  # type: ignore[arg-type, return-value]


def test_killed_in_the_middle_then_resumed_is_bit_identical(graph: Graph, tokens: Tensor, tmp_path: Path) -> None:
    steps = [PruneFFN(tokens, keep=0.75, multiple_of=16), ScaleRope(64), GPTQ(tokens, QuantSpec(4, 16))]
    unbroken, _ = run(graph, *steps, work=tmp_path / "unbroken")
    in_memory, _ = run(graph, *steps)
    with pytest.raises(Killed):
        run(graph, *steps[:2], killed, work=tmp_path / "killed")
    assert len(steps_in(tmp_path / "killed")) == 2  # the two that were done, and no trace of the third
    resumed, _ = run(graph, *steps, work=tmp_path / "killed")
    assert resumed.history == unbroken.history == in_memory.history == tuple(map(repr, steps))
    assert resumed.fingerprint() == unbroken.fingerprint() == in_memory.fingerprint()
    assert isinstance(resumed.weights["model.layers.0.mlp.down_proj.weight"], QuantTensor)
    assert resumed.config.layers == (Layer(4, 2, 48), Layer(4, 2, 32))


def test_a_folder_half_written_by_a_killed_run_is_not_a_step(graph: Graph, tmp_path: Path) -> None:
    run(graph, Scale(2.0), work=tmp_path)
    (step,) = steps_in(tmp_path)
    step.rename(tmp_path / f".{step.name}.tmp-x")  # the name under which checkpoint.save writes
    assert len(run(graph, Scale(2.0), work=tmp_path)[1]) == 1


def damage_weights(step: Path) -> None:
    path = step / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def damage_description(step: Path) -> None:
    path = step / "tinycompress.json"
    path.write_text(path.read_text().replace('"max_position": 32', '"max_position": 33'))


def lose_a_file(step: Path) -> None:
    (step / "config.json").unlink()


@pytest.mark.parametrize("harm", [damage_weights, damage_description, lose_a_file])
@pytest.mark.parametrize("number", [0, 1])
def test_a_damaged_step_is_named_and_made_again(
    harm: Callable[[Path], None], number: int, graph: Graph, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    expected = run(graph, Scale(2.0), Scale(3.0), work=tmp_path)[0].fingerprint()
    before = steps_in(tmp_path)
    harm(before[number])
    again, ran = run(graph, Scale(2.0), Scale(3.0), work=tmp_path)
    assert again.fingerprint() == expected
    assert len(ran) == number  # the last one only; what lies before it is not read
    assert (before[number].name in capfd.readouterr().err) == bool(number)
    if number == 0:
        shutil.rmtree(before[1])
        again, ran = run(graph, Scale(2.0), Scale(3.0), work=tmp_path)
        assert again.fingerprint() == expected and len(ran) == 2
        assert before[0].name in capfd.readouterr().err
    assert steps_in(tmp_path) == before


def test_the_how_to_runs(graph: Graph, tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The passes of docs/howto-custom-pass.md do what the page says."""
    page = Path(__file__).parents[1] / "docs" / "howto-custom-pass.md"
    module = types.ModuleType("howto")
    monkeypatch.setitem(sys.modules, "howto", module)  # where dataclasses look names up
    names = vars(module)
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)[:2]:
        exec(block, names)
    out, _ = run(graph, names["DropLayers"]((0,)), names["WeightedRTN"](tokens, QuantSpec(4, 16)), work=tmp_path)
    assert out.config.layers == CONFIG.layers[1:]
    assert isinstance(out.linear("model.layers.0.mlp.down_proj"), QuantTensor)
    assert out.history == ("DropLayers(drop=(0,))", f"WeightedRTN(spec={QuantSpec(4, 16)!r})")
    with pytest.raises(InputError, match="some, not all"):
        names["DropLayers"]((0, 1))(graph)
