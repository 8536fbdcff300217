"""Recipes: TOML to passes, and options of the command line to the same. Names are imported when they are used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .options import Options, best_gptq, tuned_scales
    from .recipe import Recipe, read_recipe
    from .run import Made, run_recipe

HOMES = {
    "Made": "run",
    "Options": "options",
    "Recipe": "recipe",
    "best_gptq": "options",
    "read_recipe": "recipe",
    "run_recipe": "run",
    "tuned_scales": "options",
}

__all__ = ["Made", "Options", "Recipe", "best_gptq", "read_recipe", "run_recipe", "tuned_scales"]


def __getattr__(name: str) -> Any:
    """The public name, from the module that defines it: checking a recipe's words needs no torch."""
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{HOMES[name]}", __name__), name)
