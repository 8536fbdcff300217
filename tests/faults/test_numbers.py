"""Numbers that are none: NaN weights are refused wherever they lie, and JSON never has NaN."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from tinycompress.checkpoints.checkpoint import save
from tinycompress.errors import InputError
from tinycompress.files import read_json, write_json
from tinycompress.graph.graph import Graph
from tinycompress.graph.quant_tensor import QuantTensor
from tinycompress.quantization.rtn import RTN

NAMES = ["model.norm.weight", "model.layers.1.input_layernorm.weight", "model.embed_tokens.weight", "lm_head.weight"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [*NAMES, "model.layers.0.mlp.down_proj.weight"])
def test_a_weight_that_is_no_number_is_refused(name: str, value: float, tiny: Graph, tmp_path: Path) -> None:
    weight = tiny.tensor(name).clone()
    weight.view(-1)[3] = value
    broken = tiny.replace(weights={name: weight})
    ways = [
        lambda: save(broken, tmp_path / "out"),
        lambda: save(broken, tmp_path / "out", dense=True),
        lambda: save(broken, tmp_path / "out.gguf", format="gguf"),
        broken.check_finite,
        broken.module,
    ]
    for way in ways:
        with pytest.raises(InputError, match=f"{name}.*NaN or infinite"):
            way()
    assert not any(tmp_path.iterdir())


def test_a_scale_that_is_no_number_is_refused(tiny: Graph, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    packed = RTN("w4g32")(tiny)
    weight = packed.weights[name]
    assert isinstance(weight, QuantTensor)
    scales = weight.scales.clone()
    scales[0, 0] = torch.nan
    broken = packed.replace(weights={name: QuantTensor(weight.packed, scales, weight.zeros, weight.grid, weight.shape)})
    with pytest.raises(InputError, match=f"{name}.scales.*NaN"):
        save(broken, tmp_path / "out")
    with pytest.raises(InputError, match="NaN"):
        broken.module()


def test_an_export_without_the_gate_refuses_it_too(tiny: Graph, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from tinycompress.export import export

    broken = tiny.replace(weights={NAMES[0]: tiny.tensor(NAMES[0]) * torch.nan})
    for profile in ("ort", "static"):
        with pytest.raises(InputError, match=NAMES[0]):
            export(broken, tmp_path / "out", profile=profile, check=False)
    assert not any(tmp_path.iterdir())


def test_json_has_null_for_what_is_no_number(tmp_path: Path) -> None:
    data = {"a": math.nan, "b": [1.5, (math.inf, {"c": -math.inf})], "d": 10**400}
    write_json(tmp_path / "file.json", data | {"d": 1})

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    read = json.loads((tmp_path / "file.json").read_text(), parse_constant=refuse)
    assert read == {"a": None, "b": [1.5, [None, {"c": None}]], "d": 1}


@pytest.mark.parametrize(
    "text", ['{"a":' + "[" * 100_000 + "]" * 100_000 + "}", '{"a": 1' + "0" * 400 + "}", "\xff", "[]"]
)
def test_json_that_cannot_be_read_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "file.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=r"file\.json"):
        read_json(tmp_path / "file.json")
