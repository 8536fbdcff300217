"""What each runtime takes: frozen data, no code beyond a look-up.

A profile says which operators, bit widths and shapes a runtime accepts, since which version, and how far its answers
may be from torch's. The emitter and the gate read it; neither knows a runtime by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from tinycompress.errors import InputError
from tinycompress.graph.quant_tensor import Grid, QuantSpec

IR_VERSIONS: Mapping[int, int] = MappingProxyType({19: 9, 21: 10, 23: 11, 24: 11})  # of ONNX's first release with each


@dataclass(frozen=True)
class Profile:
    """One runtime's demands.

    Fields:
        name: as `export(profile=…)` takes it.
        form: whose operators: "contrib" (those of ONNX Runtime) or "standard".
        opset: version of the standard operators.
        bits: widths of packed weights; narrower ones are widened to the next.
        min_block: shortest quantization block, in weights.
        max_block: longest quantization block, in weights.
        head_dim_multiple: what the fused attention operator wants of head_dim; other widths are drawn in smaller
            operators.
        floors: first runtime version that runs "base", and each feature beyond it.
        domains: contrib operator sets and their versions. Default none.
        limits: of the gate: largest figure that passes, by check. Default none beyond the common ones.
        powers_of_two: whether blocks are powers of two. Default True; without it a block is a group, as long as it
            comes.
        shares_cache: whether past and present of a layer may be one buffer. Default False.
        caches: what keys and values may be kept as. Default float32 alone.
        symmetric: whether zero points are refused. Default False.
        float_zeros: widths whose zero points may be floats. Default none.
        grouped: whether every layer with attention must have fewer KV heads than heads. Default False.
        width_multiple: what hidden, FFN, head and vocabulary sizes are multiples of. Default 1.
        joins: whether packed linears of one input and one grid become one product: q, k and v; gate and up. Default
            False.
        position_ids: whether positions are an input. Default False: they are counted from the attention mask.
        weight_rows: whether packed weights lie as [N, K] behind Cast and Mul, the form that an NPU compiler matches,
            not behind DequantizeLinear. Default False.
        layout: of the folder: "flat" (default; model.onnx and model.onnx.data) or "transformers.js" (onnx/model_q4.onnx
            and …_data).
        largest_file: in bytes. Default None: no limit.
        runtime: what proves it beside ONNX Runtime: a folder of export/runtimes. Default "onnxruntime".
    """

    name: str
    form: str
    opset: int
    bits: tuple[int, ...]  # widths of packed weights; narrower ones are widened to the next
    min_block: int  # shortest and longest quantization block; blocks are powers of two
    max_block: int
    head_dim_multiple: int  # that the fused attention operator takes; other widths are drawn in smaller operators
    floors: Mapping[str, str]  # first runtime version that runs "base" and each feature beyond it
    domains: Mapping[str, int] = field(default_factory=dict)  # contrib operator sets and their versions
    limits: Mapping[str, float] = field(default_factory=dict)  # the gate: check → largest figure that passes
    powers_of_two: bool = True  # of blocks; without it a block is a group, as long as it comes
    shares_cache: bool = False  # past and present of a layer may be one buffer
    caches: tuple[str, ...] = ("float32",)  # what keys and values may be kept as
    symmetric: bool = False  # no zero points
    float_zeros: tuple[int, ...] = ()  # widths whose zero points may be floats
    grouped: bool = False  # every layer with attention has fewer KV heads than heads
    width_multiple: int = 1  # of hidden, FFN, head and vocabulary
    joins: bool = False  # packed linears of one input and one grid are one product: q, k and v; gate and up
    position_ids: bool = False  # an input; otherwise positions are counted from the attention mask
    weight_rows: bool = (
        False  # packed weights as [N, K] behind Cast and Mul, the form an NPU compiler matches, not DequantizeLinear
    )
    layout: str = "flat"  # "flat": model.onnx and model.onnx.data; "transformers.js": onnx/model_q4.onnx and …_data
    largest_file: int | None = None  # bytes
    runtime: str = "onnxruntime"  # what proves it beside ONNX Runtime: a folder of export/runtimes

    @property
    def ir_version(self) -> int:
        """The version of the file format, which came with the operators."""
        return IR_VERSIONS[self.opset]

    def container(self, bits: int) -> int:
        """The narrowest width the runtime has that holds `bits`."""
        return min(b for b in self.bits if b >= bits)

    def check_zeros(self, name: str, spec: QuantSpec | Grid) -> None:
        """An `InputError` for zero points that the runtime does not take."""
        if self.symmetric and not spec.symmetric:
            raise InputError(f"grid of {name}", str(spec), f"a symmetric one (no -asym) for the {self.name} profile")
        if spec.float_zero and self.container(spec.bits) not in self.float_zeros:
            raise InputError(
                f"grid of {name}",
                f"{spec}: float zero points",
                f"integer ones (-asym) for the {self.name} profile, or the ort profile",
            )

    def block(self, name: str, group: int, in_features: int) -> int:
        """The block length for a weight with groups of `group` along K = `in_features`: the largest power of two that
        divides the group. One group a row may end in a part-filled block, since every block has the same scale."""
        if not self.powers_of_two and (group % self.min_block == 0 or group == in_features):
            return group
        block = min(group & -group, self.max_block)
        if block >= self.min_block:
            return block
        if group == in_features:
            return self.min_block
        raise InputError(
            f"group_size of {name}",
            group,
            f"a multiple of {self.min_block}, or per-channel, for the {self.name} profile",
        )

    def minimum_version(self, features: set[str]) -> str:
        """The first runtime version with everything a model uses."""
        versions = [self.floors["base"], *(self.floors[f] for f in features if f in self.floors)]
        return max(versions, key=lambda v: tuple(int(part) for part in v.split(".")))


def _frozen(**values: str) -> Mapping[str, str]:
    return MappingProxyType(values)


# Float limits at level 0 are what two correct float32 runtimes differ by; the others bound what int8 activations
# (accuracy_level 4) may cost on top of the graph's own quantization.
LIMITS: Mapping[str, float] = MappingProxyType(
    {
        "tables": 1e-6,
        "prefill": 1e-4,
        "decode": 1e-4,
        "turns": 1e-4,
        "padding": 1e-4,
        "left_padding": 1e-4,
        "beyond_context": 1e-4,
        "end_of_context": 1e-4,
        "kl": 0.05,
        "flips": 0.1,
        "perplexity": 0.01,
    }
)

# ONNX Runtime on CPUs, Android and iOS.
ORT = Profile(
    name="ort",
    form="contrib",
    opset=21,
    domains=MappingProxyType({"com.microsoft": 1}),
    bits=(2, 4, 8),
    min_block=16,
    # above it 2-bit weights lose the int8 kernel, and activations share one int8 scale over too many channels
    max_block=128,
    head_dim_multiple=16,
    float_zeros=(2, 4),  # computed in float whatever the accuracy level; 8 bits are refused by the kernel
    # local_window_size means one position more than transformers' windows up to 1.23.2
    floors=_frozen(base="1.20.1", bits_2="1.24.4", bits_8="1.23.2", gather="1.23.2", window="1.24.4", kv_int8="1.27.0"),
    limits=LIMITS,
    shares_cache=True,
    joins=True,
    caches=("float32", "int8"),
)

# The same graph as transformers.js and onnxruntime-web read it. A browser holds a file in one ArrayBuffer;
# transformers.js
# makes float caches.
WEB = dataclasses.replace(
    ORT, name="web", float_zeros=(), layout="transformers.js", largest_file=2**31 - 1, caches=("float32",)
)

# Any runtime of the ONNX standard. Two and three bits travel in four: opset 24 has no int2.
STD = Profile(
    name="std",
    form="standard",
    opset=24,
    bits=(4, 8),
    min_block=8,
    max_block=1 << 30,
    head_dim_multiple=1,
    floors=_frozen(base="1.24.4"),
    limits=LIMITS,
    powers_of_two=False,
)

# OpenVINO's NPU pipeline, which compiles static shapes of a stateful model, takes symmetric weights and computes in
# float16: hence the wider limits.
OPENVINO_NPU = dataclasses.replace(
    STD,
    name="openvino-npu",
    min_block=64,
    symmetric=True,
    grouped=True,  # its pipeline of 2026.4 ends with an internal error otherwise
    width_multiple=64,
    position_ids=True,
    weight_rows=True,
    runtime="openvino",
    limits=MappingProxyType({**LIMITS, "perplexity": 0.03, "flips": 0.15}),
)

# The Qualcomm HTP compiler: fixed shapes, uint16 activations, weights int4 or int8 a channel or int4 in blocks.
QNN = Profile(
    name="qnn",
    form="static",
    opset=23,
    domains=MappingProxyType({"com.microsoft": 1}),
    bits=(4, 8),
    min_block=16,
    max_block=128,
    head_dim_multiple=2,
    floors=_frozen(base="1.23.2"),
    limits=MappingProxyType({**LIMITS, "kl": 0.1, "perplexity": 0.03}),
    symmetric=True,
    runtime="qnn",
)

# RKNN and other compilers of fixed float graphs, in operators as old as opset 19.
STATIC = Profile(
    name="static",
    form="static",
    opset=19,
    bits=(),
    min_block=8,
    max_block=128,
    head_dim_multiple=2,
    floors=_frozen(base="1.20.1"),
    limits=MappingProxyType({**LIMITS, "kl": 1e-4, "flips": 0.05, "perplexity": 1e-3}),
    runtime="rknn",
)

PROFILES: Mapping[str, Profile] = MappingProxyType({p.name: p for p in (ORT, WEB, STD, OPENVINO_NPU, QNN, STATIC)})


def profile_of(profile: str | Profile) -> Profile:
    """A profile by name; an unknown one is an `InputError`."""
    if isinstance(profile, Profile):
        return profile
    if profile not in PROFILES:
        raise InputError("profile", repr(profile), " | ".join(PROFILES))
    return PROFILES[profile]
