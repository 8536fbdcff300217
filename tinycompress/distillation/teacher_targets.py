"""What a teacher says about the next token of n positions, in the three forms that the losses accept.

  HiddenTarget    the teacher's hidden states and its head: the whole distribution, made into logits a chunk at a time
  SampledTarget   ids that were drawn from the teacher, and how often (random sampling KD, arXiv:2503.16870)
  TopKTarget      the k most probable ids and their probabilities

Letters: n positions, k stored ids, D_t hidden size of the teacher, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from ..graph.quant_tensor import QuantTensor
from .head_products import head_logits, product_dtype


@dataclass(frozen=True, eq=False)
class HiddenTarget:
    """A teacher's last hidden states [n, D_t] (after the norm) and its head [V, D_t]: all of its distribution."""

    hidden: Tensor
    head: Tensor | QuantTensor

    def rows(self, index: Tensor | slice) -> HiddenTarget:
        return HiddenTarget(self.hidden[index], self.head)

    @torch.no_grad()
    def logits(self) -> Tensor:
        """[n, V], float32 or better: for a few rows."""
        dtype = torch.promote_types(self.hidden.dtype, torch.float32)
        out = torch.empty(len(self.hidden), self.head.shape[0], dtype=dtype, device=self.hidden.device)
        head_logits(self.hidden.to(product_dtype(self.hidden, dtype)), self.head, out)
        return out


@dataclass(frozen=True, eq=False)
class SampledTarget:
    """Token ids drawn from a teacher, int [n, k], and their shares of the draws, float [n, k], padded with share 0."""

    ids: Tensor
    probs: Tensor

    def rows(self, index: Tensor | slice) -> SampledTarget:
        return SampledTarget(self.ids[index], self.probs[index])

    def to(self, device: torch.device) -> SampledTarget:
        return SampledTarget(self.ids.to(device), self.probs.to(device))


@dataclass(frozen=True, eq=False)
class TopKTarget:
    """A teacher's k most probable ids [n, k], distinct, and their probabilities [n, k]; all other tokens are one
    outcome of mass 1 - Σ."""

    ids: Tensor
    probs: Tensor

    def rows(self, index: Tensor | slice) -> TopKTarget:
        return TopKTarget(self.ids[index], self.probs[index])

    def to(self, device: torch.device) -> TopKTarget:
        return TopKTarget(self.ids.to(device), self.probs.to(device))


TeacherTarget: TypeAlias = HiddenTarget | SampledTarget | TopKTarget
