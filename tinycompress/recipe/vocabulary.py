"""The tables of a recipe beside its passes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import InputError

STRETCHES = ("ChooseRope", "LongRope")  # passes whose windows are as long as the new context
MOST = 10**9  # windows, and tokens of one
FORMATS = ("native", "dense", "gptq", "awq", "compressed-tensors", "gguf")


@dataclass(frozen=True)
class Data:
    """Windows of a text.

    Fields:
        text: "pydoc" (the default), "wikitext2", a file or a hub data set.
        samples: how many windows. Default 32.
        seq_len: tokens of a window. Default None: 1024, or the model's context if that is shorter; 512 with `in_order`.
        seed: draws which windows are used. Default 0.
        split: "train" (the default), "validation" or "test", of texts that have them.
        in_order: whether the first windows are taken, as many as there are up to `samples`, as training does. Default
            False: they are drawn, and too few are an error.

    Errors: an `InputError` for numbers that are too small.
    """

    text: str = "pydoc"
    samples: int = 32
    seq_len: int | None = None
    seed: int = 0
    split: str = "train"
    in_order: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.samples <= MOST:
            raise InputError("Data.samples", self.samples, f"a number of windows, 1 … {MOST:,}")
        if self.seq_len is not None and not 2 <= self.seq_len <= MOST:
            raise InputError("Data.seq_len", self.seq_len, f"a number of tokens, 2 … {MOST:,}")


@dataclass(frozen=True)
class Export:
    """What `[export]` says; every field is that option of `tinycompress export`.

    Fields:
        profile: what runtime the files are for. Default "ort".
        dtype: "auto" (default) keeps packed weights packed, "float32" makes all dense.
        scales: how scales are stored, "float32" (default) or "float16".
        accuracy_level: what ONNX Runtime multiplies packed weights in, 4 (default) is int8.
        kv: the cache of keys and values, "float32" (default) or "int8".
        mobile: whether model.ort is added. Default False.
        check: whether the gate runs before the folder appears. Default True.
        context: positions that the export is good for. Default None: the model's; for profiles of fixed shape at most
            2048.
        calibration: text that ranges are taken from. Default None: pydoc.
        ranges: how ranges are chosen. Default "minmax".
        attention_bits: profile qnn, 16 (default) or 8.
        rotate: profile qnn, whether dense weights are rotated first. Default None: they are.
        epcontext: profile qnn, HTP architecture to compile for. Default None.
    """

    profile: str = "ort"
    dtype: str = "auto"
    scales: str = "float32"
    accuracy_level: int = 4
    kv: str = "float32"
    mobile: bool = False
    check: bool = True
    context: int | None = None
    calibration: str | None = None
    ranges: str = "minmax"
    attention_bits: int = 16
    rotate: bool | None = None
    epcontext: str | None = None


TABLES: dict[str, type[Any]] = {"data": Data, "measure": Data, "export": Export}
MEASURED = Data(samples=4, seq_len=None, split="test", in_order=True)  # what quality is measured on by default
