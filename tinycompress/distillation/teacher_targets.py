"""What a teacher says about the next token of n positions, in the three forms that the losses accept.

  HiddenTarget    the teacher's hidden states and its head: the whole distribution, made into logits a chunk at a time
  SampledTarget   ids that were drawn from the teacher, and how often (random sampling KD, arXiv:2503.16870)
  TopKTarget      the k most probable ids and their probabilities

Letters: n positions, k stored ids, D_t hidden size of the teacher, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Self, TypeAlias

import torch
from torch import Tensor

from ..graph.quant_tensor import QuantTensor
from .head_products import head_logits, product_dtype


@dataclass(frozen=True, eq=False)
class HiddenTarget:
    """All of a teacher's distribution, as its logits are made of.

    Fields:
        hidden: float [n, D_t], last hidden states, after the norm.
        head: [V, D_t], dense or packed.
    """

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
class SparseTarget:
    """What a cache holds of a teacher: for each position a few ids, each with its share of the probability.

    Fields:
        ids: int [n, k].
        probs: float [n, k].
    """

    ids: Tensor
    probs: Tensor

    def rows(self, index: Tensor | slice) -> Self:
        return dataclasses.replace(self, ids=self.ids[index], probs=self.probs[index])

    def to(self, device: torch.device) -> Self:
        return dataclasses.replace(self, ids=self.ids.to(device), probs=self.probs.to(device))


class SampledTarget(SparseTarget):
    """Token ids drawn from a teacher and their shares of the draws, padded with share 0."""


class TopKTarget(SparseTarget):
    """A teacher's k most probable ids, distinct, and their probabilities; all other tokens are one outcome of mass
    1 - Σ."""


TeacherTarget: TypeAlias = HiddenTarget | SparseTarget
