"""What the tests of static exports share: tiny graphs, short chunks, and a comparison with torch."""

import dataclasses
from importlib import import_module

import pytest
import torch
from conftest import random_graph

from tinycompress.errors import InputError
from tinycompress.export import StaticChoices, StaticModel, export, read
from tinycompress.export.static.forms import FORMS
from tinycompress.graph.config import Config, Layer
from tinycompress.graph.graph import Graph
from tinycompress.graph.rope import Rope

MIXED = (Layer(4, 2, 96), Layer(2, 1, 64), Layer(0, 0, 32), Layer(4, 4, 0), Layer(3, 1, 48))


YARN = Rope(type="yarn", factor=4.0, original_max_position=16)


BIASES = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})


WIDE = {"kl": 9.0, "flips": 1.0, "perplexity": 9.0}


@pytest.fixture(autouse=True)
def no_runtime(monkeypatch):
    """The gate without third-party runtimes, whether installed or not: they have tests of their own below."""
    monkeypatch.setattr(import_module("tinycompress.export.gate.verify"), "installed", lambda name: False)


@pytest.fixture
def short_chunks(monkeypatch):
    """Chunks of 8 positions, so that prompts of a tiny model cross several."""
    from tinycompress.export.static import calibrate as static_calibrate
    from tinycompress.export.static import forms as static_forms
    from tinycompress.export.static import write as static_write

    forms = {name: dataclasses.replace(form, chunk=8) for name, form in FORMS.items()}
    for module in (static_forms, static_calibrate, static_write):
        monkeypatch.setattr(module, "FORMS", forms)


def small(**changes) -> Graph:
    fields = dict(vocab_size=128, hidden_size=64, head_dim=16, layers=(Layer(4, 2, 96),) * 2, max_position=32)
    return random_graph(Config(**(fields | changes)))


def ids_of(graph: Graph, T: int) -> torch.Tensor:
    return torch.randint(graph.config.vocab_size, (1, T), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def assert_same(graph: Graph, folder, profile: str = "static", exact: bool = False, atol: float = 1e-4) -> None:
    """One prompt of the whole context, and chunks of every kind behind each other, within `atol` of torch."""
    static = StaticChoices(calibration=ids_of(graph, graph.config.max_position))
    export(graph, folder, profile, check=False, static=static, progress=False)
    stored, model = read(folder), StaticModel(folder, exact=exact, threads=1)
    torch_model, ids = stored.dense(torch.float32).module(), ids_of(graph, graph.config.max_position)
    expected = torch_model(ids)
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(model(ids), expected, atol=atol, rtol=0)
    T = ids.shape[1]
    cache = model.new_cache(1, T)
    for start, stop in [
        (0, 7),
        (7, 8),
        (8, 16),
        (16, T - 3),
        *((i, i + 1) for i in range(T - 3, T)),
    ]:  # the last step fills the last slot
        torch.testing.assert_close(model.step(ids[:, start:stop], cache), expected[:, start:stop], atol=atol, rtol=0)
    with pytest.raises(InputError, match="at most 32"):
        model.step(ids[:, :1], cache)
