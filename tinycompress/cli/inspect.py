"""`tinycompress inspect`: a model in tables."""

from __future__ import annotations

from typing import Annotated

import typer

from .arguments import open_model
from .options import AsJson, Model
from .terminal import print_json


def inspect(
    model: Model,
    all_feeds: Annotated[
        bool,
        typer.Option("--feeds", help="List what every linear reads, layer by layer, without folding equal layers."),
    ] = False,
    recipe: Annotated[
        bool, typer.Option("--recipe", help="Print the recipe that a saved or exported folder was made by, as TOML.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Print a model's layers, parameters, bytes and history of passes. Runs of equal layers are folded into one line.

    \b
    Examples:
      tinycompress inspect smollm2-135m
      tinycompress inspect small --feeds
      tinycompress inspect model.gguf --json
      tinycompress inspect small --recipe > small.toml
    """
    if recipe:
        from ..provenance import recipe_of

        print(recipe_of(model), end="")
        return
    from ..evaluation import report

    graph = open_model(model)
    if as_json:
        print_json({"model": model} | report.summary(graph))
    else:
        report.print_graph(graph, model, all_feeds)
