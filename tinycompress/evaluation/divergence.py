"""How far a model has moved from a reference, token by token, with intervals.

  KL        KL(reference ‖ model) = Σ p (ln p - ln q) over the vocabulary, in nats: mean, median, and the tail, for a
            model can keep its mean and lose a few tokens entirely
  top       the same likeliest token; the share of the reference's five likeliest that are among the model's
  ratio     perplexity of the model over that of the reference, on the same tokens

Intervals are 95% by a bootstrap over windows, the same windows for both models. The largest KL of a resampled text is
never above that of the text itself: its interval ends there. Letters: W windows, T positions, V vocabulary, r rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import InputError
from .answers import Answers, answers_of
from .statistics import Interval, bootstrap, percentile

FIVE = 5
PERCENTILES = {"kl_median": 0.5, "kl_99": 0.99, "kl_99_9": 0.999, "kl_largest": 1.0}


@dataclass(frozen=True, eq=False)
class Divergence:
    """How far a model has moved from a reference on the same windows.

    Fields:
        kl: float64 [W, T], KL(reference ‖ model) at each position, in nats.
        same_top: float64 [W, T], 1 where both have the same likeliest token.
        same_five: float64 [W, T], the share of the reference's five likeliest tokens that are among the model's five.
        nll: float64 [W, T - 1], of the model, in nats: nothing follows the last token of a window.
        reference_nll: that of the reference.
    """

    kl: Tensor
    same_top: Tensor
    same_five: Tensor
    nll: Tensor
    reference_nll: Tensor

    @property
    def mean_kl(self) -> float:
        return self.kl.mean().item()

    @property
    def tokens(self) -> int:
        """Positions that were compared."""
        return self.kl.numel()

    def figures(self, seed: int = 0) -> dict[str, Interval]:
        """Every figure with its interval, by name: `kl` (the mean) and the names of `PERCENTILES` in nats, `top_1` and
        `top_5` as shares, `perplexity_ratio`, `perplexity`, `reference_perplexity`. An `InputError` for one window,
        which has no interval."""
        windows = len(self.kl)
        if windows < 2:
            raise InputError("windows", windows, "at least 2: intervals are found by resampling windows")
        means = {"kl": self.kl, "top_1": self.same_top, "top_5": self.same_five}
        nlls = {
            "perplexity_ratio": self.nll - self.reference_nll,
            "perplexity": self.nll,
            "reference_perplexity": self.reference_nll,
        }
        out = {name: bootstrap(_mean(values.mean(1)), windows, seed) for name, values in means.items()}
        out |= {name: percentile(self.kl, share, seed) for name, share in PERCENTILES.items()}
        return out | {name: bootstrap(_exp_mean(values.mean(1)), windows, seed) for name, values in nlls.items()}


def _mean(values: Tensor) -> Any:
    return lambda index: values[index].mean(-1)


def _exp_mean(values: Tensor) -> Any:
    return lambda index: values[index].mean(-1).exp()


@torch.inference_mode()
def divergence(reference: Any, model: Any, tokens: Tensor, progress: bool = True) -> Divergence:
    """How far `model` has moved from `reference` over `tokens` [W, T].

    Args:
        reference, model: a module of torch, an export in its runtime, any function from ids [1, T] to logits [1, T, V],
            or the `Answers` of one to these tokens.

    An `InputError` for models of different vocabularies, and for logits that are not finite.
    """
    expected, found = (m if isinstance(m, Answers) else answers_of(m, tokens) for m in (reference, model))
    following = torch.cat([tokens[:, 1:], tokens[:, :1]], 1)  # of a window's last token: anything, it is cut off
    compared = []
    for number in tqdm(range(len(tokens)), desc="divergence", unit="window", delay=2, disable=not progress):
        rows = []
        start = 0
        for p, q in zip(expected.logits(number), found.logits(number)):
            if p.shape != q.shape:
                accepted = f"{p.shape[1]} tokens, as the reference has"
                raise InputError("vocabulary of the model", f"{q.shape[1]} tokens", accepted)
            rows.append(compare(p, q, following[number, start : start + len(p)].cpu()))
            start += len(p)
        compared.append(torch.cat(rows, 1))
        if not compared[-1].isfinite().all():
            raise InputError(f"logits of window {number}", "NaN or infinite values", "finite ones, in both models")
    kl, same_top, same_five, reference_nll, nll = torch.stack(compared, 1)
    return Divergence(kl, same_top, same_five, nll[:, :-1], reference_nll[:, :-1])


def compare(reference: Tensor, model: Tensor, following: Tensor) -> Tensor:
    """Logits [r, V] of two models and the tokens [r] that followed, to float64 [5, r]: KL(reference ‖ model), whether
    the likeliest tokens are equal, the share of the five likeliest that both have, and both models' NLL."""
    p, q = reference.double().log_softmax(-1), model.double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).clamp_min(0)
    five = min(FIVE, p.shape[-1])
    of_reference, of_model = (logits.topk(five).indices for logits in (reference, model))
    same_five = (of_reference[:, :, None] == of_model[:, None]).any(-1).double().mean(-1)
    same_top = (reference.argmax(-1) == model.argmax(-1)).double()
    nlls = [-logs.gather(1, following[:, None].long())[:, 0] for logs in (p, q)]
    return torch.stack([kl, same_top, same_five, *nlls])
