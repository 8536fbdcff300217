"""Rotary position embedding: one object says what positions mean, for the model and for the export.

RoFormer (arXiv:2104.09864): channel pair (i, i + d/2) turns by the angle m·f_i at position m,
f_i = theta^(-2i/d). Scaled variants change f (Hugging Face's names in quotes):

  "linear"    PI, arXiv:2306.15595            f / s
  "dynamic"   NTK-aware by length             theta · (s·l/L - (s - 1))^(d/(d-2)) once l > L
  "yarn"      arXiv:2309.00071                f/s and f mixed by a ramp; cos, sin × (0.1·ln s + 1)
  "llama3"    Llama 3.1                       by wavelength: keep, mix, divide
  "longrope"  arXiv:2402.13753                f_i / factor_i, a short and a long list

The static NTK-aware variant has no type of its own: it is "default" with another theta.
Letters: d = head_dim, L = original_max_position, s = factor, l = length in use, T = positions.
Everything is computed in float32, in transformers' order of operations, so tables agree to the last bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError

TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")


@dataclass(frozen=True)
class Rope:
    """What positions mean.

    Fields:
        theta: the base of the frequencies, above 1.
        type: one of `TYPES`.
        factor: how many times longer the context becomes, s, at least 1; "default" does not read it.
        original_max_position: the length the weights were trained at, L; for all types but "default" and "linear".
        attention_factor: what cos and sin are multiplied by, for "yarn" and "longrope"; None: the paper's formula.
        beta_fast: "yarn": rotations over L above which a frequency is kept.
        beta_slow: "yarn": rotations over L below which it is divided by s.
        mscale: "yarn", DeepSeek's variant of the attention factor: its numerator.
        mscale_all_dim: likewise, its denominator.
        truncate: "yarn": whether the ramp's ends are rounded to whole channels.
        low_freq_factor: "llama3": frequencies with waves longer than L / this are divided by s.
        high_freq_factor: "llama3": frequencies with waves shorter than L / this are kept.
        short_factor: "longrope": what frequencies are divided by up to L, [d / 2].
        long_factor: "longrope": what they are divided by beyond L, [d / 2].
    """

    theta: float = 10000.0
    type: str = "default"
    factor: float = 1.0
    original_max_position: int | None = None
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.type not in TYPES:
            raise InputError("rope.type", repr(self.type), " | ".join(TYPES))
        if not (math.isfinite(self.theta) and self.theta > 1):
            raise InputError("rope.theta", self.theta, "a finite number above 1")
        if not (math.isfinite(self.factor) and self.factor >= 1):
            raise InputError("rope.factor", self.factor, "a finite number of at least 1")
        if self.type not in ("default", "linear") and not self.original_max_position:
            raise InputError(
                f"rope.original_max_position for type {self.type!r}", self.original_max_position, "a positive length"
            )
        if self.attention_factor is not None and not (
            math.isfinite(self.attention_factor) and self.attention_factor > 0
        ):
            raise InputError(
                "rope.attention_factor",
                self.attention_factor,
                "a finite number above 0, or None for the paper's formula",
            )
        if self.type == "yarn" and not 0 < self.beta_slow < self.beta_fast:
            raise InputError(
                "rope.beta_fast", f"{self.beta_fast} with beta_slow {self.beta_slow}", "beta_fast > beta_slow > 0"
            )
        if self.type == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor:
            found = f"{self.high_freq_factor} with low_freq_factor {self.low_freq_factor}"
            raise InputError("rope.high_freq_factor", found, "high_freq_factor > low_freq_factor > 0")
        if self.type == "longrope" and not (self.short_factor and self.long_factor):
            raise InputError("rope.short_factor, rope.long_factor", "an empty list", "head_dim / 2 numbers each")
        if bad := [f for f in (*self.short_factor, *self.long_factor) if not (math.isfinite(f) and f > 0)]:
            raise InputError("rope.short_factor, rope.long_factor", bad[:3], "finite numbers above 0")

    @property
    def varies_with_length(self) -> bool:
        """Frequencies depend on the length in use, so cached keys must be kept un-rotated."""
        return self.type == "dynamic" or (self.type == "longrope" and self.short_factor != self.long_factor)

    @property
    def trained(self) -> int:
        """original_max_position, where there must be one."""
        if not self.original_max_position:
            raise InputError("rope.original_max_position", self.original_max_position, "a positive length")
        return self.original_max_position

    def attention_scale(self) -> float:
        """The factor on cos and sin (so attention logits are scaled by its square)."""
        if self.attention_factor is not None:
            return self.attention_factor
        s = self.factor
        if self.type == "yarn":
            if self.mscale and self.mscale_all_dim:
                return _mscale(s, self.mscale) / _mscale(s, self.mscale_all_dim)
            return _mscale(s, 1.0)
        if self.type == "longrope" and s > 1:
            return math.sqrt(1 + math.log(s) / math.log(self.trained))
        return 1.0

    def inv_freq(self, head_dim: int, length: int = 0) -> Tensor:
        """Frequencies, float32 [head_dim / 2], radians a position; `length` matters to dynamic and longrope."""
        exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
        theta, s = self.theta, self.factor
        original = self.original_max_position or 0
        if self.type == "dynamic":
            if head_dim < 4:
                raise InputError("head_dim for dynamic", head_dim, "at least 4: the exponent is d / (d - 2)")
            stretch = s * max(length, original) / original - (s - 1)
            theta = theta * stretch ** (head_dim / (head_dim - 2))
        f = 1.0 / (theta**exponent)
        if self.type == "linear":
            return f / s
        if self.type == "yarn":
            low, high = self.yarn_range(head_dim)
            ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
            keep = 1 - ramp
            return 1.0 / (s * theta**exponent) * (1 - keep) + f * keep
        if self.type == "llama3":
            wavelength = 2 * math.pi / f
            low_wave, high_wave = original / self.low_freq_factor, original / self.high_freq_factor
            divided = torch.where(wavelength > low_wave, f / s, f)
            smooth = (original / wavelength - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
            mixed = (1 - smooth) * divided / s + smooth * divided
            between = (wavelength >= high_wave) & (wavelength <= low_wave)
            return torch.where(between, mixed, divided)
        if self.type == "longrope":
            factors = torch.tensor(self.long_factor if length > original else self.short_factor)
            if len(factors) != head_dim // 2:
                raise InputError(
                    "rope.long_factor, rope.short_factor", f"{len(factors)} numbers", f"head_dim / 2 = {head_dim // 2}"
                )
            return 1.0 / (factors * theta**exponent)
        return f

    def yarn_range(self, head_dim: int) -> tuple[float, float]:
        """YaRN's ramp ends (low, high) in channels: c(r) = d·ln(L / 2πr) / (2·ln theta), r = beta_fast, beta_slow."""

        def channel(rotations: float) -> float:
            return head_dim * math.log(self.trained / (rotations * 2 * math.pi)) / (2 * math.log(self.theta))

        low, high = channel(self.beta_fast), channel(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        return low, high + 0.001 if low == high else high

    def tables(
        self, head_dim: int, length: int, start: int = 0, device: torch.device | None = None
    ) -> tuple[Tensor, Tensor]:
        """cos and sin for positions start … length - 1, float32 [length - start, head_dim / 2], attention factor
        included."""
        positions = torch.arange(start, length, dtype=torch.float32, device=device)
        angles = positions[:, None] * self.inv_freq(head_dim, length).to(device)[None, :]  # (T, d/2)
        scale = self.attention_scale()
        return angles.cos() * scale, angles.sin() * scale


def _mscale(factor: float, m: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0
