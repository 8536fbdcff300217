"""What each runtime takes: frozen data, no code beyond a look-up.

A profile says which operators, bit widths and shapes a runtime accepts, since which version, and how far its answers
may be from torch's. The emitter and the gate read it; neither knows a runtime by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from tinycompress.errors import InputError


@dataclass(frozen=True)
class Profile:
    """One runtime's demands."""

    name: str
    opset: int
    ir_version: int
    domains: Mapping[str, int]  # contrib operator sets and their versions
    bits: tuple[int, ...]  # widths of packed weights; narrower ones are widened to the next
    min_block: int  # shortest and longest quantization block; blocks are powers of two
    max_block: int
    head_dim_multiple: int
    floors: Mapping[str, str]  # first runtime version that runs "base" and each feature beyond it
    limits: Mapping[str, float] = field(default_factory=dict)  # the gate: check → largest figure that passes

    def container(self, bits: int) -> int:
        """The narrowest width the runtime has that holds `bits`."""
        return min(b for b in self.bits if b >= bits)

    def block(self, name: str, group: int, in_features: int) -> int:
        """The block length for a weight with groups of `group` along K = `in_features`: the largest power of two that
        divides the group. One group a row may end in a part-filled block, since every block has the same scale."""
        block = min(group & -group, self.max_block)
        if block >= self.min_block:
            return block
        if group == in_features:
            return self.min_block
        raise InputError(f"group_size of {name}", group, f"a multiple of {self.min_block}, or per-channel, for the {self.name} profile")

    def minimum_version(self, features: set[str]) -> str:
        """The first runtime version with everything a model uses."""
        versions = [self.floors["base"], *(self.floors[f] for f in features if f in self.floors)]
        return max(versions, key=lambda v: tuple(int(part) for part in v.split(".")))


def _frozen(**values: str) -> Mapping[str, str]:
    return MappingProxyType(values)


# ONNX Runtime on CPUs, Android and iOS. Float limits at level 0 are what two correct float32 runtimes differ by;
# the others bound what int8 activations (accuracy_level 4) may cost on top of the graph's own quantization.
ORT = Profile(
    name="ort",
    opset=21,
    ir_version=10,
    domains=MappingProxyType({"com.microsoft": 1}),
    bits=(2, 4, 8),
    min_block=16,
    max_block=128,  # above it 2-bit weights lose the int8 kernel, and activations share one int8 scale over too many channels
    head_dim_multiple=16,
    floors=_frozen(base="1.20.1", bits_2="1.24.4", bits_8="1.23.2", gather="1.23.2"),
    limits=MappingProxyType(
        {
            "tables": 1e-6,
            "prefill": 1e-4,
            "decode": 1e-4,
            "beyond_context": 1e-4,
            "end_of_context": 1e-4,
            "kl": 0.05,
            "flips": 0.1,
            "perplexity": 0.01,
        }
    ),
)

PROFILES: Mapping[str, Profile] = MappingProxyType({ORT.name: ORT})


def profile_of(profile: str | Profile) -> Profile:
    """A profile by name; an unknown one is an `InputError`."""
    if isinstance(profile, Profile):
        return profile
    if profile not in PROFILES:
        raise InputError("profile", repr(profile), " | ".join(PROFILES))
    return PROFILES[profile]
