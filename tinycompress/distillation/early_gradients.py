"""Gradients that a loss makes along with its value: its forward keeps them, its backward scales and hands them over."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def hand_over(ctx: Any, scale: Tensor, loss: str) -> list[Tensor | None]:
    """`ctx.gradients` (a tensor for each input, or None where none is wanted), scaled in place by the scalar `scale`.

    Only once: they are let go of, so that a parameter's `.grad` can take the memory over instead of copying it. A
    second time is a RuntimeError that names `loss`, the function to call again.
    """
    if ctx.gradients is None:
        raise RuntimeError(f"{loss}: backward was called a second time; its gradients are gone (call {loss} again)")
    scaled = [None if gradient is None else gradient.mul_(scale) for gradient in ctx.gradients]
    ctx.gradients = None
    return scaled
