"""Recipes: TOML to passes, and options of the command line to the same."""

from .options import Options, best_gptq, tuned_scales
from .recipe import Recipe, read_recipe
from .run import Made, run_recipe

__all__ = ["Made", "Options", "Recipe", "best_gptq", "read_recipe", "run_recipe", "tuned_scales"]
