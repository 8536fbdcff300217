"""What every quantization pass shares: specs as text or objects, equal grids whatever their search, tokens from
iterables, bars."""

import dataclasses

import pytest
import torch

from tinycompress.errors import InputError
from tinycompress.graph.quant_tensor import Grid, QuantSpec, QuantTensor
from tinycompress.quantization.autoround import AutoRound
from tinycompress.quantization.awq import AWQ
from tinycompress.quantization.block_tuning import BlockTuning, RoundedLinear
from tinycompress.quantization.embedding import QuantizeEmbedding
from tinycompress.quantization.fake_quant import PackedLinear
from tinycompress.quantization.gptq import GPTQ
from tinycompress.quantization.hqq import HQQ
from tinycompress.quantization.lpbq import is_lpbq
from tinycompress.quantization.mixed_bits import MixedBits
from tinycompress.quantization.rotate import Rotate
from tinycompress.quantization.rtn import RTN, rtn_quantize
from tinycompress.quantization.smoothquant import SmoothQuant

SPEC = QuantSpec(4, 16)
TUNING = BlockTuning(steps=2)
OF_SPECS = [
    lambda tokens, spec: RTN(spec),
    lambda tokens, spec: HQQ(spec),
    lambda tokens, spec: GPTQ(tokens, spec),
    lambda tokens, spec: AWQ(tokens, spec),
]
CALIBRATING = [
    lambda tokens: GPTQ(tokens, SPEC),
    lambda tokens: AWQ(tokens, SPEC),
    SmoothQuant,
    lambda tokens: MixedBits(tokens, RTN, bits=6.0, choices=("w2g16", "w4g16")),
]


@pytest.fixture
def tokens():
    return torch.randint(128, (8, 32), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("make", OF_SPECS)
def test_text_and_objects_are_the_same_spec(tiny, tokens, make):
    text = make(tokens, "w4g16")
    assert text == make(tokens, SPEC) and repr(text) == repr(make(tokens, SPEC))
    assert text(tiny).fingerprint() == make(tokens, SPEC)(tiny).fingerprint()
    names = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")
    mixed = make(tokens, {names[0]: "w4g16", names[1]: QuantSpec(8, 32)})(tiny)
    assert {name: mixed.linear(name).grid for name in names} == {names[0]: Grid(4, 16), names[1]: Grid(8, 32)}
    assert sum(isinstance(weight, QuantTensor) for weight in mixed.weights.values()) == 2
    with pytest.raises(InputError, match="w4g64"):
        make(tokens, "4bit")


def test_choices_and_tables_take_text_or_objects_too(tiny, tokens):
    texts = MixedBits(tokens, RTN, bits=5.0, choices=("w2g16", "w4g16"))
    objects = MixedBits(tokens, RTN, bits=5.0, choices=[QuantSpec(2, 16), "w4g16"])
    assert texts.specs == objects.specs and texts(tiny).fingerprint() == objects(tiny).fingerprint()
    assert QuantizeEmbedding("w8g32", head_spec="w4g16") == QuantizeEmbedding(QuantSpec(8, 32), head_spec=SPEC)
    with pytest.raises(InputError, match="w4g64"):
        MixedBits(tokens, RTN, bits=6.0, choices=("4bit",))


def test_grids_are_equal_whatever_their_search(tiny):
    """A search is no part of a stored weight: what two of them stored can be told apart by the numbers alone."""
    name = "model.layers.0.mlp.up_proj"
    searched = [RTN(dataclasses.replace(SPEC, search=search))(tiny).linear(name) for search in ("minmax", "mse")]
    assert searched[0].grid == searched[1].grid == Grid(4, 16) and type(searched[0].grid) is Grid
    assert not torch.equal(searched[0].scales, searched[1].scales)


@pytest.mark.parametrize("text, deltas", [("w4g16", 4), ("w4g16-lpbq", 1), ("w4", 1)])
def test_the_form_of_the_stored_scales_says_what_may_move(text, deltas):
    """No spec is at hand: the scales themselves have HTP's form, or have not."""
    weight = rtn_quantize(torch.randn(12, 64, generator=torch.Generator().manual_seed(0)), text)
    assert is_lpbq(weight) == (deltas == 1)
    assert PackedLinear(weight, None, torch.float32).scales_delta.shape == (12, deltas)
    assert RoundedLinear(weight, None, torch.float32).delta.shape == (12, deltas)


@pytest.mark.parametrize("make", CALIBRATING)
def test_tokens_may_be_an_iterable(tiny, tokens, make):
    """Batches as a DataLoader gives them, from a generator that can be read once."""
    step = make(batch for batch in tokens.split(3))
    assert torch.equal(step.tokens, tokens) and step(tiny).fingerprint() == make(tokens)(tiny).fingerprint()


@pytest.mark.parametrize("progress", [True, False])
def test_without_progress_nothing_is_printed(tiny, tokens, progress, capsys, monkeypatch):
    bars = []
    for module in ("calibration.walk", "quantization.linear_by_linear", "quantization.embedding"):
        monkeypatch.setattr(f"tinycompress.{module}.tqdm", _recorded(bars))
    for module in ("quantization.mixed_bits", "quantization.rotate"):
        monkeypatch.setattr(f"tinycompress.{module}.tqdm", _recorded(bars))
    packed = RTN(SPEC, progress=progress)(tiny)
    for step in (
        HQQ("w4g16", progress=progress),
        GPTQ(tokens, SPEC, progress=progress),
        AWQ(tokens, SPEC, progress=progress),
        SmoothQuant(tokens, progress=progress),
        Rotate(progress=progress),
        QuantizeEmbedding("w8g32", progress=progress),
        MixedBits(tokens, lambda specs: RTN(specs, progress=progress), bits=6.0, choices=("w4g16",), progress=progress),
    ):
        assert "progress" not in repr(step) and "device" not in repr(step)
        step(tiny)
    AutoRound(tokens, tiny, TUNING, progress=progress)(packed)
    assert len(bars) >= 10 and all(shown == progress for shown in bars)
    assert capsys.readouterr() == ("", "")  # even with progress, a bar waits for two seconds


def _recorded(bars):
    """tqdm that notes whether a bar would be shown."""
    import tqdm

    def bar(*args, disable=False, **options):
        bars.append(not disable)
        return tqdm.tqdm(*args, disable=disable, **options)

    return bar
